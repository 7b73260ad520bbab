"""Pages of the KV cache: who holds them, and which prefixes they already contain.

The pool hands out page numbers; the tensors they index live in the model runner. A full page is
published under the SHA-256 chain of its salt and all token ids up to its end, so equal digests mean
equal prefixes; what is hashed says which of the two it is, so that no salt can be a page's name. A
page that nobody holds keeps its content until it is the least recently used one.
"""

import hashlib
from array import array
from collections import OrderedDict

from linalign.alignment_core.scheduling.sequence import Branch


class PagePool:
    """Reference-counted pages of `page_size` tokens each, shared by all branches of all requests."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._references = [0] * num_pages
        self._free = OrderedDict.fromkeys(range(num_pages))  # first out first: least recently used
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, whether or not they still have a reusable content."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def adopt(self, branch: Branch) -> int:
        """Take over pages that already hold the branch's next tokens; returns the tokens gained.

        The branch's newest token is never adopted, because its logits are wanted.
        """
        before = branch.num_computed
        while len(branch.pages) * self.page_size == branch.num_computed:
            end = branch.num_computed + self.page_size
            if end > len(branch.tokens) - 1:
                break
            page = self._page_of.get(self._hash(branch, len(branch.pages)))
            if page is None:
                break
            self._free.pop(page, None)
            self._references[page] += 1
            branch.pages.append(page)
            branch.num_published += 1
            branch.num_computed = end
        return branch.num_computed - before

    def allocate(self, branch: Branch, num_tokens: int) -> bool:
        """Give the branch room for its first `num_tokens` tokens; False, and no change, if it can't be had."""
        missing = self.pages_for(num_tokens) - len(branch.pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page, _ = self._free.popitem(last=False)
            self._forget(page)
            self._references[page] = 1
            branch.pages.append(page)
        return True

    def publish(self, branch: Branch, num_tokens: int) -> None:
        """Let others adopt the full pages among the branch's first `num_tokens` tokens.

        May be called for tokens that the step about to run computes: within a forward pass every
        layer writes all rows' keys and values before any row reads them.
        """
        while branch.num_published < num_tokens // self.page_size:
            index = branch.num_published
            digest, page = self._hash(branch, index), branch.pages[index]
            if digest not in self._page_of:
                self._page_of[digest] = page
                self._hash_of[page] = digest
            branch.num_published += 1

    def unpublish(self, branch: Branch) -> None:
        """Let nobody else adopt the branch's pages, as something is wrong with them."""
        for page in branch.pages:
            self._forget(page)

    def release(self, branch: Branch) -> None:
        """Let go of all pages of the branch; those it has not computed lose their published name."""
        for index in reversed(range(len(branch.pages))):  # so that a prefix outlives what follows it
            page = branch.pages[index]
            written = (index + 1) * self.page_size <= branch.num_computed
            if not written:
                self._forget(page)
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free[page] = None
                if page not in self._hash_of:
                    self._free.move_to_end(page, last=False)
        branch.pages.clear()
        branch.num_published = branch.num_computed = 0

    def _hash(self, branch: Branch, index: int) -> bytes:
        return hash_pages(branch, index + 1, self.page_size)[index]

    def _forget(self, page: int) -> None:
        digest = self._hash_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]


def hash_pages(branch: Branch, num_pages: int, page_size: int) -> list[bytes]:
    """The chain of the branch's first full pages, which are known to be that many; more if they were asked for."""
    hashes = branch.page_hashes
    while len(hashes) < num_pages:
        start = len(hashes) * page_size
        tokens = array("i", branch.tokens[start : start + page_size])
        before = hashes[-1] if hashes else hashlib.sha256(b"salt" + branch.salt).digest()
        hashes.append(hashlib.sha256(b"page" + before + tokens.tobytes()).digest())
    return hashes

"""Pages of the KV cache: which branches hold them, and which prefixes they contain.

The pool hands out page numbers; the model runner owns the tensors that the numbers index. A full page is published
under a digest: a SHA-256 chain over the salt and all token ids up to the end of the page. So equal digests mean equal
prefixes. The hash of a salt begins with "salt" and the hash of a page with "page", so no salt can have the digest of a
page. A page without a holder keeps its content until it is evicted; the least recently used page is evicted first.
"""

import hashlib
from array import array
from collections import OrderedDict

from linalign.alignment_core.scheduling.sequence import Branch


class PagePool:
    """Reference-counted pages of `page_size` tokens each, shared by all branches of all requests. Not thread-safe."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._references = [0] * num_pages  # branches that hold each page
        self._free = OrderedDict.fromkeys(range(num_pages))  # pages without a holder, the next to evict first
        self._page_of: dict[bytes, int] = {}  # published pages, by digest
        self._hash_of: dict[int, bytes] = {}  # the digests of published pages

    @property
    def num_free(self) -> int:
        """The number of pages without a holder, published ones included."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def adopt(self, branch: Branch) -> int:
        """Add published pages that contain the next tokens of the branch; returns the number of these tokens.

        The newest token of the branch is never adopted, because its logits are needed.
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
        """Give the branch pages for its first `num_tokens` tokens; False, and no change, if too few are free."""
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
        """Let other branches adopt the full pages of the branch's first `num_tokens` tokens.

        The next step may still have to compute these tokens: in a forward pass each layer writes the keys and values of
        all rows before any row reads them.
        """
        while branch.num_published < num_tokens // self.page_size:
            index = branch.num_published
            digest, page = self._hash(branch, index), branch.pages[index]
            if digest not in self._page_of:
                self._page_of[digest] = page
                self._hash_of[page] = digest
            branch.num_published += 1

    def unpublish(self, branch: Branch) -> None:
        """Let no other branch adopt the branch's pages, because their content may be wrong."""
        for page in branch.pages:
            self._forget(page)

    def release(self, branch: Branch) -> None:
        """Give back all pages of the branch. Pages that it has not computed are no longer published."""
        # In reverse, so that the pages after a prefix are evicted before the prefix.
        for index in reversed(range(len(branch.pages))):
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
    """Digests of at least the first `num_pages` full pages of the branch, which keeps them."""
    hashes = branch.page_hashes
    while len(hashes) < num_pages:
        start = len(hashes) * page_size
        tokens = array("i", branch.tokens[start : start + page_size])
        before = hashes[-1] if hashes else hashlib.sha256(b"salt" + branch.salt).digest()
        hashes.append(hashlib.sha256(b"page" + before + tokens.tobytes()).digest())
    return hashes

"""A turn of a chat, as tokens and pages: what is held, and what is computed."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

PAGE_SIZE = 16  # tokens, the engine's
TEMPLATE = 5  # tokens that a chat template puts before and after a message

# A branch, as its parts: (whose they are, how many tokens). Branches share what they begin with in common.
Branch = tuple[tuple[object, int], ...]


@dataclass(frozen=True, slots=True)
class Load:
    """A turn of a chat, in tokens. system: the system message, everybody's. history: the turns before.
    principles: 0 is plain. shared: all users have the same principles. think: seconds between reply and next turn.
    """

    system: int = 200
    principle: int = 32
    history: int = 0
    message: int = 300
    reply: int = 256
    principles: int = 1
    placement: Literal["system", "user"] = "system"
    shared: bool = False
    choices: int = 1
    think: float = 30.0

    def branches(self, user: int, replied: int) -> Iterator[Branch]:
        """Of all choices. What is computed once `replied` ≥ 1 tokens have been drawn: all but the newest of them."""
        principles = [(("principle", i, None if self.shared else user), self.principle) for i in range(self.principles)]
        chat = (("header", TEMPLATE), (("history", user), self.history), (("message", user), self.message))
        for choice in range(self.choices):
            # The prompt's last token is every choice's own: its logits are wanted, so it is never taken over.
            end = (("footer", TEMPLATE - 1), (("reply", user, choice), replied))
            for principle in (*principles, None):
                yield self._branch(principle, chat, end)

    def _branch(self, principle: tuple[object, int] | None, chat: Branch, end: Branch) -> Branch:
        extra = (principle,) if principle else ()
        system = (("system", self.system),)
        return (*system, *extra, *chat, *end) if self.placement == "system" else (*system, *chat, *extra, *end)

    @property
    def rows(self) -> int:
        """Of one choice in a step."""
        return self.principles + 1

    @property
    def prompt(self) -> float:
        """Tokens of a branch, on average."""
        return sum(size for branch in self.branches(0, 1) for _, size in branch) / self.rows / self.choices


def full_pages(branch: Branch) -> list[tuple[object, ...]]:
    """The names of its full pages: equal names are equal prefixes."""
    names, owners, end = [], [], 0
    for owner, size in branch:
        owners.append(owner)
        first, end = end // PAGE_SIZE, end + size
        names += [(page, *owners) for page in range(first, end // PAGE_SIZE)]
    return names


def num_pages(branches: Iterable[Branch]) -> int:
    """That the branches hold together."""
    full, partial = set(), 0
    for branch in branches:
        full.update(full_pages(branch))
        partial += sum(size for _, size in branch) % PAGE_SIZE > 0
    return len(full) + partial


def num_computed(branches: Iterable[Branch], known: Iterable[Branch]) -> int:
    """Tokens of prompts that a prefill computes, where the branches of `known` are in the cache."""
    cached, tokens = {name for branch in known for name in full_pages(branch)}, 0
    for branch in branches:
        names = full_pages(branch)
        hits = len(list(itertools.takewhile(cached.__contains__, names)))
        tokens += sum(size for _, size in branch) - hits * PAGE_SIZE
        cached.update(names)
    return tokens


def held(load: Load) -> tuple[int, int]:
    """Pages of each user at the end of a reply, and those of all users together."""
    one, two = (num_pages(b for user in range(n) for b in load.branches(user, load.reply)) for n in (1, 2))
    return two - one, 2 * one - two


def prompt_tokens(load: Load, has_history: bool) -> int:
    """Computed for one request: others have been there, and the same user's turns before where has_history."""
    known = list(load.branches(1, 1))
    if has_history and load.history:
        # The turn before had another message, so a principle at its end is of no use any more; and of its reply all
        # but the newest computed token has been published.
        computed = max(0, load.history - TEMPLATE - 1)
        principles = 0 if load.placement == "user" else load.principles
        before = replace(load, history=computed, message=0, principles=principles)
        known += [branch[:-2] for branch in before.branches(0, 1)]
    return num_computed(load.branches(0, 1), known)

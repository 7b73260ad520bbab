"""A turn of a chat in tokens and pages: what is held in the cache, and what is computed."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

PAGE_SIZE = 16  # tokens; the engine's default
TEMPLATE = 5  # tokens of the chat template around a message

# A branch as its parts: (owner, number of tokens). Branches share the parts that they have in common at the start.
Branch = tuple[tuple[object, int], ...]


@dataclass(frozen=True, slots=True)
class Load:
    """A turn of a chat. Lengths are in tokens."""

    system: int = 200  # system message, the same for all users
    principle: int = 32
    history: int = 0  # earlier turns
    message: int = 300
    reply: int = 256
    principles: int = 1  # 0 is plain
    placement: Literal["system", "user"] = "system"
    shared: bool = False  # whether all users have the same principles
    choices: int = 1
    think: float = 30.0  # seconds between a reply and the next turn

    def branches(self, user: int, replied: int) -> Iterator[Branch]:
        """Branches of all choices after `replied` ≥ 1 drawn tokens, without the newest one: it is not computed yet."""
        principles = [(("principle", i, None if self.shared else user), self.principle) for i in range(self.principles)]
        chat = (("header", TEMPLATE), (("history", user), self.history), (("message", user), self.message))
        for choice in range(self.choices):
            # The prompt's last token is never shared, because each choice needs its logits.
            end = (("footer", TEMPLATE - 1), (("reply", user, choice), replied))
            for principle in (*principles, None):
                yield self._branch(principle, chat, end)

    def _branch(self, principle: tuple[object, int] | None, chat: Branch, end: Branch) -> Branch:
        extra = (principle,) if principle else ()
        system = (("system", self.system),)
        return (*system, *extra, *chat, *end) if self.placement == "system" else (*system, *chat, *extra, *end)

    @property
    def rows(self) -> int:
        """Rows of one choice in a step."""
        return self.principles + 1

    @property
    def prompt(self) -> float:
        """Average number of tokens of a branch."""
        return sum(size for branch in self.branches(0, 1) for _, size in branch) / self.rows / self.choices


def full_pages(branch: Branch) -> list[tuple[object, ...]]:
    """Names of the branch's full pages. Equal names mean equal prefixes."""
    names, owners, end = [], [], 0
    for owner, size in branch:
        owners.append(owner)
        first, end = end // PAGE_SIZE, end + size
        names += [(page, *owners) for page in range(first, end // PAGE_SIZE)]
    return names


def num_pages(branches: Iterable[Branch]) -> int:
    """Pages that the branches hold together."""
    full, partial = set(), 0
    for branch in branches:
        full.update(full_pages(branch))
        partial += sum(size for _, size in branch) % PAGE_SIZE > 0
    return len(full) + partial


def num_computed(branches: Iterable[Branch], known: Iterable[Branch]) -> int:
    """Prompt tokens that a prefill computes if the branches of `known` are cached."""
    cached, tokens = {name for branch in known for name in full_pages(branch)}, 0
    for branch in branches:
        names = full_pages(branch)
        hits = len(list(itertools.takewhile(cached.__contains__, names)))
        tokens += sum(size for _, size in branch) - hits * PAGE_SIZE
        cached.update(names)
    return tokens


def held(load: Load) -> tuple[int, int]:
    """Pages of each user at the end of a reply, and pages that all users share."""
    one, two = (num_pages(b for user in range(n) for b in load.branches(user, load.reply)) for n in (1, 2))
    return two - one, 2 * one - two


def prompt_tokens(load: Load, has_history: bool) -> int:
    """Prompt tokens computed for one request. Other users' prompts are cached; `has_history`: own earlier turns too."""
    known = list(load.branches(1, 1))
    if has_history and load.history:
        # The previous turn had another message, so a principle behind the message can't be reused. All computed tokens
        # of the previous reply are published; the newest token was never computed.
        computed = max(0, load.history - TEMPLATE - 1)
        principles = 0 if load.placement == "user" else load.principles
        before = replace(load, history=computed, message=0, principles=principles)
        known += [branch[:-2] for branch in before.branches(0, 1)]
    return num_computed(load.branches(0, 1), known)

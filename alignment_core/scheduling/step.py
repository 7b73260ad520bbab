"""What runs in one forward pass."""

from dataclasses import dataclass, field

from linalign.alignment_core.scheduling.sequence import Branch, NextToken, Sequence


@dataclass(frozen=True, slots=True)
class Row:
    """The query tokens [start, end) of one branch in one forward pass. The last of them may be drafts."""

    branch: Branch
    start: int
    end: int
    drafts: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def tokens(self) -> list[int]:
        """Token ids. A negative number is a placeholder for a token of the previous step, see `Sequence.expect`."""
        return [*self.branch.tokens[self.start : self.end], *self.drafts]

    def cut(self, num_tokens: int) -> "tuple[Row, Row]":
        """The first `num_tokens` tokens of the row, and the others."""
        middle = self.start + num_tokens
        num_drafts = max(0, middle - (self.end - len(self.drafts)))
        head = Row(self.branch, self.start, middle, self.drafts[:num_drafts])
        return head, Row(self.branch, middle, self.end, self.drafts[num_drafts:])


@dataclass(slots=True)
class Step:
    """All rows of one forward pass."""

    rows: dict[Sequence, list[Row]] = field(default_factory=dict)
    admitted: list[Sequence] = field(default_factory=list)  # sequences whose first step this is
    drawing: list[Sequence] = field(default_factory=list)  # sequences that get a token: all their rows are complete
    num_tokens: int = 0  # query tokens of all rows
    num_given: int = 0  # drafts that are given tokens, of all rows

    def drafts(self, sequence: Sequence) -> tuple[int, ...]:
        return self.rows[sequence][0].drafts

    @property
    def has_drafts(self) -> bool:
        return any(self.drafts(sequence) for sequence in self.drawing)

    @property
    def next_tokens(self) -> list[NextToken]:
        """The tokens to draw: for each sequence one after its newest token, and one after each draft."""
        return [
            NextToken(sequence, sequence.num_drawn - len(sequence.prompt.given) + i)
            for sequence in self.drawing
            for i in range(1 + len(self.drafts(sequence)))
        ]

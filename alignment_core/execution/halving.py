"""Splits a forward pass into two, for a GPU whose memory is too small for the whole."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from linalign.alignment_core.scheduling.step import Row


@dataclass(frozen=True, slots=True)
class Half:
    """One part. rows, wanted: See `Plan.of`. lines: The indices of its logits in the logits of the whole step."""

    rows: list[Row] = field(default_factory=list)
    wanted: list[tuple[Row, int]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)


def halve(rows: Sequence[Row], wanted: Sequence[tuple[Row, int]]) -> tuple[Half, Half]:
    """Two parts with equal numbers of tokens, ± 1. The row in the middle is cut.

    Run the parts in this order: a row may read what earlier rows write.

    rows: In the order of the schedule. wanted: See `Plan.of`.
    """
    first, second = Half(), Half()
    num_in_first = sum(row.num_tokens for row in rows) // 2
    cuts = {}
    for row in rows:
        head, tail = cuts[id(row)] = row.cut(min(num_in_first, row.num_tokens))
        num_in_first -= head.num_tokens
        for half, piece in ((first, head), (second, tail)):
            if piece.num_tokens:
                half.rows.append(piece)
    for line, (row, place) in enumerate(wanted):
        head, tail = cuts[id(row)]
        is_in_tail = place >= -tail.num_tokens
        half = second if is_in_tail else first
        half.wanted.append((tail, place) if is_in_tail else (head, place + tail.num_tokens))
        half.lines.append(line)
    return first, second

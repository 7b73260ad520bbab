"""Draws a step's tokens, and reports on them."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from linalign.alignment_core.decoding.draw import draw
from linalign.alignment_core.decoding.logprobs import Logprobs, log_probabilities
from linalign.alignment_core.decoding.policy import Policy
from linalign.alignment_core.decoding.static_draw import NO_TOKEN
from linalign.alignment_core.output import TokenLogprob
from linalign.alignment_core.scheduling.sequence import NextToken


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens of a step, [S] int64, and the reports for the requests that need one."""

    tokens: Tensor
    reports: Seq[Logprobs]

    def on_host(self) -> Iterator[tuple[int, tuple[TokenLogprob, ...]]]:
        """Each token id, with its report if there is one."""
        tokens: list[int] = self.tokens.tolist()
        reports = dict(line_and_report for part in self.reports for line_and_report in part.reports(tokens))
        for line, token in enumerate(tokens):
            yield token, (reports[line],) if line in reports else ()


class Sampler:
    """Draws from tensors of any shape. `StaticSampler` does the same in fixed shapes."""

    def draw(self, logits: Tensor, next_tokens: Seq[NextToken]) -> Drawn:
        """Draw a token for each of S next tokens: the given one where it is given, NO_TOKEN where the logits are not
        finite.

        logits: [R, V] float32, a row for each branch of each next token in turn. Rows beyond them are not read.
        """
        policy = Policy(logits, next_tokens)
        tokens = draw(policy)
        put_given(tokens, next_tokens)
        remember_directions(policy)
        return Drawn(tokens, log_probabilities(policy, tokens, range(len(next_tokens))))


def put_given(tokens: Tensor, next_tokens: Seq[NextToken]) -> None:
    """Put given tokens in the place of drawn ones, [S]; not over NO_TOKEN."""
    for line, (sequence, position) in enumerate(next_tokens):
        if position < 0:
            tokens[line] = torch.where(tokens[line] == NO_TOKEN, NO_TOKEN, sequence.prompt.given[position])


def remember_directions(policy: Policy) -> None:
    """Keep what OPAD needs for the next tokens of its sequences."""
    for (sequence, position), direction in policy.directions.items():
        sequence.directions[position] = direction

"""Draws in fixed shapes, from and to fixed places on the device, as CUDA graphs."""

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor

from linalign.alignment_core.decoding.alignment import Mixing
from linalign.alignment_core.decoding.draw import draw
from linalign.alignment_core.decoding.draw_settings import DrawSettings
from linalign.alignment_core.decoding.logprobs import log_probabilities
from linalign.alignment_core.decoding.policy import Policy
from linalign.alignment_core.decoding.sampler import Drawn, Sampler, put_given, remember_directions
from linalign.alignment_core.decoding.static_draw import PREPARED, Filters, draw_from_logits, weights_above
from linalign.alignment_core.execution.cuda_graphs import padded_sizes
from linalign.alignment_core.execution.model_runner import ModelRunner
from linalign.alignment_core.methods import starts_from_base
from linalign.alignment_core.scheduling.sequence import NextToken, Sequence
from linalign.alignment_core.transfer import to_device

DrawFromLogits = Callable[..., Tensor]


class StaticSampler(Sampler):
    """Draws on the runner's device, from `runner.logits` to `runner.drawn`: a CUDA graph for each padded number of
    tokens and each set of filters. Sequences that a fixed shape does not hold are drawn as `Sampler` does.

    draw_from_logits: the function that the graphs run.
    """

    def __init__(self, runner: ModelRunner, draw_from_logits: DrawFromLogits | None = None) -> None:
        self._runner = runner
        self._draw_from_logits = draw_from_logits or default_draw(runner)
        max_lines = len(runner.drawn)
        self._sizes = [max_lines]
        if not runner.config.batch_invariant:
            self._sizes = padded_sizes(max_lines)[1:]  # torch compiles size 1 as a special case
        self._packed = torch.zeros(len(PADDING_SETTINGS), max_lines, dtype=torch.float64, device=runner.drawn.device)

    @torch.inference_mode()
    def draw(self, logits: Tensor, next_tokens: Seq[NextToken]) -> Drawn:
        """As `Sampler.draw`. The tokens are valid until the next draw."""
        fits = logits.data_ptr() == self._runner.logits.data_ptr()
        is_usual = [fits and _is_usual(sequence) for sequence, _ in next_tokens]
        usual = [line for line, is_one in enumerate(is_usual) if is_one]
        policies: list[tuple[Policy, list[int]]] = []
        if len(usual) == len(next_tokens):
            tokens = self._replay(next_tokens, usual)
        else:
            tokens = torch.empty(len(next_tokens), dtype=torch.int64, device=logits.device)
            if usual:
                tokens[_index(usual, logits)] = self._replay(next_tokens, usual)
            for lines in self._groups([line for line, is_one in enumerate(is_usual) if not is_one]):
                policy = _policy(logits, next_tokens, lines)
                tokens[_index(lines, logits)] = draw(policy)
                remember_directions(policy)
                policies.append((policy, lines))
            tokens = self._runner.drawn[: len(next_tokens)].copy_(tokens)
        put_given(tokens, next_tokens)
        reported = [line for line in usual if next_tokens[line].sequence.params.num_reported is not None]
        if reported:
            policies.append((_policy(logits, next_tokens, reported), reported))
        reports = [log_probabilities(policy, tokens[_index(lines, logits)], lines) for policy, lines in policies]
        return Drawn(tokens, list(itertools.chain(*reports)))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and capture everything that `draw` may run, so that no request waits for it."""
        for filters in PREPARED:
            # First with a smaller size: otherwise torch would specialise on the largest size, the number of rows.
            self._step(self._sizes[0], filters)
            for size in reversed(self._sizes):
                self._runner.graphs.run(("draw", size, filters), lambda: self._step(size, filters))  # noqa: B023

    def _groups(self, unusual: list[int]) -> list[list[int]]:
        """The lines that are drawn together; in batch-invariant mode each line separately."""
        return [[line] for line in unusual] if self._runner.config.batch_invariant else [unusual]

    def _replay(self, next_tokens: Seq[NextToken], lines: list[int]) -> Tensor:
        """Draw for some of the next tokens by a graph; a view of `runner.drawn`."""
        settings = DrawSettings.of(next_tokens)  # rows are numbered through all next tokens
        if len(lines) < len(next_tokens):
            settings = settings[torch.tensor(lines)]
        filters = Filters.of(settings).prepared
        size = next(size for size in self._sizes if size >= len(lines))
        self._packed[:, :size].copy_(to_device(_pack(settings, size), self._packed.device))
        self._runner.graphs.run(("draw", size, filters), lambda: self._step(size, filters))
        return self._runner.drawn[: len(lines)]

    def _step(self, size: int, filters: Filters) -> None:
        settings = _unpack(self._packed[:, :size])
        self._runner.drawn[:size].copy_(self._draw_from_logits(self._runner.logits, settings, filters))


def _index(lines: list[int], like: Tensor) -> Tensor:
    return to_device(torch.tensor(lines), like.device)


def _policy(logits: Tensor, next_tokens: Seq[NextToken], lines: list[int]) -> Policy:
    """The policy of some of the next tokens."""
    if len(lines) == len(next_tokens):
        return Policy(logits, next_tokens)
    ends = list(itertools.accumulate(len(sequence.branches) for sequence, _ in next_tokens))
    rows = [row for line in lines for row in range(ends[line] - len(next_tokens[line].sequence.branches), ends[line])]
    return Policy(logits[_index(rows, logits)], [next_tokens[line] for line in lines])


def _is_usual(sequence: Sequence) -> bool:
    """Whether a fixed shape holds what the sequence needs: one principle, one base, no edits."""
    prompt = sequence.prompt
    turns = starts_from_base(prompt.coefficients)
    return len(prompt.principled) == 1 and not (sequence.params.edits or prompt.mixes_by_logits or turns)


def draw_everything(logits: Tensor) -> None:
    """Run the most expensive draw from so many rows, to measure its memory."""
    packed = torch.tensor(PADDING_SETTINGS, dtype=torch.float64, device=logits.device)[:, None].repeat(1, len(logits))
    draw_from_logits(logits.float(), _unpack(packed), PREPARED[-1])


# The settings of padding lines, in the order of _pack: the best token of row 0.
PADDING_SETTINGS = (0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
PACKED = fields(DrawSettings)[1:]  # beside the mixing


def _pack(settings: DrawSettings, size: int) -> Tensor:
    """[12, size] float64, in which float32 and row numbers are exact: one copy to the device instead of twelve."""
    mixing = settings.mixing
    lines = [mixing.principled[:, 0], mixing.weights[:, 0], mixing.coefficients[:, 0], mixing.base]
    lines += [getattr(settings, field.name) for field in PACKED]
    packed = torch.tensor(PADDING_SETTINGS, dtype=torch.float64)[:, None].repeat(1, size)
    packed[:, : len(mixing.base)] = torch.stack([line.double() for line in lines])
    return packed


def _unpack(packed: Tensor) -> DrawSettings:
    principled, weights, coefficients, base, aligned, *filters, top_k, min_p, top_p, uniform = packed
    nucleus_top_p, nucleus_temperature, temperature = (line.float() for line in filters)
    return DrawSettings(
        mixing=Mixing(principled.long()[:, None], weights.float()[:, None], coefficients.float()[:, None], base.long()),
        aligned=aligned.bool(),
        nucleus_top_p=nucleus_top_p,
        nucleus_temperature=nucleus_temperature,
        temperature=temperature,
        top_k=top_k.long(),
        min_p=min_p.float(),
        top_p=top_p.float(),
        uniform=uniform,
    )


def default_draw(runner: ModelRunner) -> DrawFromLogits:
    return compiled_draw() if runner.captures else draw_from_logits


def compiled_draw(backend: str = "inductor") -> DrawFromLogits:
    """`draw_from_logits` in few kernels."""
    one_pass = torch.compile(weights_above, dynamic=True, backend=backend)
    return partial(torch.compile(draw_from_logits, dynamic=True, backend=backend), weights_above=one_pass)

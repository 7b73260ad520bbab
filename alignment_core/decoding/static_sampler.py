"""Draws in shapes that repeat, from and to fixed places on the device, as CUDA graphs."""

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor

from linalign.alignment_core.decoding.alignment import Mixing
from linalign.alignment_core.decoding.methods import starts_from_base
from linalign.alignment_core.decoding.sampling import Settings, plan, sample
from linalign.alignment_core.decoding.static_draw import PREPARED, Filters, draw, weights_above
from linalign.alignment_core.execution.cuda_graphs import padded_sizes
from linalign.alignment_core.execution.model_runner import ModelRunner
from linalign.alignment_core.scheduling.sequence import Sequence
from linalign.alignment_core.transfer import to_device

Draw = Callable[..., Tensor]


class StaticSampler:
    """Draws on the device that the runner is on, from `runner.logits` to `runner.drawn`: as CUDA graphs, one for
    each padded number of sequences and each set of filters.

    how: as `draw`.
    """

    def __init__(self, runner: ModelRunner, how: Draw | None = None) -> None:
        self._runner = runner
        self._draw: Draw = how or (compiled_draw() if runner.captures else draw)
        most = len(runner.drawn)
        self._sizes = [most]
        if not runner.config.batch_invariant:
            self._sizes = padded_sizes(most)[1:]  # torch compiles size 1 as a case of its own
        self._asked = torch.zeros(len(NOBODY), most, dtype=torch.float64, device=runner.drawn.device)

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Seq[Sequence], positions: Seq[int]) -> Tensor:
        """As `sampling.sample`; the result is valid until the next draw."""
        fits = logits.data_ptr() == self._runner.logits.data_ptr()
        is_usual = [fits and _is_usual(sequence) for sequence in sequences]
        usual = [i for i, is_one in enumerate(is_usual) if is_one]
        if len(usual) == len(sequences):
            return self._of_usual(sequences, positions, usual)
        tokens = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
        if usual:
            tokens[_index(usual, logits)] = self._of_usual(sequences, positions, usual)
        ends = list(itertools.accumulate(len(sequence.branches) for sequence in sequences))
        for lines in self._groups([i for i, is_one in enumerate(is_usual) if not is_one]):
            rows = [row for i in lines for row in range(ends[i] - len(sequences[i].branches), ends[i])]
            drawn = sample(logits[_index(rows, logits)], [sequences[i] for i in lines], [positions[i] for i in lines])
            tokens[_index(lines, logits)] = drawn
        return self._runner.drawn[: len(sequences)].copy_(tokens)

    def _groups(self, unusual: list[int]) -> list[list[int]]:
        """What is drawn together: in batch-invariant mode nothing."""
        return [[line] for line in unusual] if self._runner.config.batch_invariant else [unusual]

    def _of_usual(self, sequences: Seq[Sequence], positions: Seq[int], lines: list[int]) -> Tensor:
        mixing = plan(sequences)[torch.tensor(lines)]
        settings = Settings.of([sequences[i] for i in lines], [positions[i] for i in lines])
        filters = Filters.of(settings).prepared
        size = next(size for size in self._sizes if size >= len(lines))
        self._asked[:, :size].copy_(to_device(_pack(mixing, settings, size), self._asked.device))
        self._runner.graphs.run(("draw", size, filters), lambda: self._step(size, filters))
        return self._runner.drawn[: len(lines)]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and capture all that `sample` may run, so that no request has to wait for it."""
        for filters in PREPARED:
            self._step(self._sizes[0], filters)  # the most sequences are as many as rows, which torch takes for a rule
            for size in reversed(self._sizes):
                self._runner.graphs.run(("draw", size, filters), lambda: self._step(size, filters))  # noqa: B023

    def _step(self, size: int, filters: Filters) -> None:
        mixing, settings = _unpack(self._asked[:, :size])
        self._runner.drawn[:size].copy_(self._draw(self._runner.logits, mixing, settings, filters))


def _index(lines: list[int], like: Tensor) -> Tensor:
    return to_device(torch.tensor(lines), like.device)


def _is_usual(sequence: Sequence) -> bool:
    """Whether a fixed shape holds all that the sequence asks for: one principle and one base, no edits."""
    prompt = sequence.prompt
    turns = starts_from_base(prompt.coefficients)
    return len(prompt.principled) == 1 and not (sequence.params.edits or prompt.follows_logits or turns)


def draw_everything(logits: Tensor) -> None:
    """The most that a step may draw from so many rows, for its memory."""
    packed = torch.tensor(NOBODY, dtype=torch.float64, device=logits.device)[:, None].repeat(1, len(logits))
    draw(logits.float(), *_unpack(packed), PREPARED[-1])


# What the lines that only fill a step up ask for, in the order of _pack: the best token of row 0.
NOBODY = (0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def _pack(mixing: Mixing, settings: Settings, size: int) -> Tensor:
    """[12, size] float64, in which float32 and row numbers are exact: one copy to the device instead of twelve."""
    lines = [mixing.principled[:, 0], mixing.weights[:, 0], mixing.coefficients[:, 0], mixing.base]
    lines += [getattr(settings, field.name) for field in fields(settings)]
    packed = torch.tensor(NOBODY, dtype=torch.float64)[:, None].repeat(1, size)
    packed[:, : len(mixing.base)] = torch.stack([line.double() for line in lines])
    return packed


def _unpack(packed: Tensor) -> tuple[Mixing, Settings]:
    principled, weights, coefficients, base, aligned, *filters, top_k, min_p, top_p, uniform = packed
    nucleus_top_p, nucleus_temperature, temperature = (line.float() for line in filters)
    mixing = Mixing(principled.long()[:, None], weights.float()[:, None], coefficients.float()[:, None], base.long())
    settings = Settings(
        aligned=aligned.bool(),
        nucleus_top_p=nucleus_top_p,
        nucleus_temperature=nucleus_temperature,
        temperature=temperature,
        top_k=top_k.long(),
        min_p=min_p.float(),
        top_p=top_p.float(),
        uniform=uniform,
    )
    return mixing, settings


def compiled_draw(backend: str = "inductor") -> Draw:
    """`draw` in few kernels."""
    one_pass = torch.compile(weights_above, dynamic=True, backend=backend)
    return partial(torch.compile(draw, dynamic=True, backend=backend), weights_above=one_pass)

"""The draw of `sampling`, in shapes that depend on [S, V] alone and without a look at any value on the host:
what a CUDA graph can hold and torch.compile can fuse.

Where `sampling` sorts the few tokens that matter, this looks for the threshold that sorting would
find, bit by bit: a float's bits, read as an integer, are in the order of the floats.
"""

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import astuple, dataclass, fields
from functools import partial

import torch
from torch import Tensor

from alignment_core.alignment import Mixing, direction, principled_logits, starts_from_base
from alignment_core.attention.paged_batch import to_device
from alignment_core.cuda_graphs import padded_sizes
from alignment_core.model_runner import ModelRunner
from alignment_core.sampling import Settings, inverse_transform, plan, sample
from alignment_core.sequence import Sequence

DIGIT = 4  # bits that one pass over the vocabulary finds
Draw = Callable[..., Tensor]
WeightsAbove = Callable[[Tensor, Tensor, Tensor, int], Tensor]
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Filters:
    """What some sequence of a step asks for; each costs passes over the vocabulary for all of them."""

    nucleus: bool = False
    top_k: bool = False
    top_p: bool = False
    random: bool = False

    @classmethod
    def of(cls, settings: Settings) -> "Filters":
        """settings: on the host."""
        return cls(
            nucleus=bool((settings.nucleus_top_p < 1).any()),
            top_k=bool((settings.top_k > 0).any()),
            top_p=bool((settings.top_p < 1).any()),
            random=bool((settings.temperature > 0).any()),
        )

    @property
    def prepared(self) -> "Filters":
        """The least of PREPARED that includes these: what is compiled and captured is little, and done at the start."""
        return next(more for more in PREPARED if all(a >= b for a, b in zip(astuple(more), astuple(self), strict=True)))


PREPARED = (
    Filters(),
    Filters(random=True),
    Filters(nucleus=True),
    Filters(nucleus=True, random=True),
    Filters(nucleus=True, top_k=True, top_p=True, random=True),
)


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
        """As `sampling.sample`; the result is valid until the next draw. The host waits for unusual sequences only."""
        fits = logits.data_ptr() == self._runner.logits.data_ptr()
        is_usual = [fits and _is_usual(sequence) for sequence in sequences]
        usual = [i for i, is_one in enumerate(is_usual) if is_one]
        if len(usual) == len(sequences):
            return self._of_usual(sequences, positions, usual)
        tokens = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
        if usual:
            tokens[usual] = self._of_usual(sequences, positions, usual)
        ends = list(itertools.accumulate(len(sequence.branches) for sequence in sequences))
        for lines in self._groups([i for i, is_one in enumerate(is_usual) if not is_one]):
            rows = [row for i in lines for row in range(ends[i] - len(sequences[i].branches), ends[i])]
            tokens[lines] = sample(logits[rows], [sequences[i] for i in lines], [positions[i] for i in lines])
        return self._runner.drawn[: len(sequences)].copy_(tokens)

    def _groups(self, unusual: list[int]) -> list[list[int]]:
        """What is drawn together: in batch-invariant mode nothing."""
        return [[line] for line in unusual] if self._runner.config.batch_invariant else [unusual]

    def _of_usual(self, sequences: Seq[Sequence], positions: Seq[int], lines: list[int]) -> Tensor:
        host = torch.device("cpu")
        mixing = plan(sequences, host)[torch.tensor(lines)]
        settings = Settings.of([sequences[i] for i in lines], [positions[i] for i in lines], host)
        filters = Filters.of(settings).prepared
        size = next(size for size in self._sizes if size >= len(lines))
        self._asked[:, :size].copy_(to_device(_pack(mixing, settings, size).numpy(), self._asked.device))
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


def _weights_above(keys: Tensor, weight: Tensor, low: Tensor, width: int) -> Tensor:
    """The weight above the last key of each part but the last, parts being `width` keys from `low` on; [parts, S]."""
    ends = [(low + part * width - 1).int()[:, None] for part in range(1, 1 << DIGIT)]
    return torch.stack([torch.where(keys > end, weight, 0).sum(dim=-1) for end in ends])


def draw(
    logits: Tensor,
    mixing: Mixing,
    settings: Settings,
    filters: Filters,
    weights_above: WeightsAbove = _weights_above,
) -> Tensor:
    """One token a sequence, [S] int64: DESIGN sections 2.1 to 2.5.

    logits: [rows, V] float32. weights_above: as `_weights_above`.
    """
    y = principled_logits(logits, mixing)
    z = y + direction(logits, mixing)
    if filters.nucleus:
        best = y.amax(dim=-1, keepdim=True)
        mass = ((y - best) / settings.nucleus_temperature[:, None]).exp()
        kept = leading(y, mass, _share(settings.nucleus_top_p, mass), weights_above)
        z = z.masked_fill(~kept, -torch.inf)
    if filters.top_k:
        limit = torch.where(settings.top_k > 0, settings.top_k.float(), torch.inf)
        kept = leading(z, torch.ones_like(z), limit, weights_above)
        z = z.masked_fill(~kept, -torch.inf)
    best, first = z.max(dim=-1, keepdim=True)
    if not filters.random:
        return first.squeeze(1)
    greedy = settings.temperature == 0
    mass = ((z - best) / torch.where(greedy, 1.0, settings.temperature)[:, None]).exp()
    mass = mass * (mass >= settings.min_p[:, None])
    if filters.top_p:
        kept = leading(z, mass, _share(settings.top_p, mass), weights_above)
        mass = mass * kept
    return torch.where(greedy, first.squeeze(1), inverse_transform(mass, settings.uniform))


def leading(x: Tensor, weight: Tensor, limit: Tensor, weights_above: WeightsAbove) -> Tensor:
    """[S, V] bool: in falling order of x, ties by token id, those before which there is less than `limit`.

    x: [S, V] float32; weight: [S, V] float32, ≥ 0, the same where x is the same. limit: [S] > 0.
    """
    bits = (x + 0.0).view(torch.int32)  # −0.0 is 0.0
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    threshold: Tensor = _threshold(keys, weight, limit, weights_above)[:, None]
    above = torch.where(keys > threshold, weight, 0).sum(dim=-1, keepdim=True)
    tied = keys == threshold
    each = torch.where(tied, weight, 0).amax(dim=-1, keepdim=True)
    earlier = tied.cumsum(dim=-1, dtype=torch.int32) - 1
    return (keys > threshold) | (tied & (above + earlier * each < limit[:, None]))


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]  # unrolled it takes minutes
def _threshold(keys: Tensor, weight: Tensor, limit: Tensor, weights_above: WeightsAbove) -> Tensor:
    """The least key of each line above which the weight is below its limit; [S] int32."""
    low = torch.full((len(keys),), -(1 << 31), dtype=torch.int64, device=keys.device)
    for shift in range(32 - DIGIT, -1, -DIGIT):
        above = weights_above(keys, weight, low, 1 << shift)
        low = low + ((above >= limit).sum(dim=0) << shift)
    return low.int()


def compiled_draw(backend: str = "inductor") -> Draw:
    """`draw` in few kernels."""
    weights_above = torch.compile(_weights_above, dynamic=True, backend=backend)  # one pass over memory
    return partial(torch.compile(draw, dynamic=True, backend=backend), weights_above=weights_above)


def _share(top_p: Tensor, mass: Tensor) -> Tensor:
    """The limit that is top_p of the whole mass; none where top_p is 1."""
    return torch.where(top_p < 1, (top_p * mass.sum(dim=-1)).clamp(min=TINY), torch.inf)

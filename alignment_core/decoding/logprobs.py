"""What the policies make of the tokens that were drawn: log-probabilities, alternatives, traces."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from linalign.alignment_core.decoding.alignment import principled_logits
from linalign.alignment_core.decoding.edits import edit
from linalign.alignment_core.decoding.sampling import Settings, candidates, mixing_of, plan
from linalign.alignment_core.output import IMPOSSIBLE, TokenLogprob, Trace
from linalign.alignment_core.scheduling.sequence import Sequence
from linalign.alignment_core.transfer import to_device, to_host


@dataclass(frozen=True, slots=True)
class Opinions:
    """What policies make of S tokens. drawn: their log-probabilities, [S] float32. top_ids, top: the best tokens and
    theirs, [S, most] int64 and float32, −inf where there are no more.
    """

    drawn: Tensor
    top_ids: Tensor
    top: Tensor

    @classmethod
    def none(cls, num_tokens: int, most: int, device: torch.device) -> "Opinions":
        ids = torch.zeros(num_tokens, most, dtype=torch.int64, device=device)
        return cls(torch.zeros(num_tokens, device=device), ids, torch.zeros(ids.shape, device=device))

    def put(self, index: Tensor, z: Tensor, drawn: Tensor, ids: Tensor | None = None) -> None:
        """Fill in the lines `index`. z: [N, K] float32, log-probabilities of the tokens `ids`, [N, K], or of all;
        drawn: [N] int64.
        """
        most = self.top.shape[1]
        place = z.topk(min(most, z.shape[1])).indices.sort().values  # ties in order of token id
        top, order = z.gather(1, place).sort(descending=True, stable=True)
        place = place.gather(1, order)
        if ids is None:
            self.drawn[index] = z.gather(1, drawn[:, None]).squeeze(1)
        else:
            self.drawn[index] = torch.where(ids == drawn[:, None], z, -torch.inf).amax(dim=-1)
            place = ids.gather(1, place)
        missing = (0, most - top.shape[1])
        self.top_ids[index], self.top[index] = pad(place, missing), pad(top, missing, value=-torch.inf)

    def to_host(self) -> "Opinions":
        return Opinions(to_host(self.drawn), to_host(self.top_ids), to_host(self.top))

    def reports(self, tokens: Seq[int], wanted: Seq[int]) -> list[TokenLogprob]:
        """On the host. wanted: how many of the best for each."""
        reports = []
        for token, most, drawn, *best in zip(
            tokens, wanted, self.drawn.tolist(), self.top_ids.tolist(), self.top.tolist(), strict=True
        ):
            top = [(id, value) for id, value in zip(*best, strict=True) if value > -torch.inf]
            reports.append(TokenLogprob(token, drawn, tuple(top[:most])))
        return reports


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of the S tokens that a step drew.

    wanted: how many alternatives each of them is to have, None for no report at all; traced: which are to have a
    trace. drawn_from: by the policies that they were drawn from; principled, base: by those. num_plausible: [S]
    int64; kl: [S] float32. A line that nobody wants is 0.
    """

    wanted: Seq[int | None]
    traced: Seq[bool]
    drawn_from: Opinions
    principled: Opinions
    base: Opinions
    num_plausible: Tensor
    kl: Tensor

    def to_host(self) -> "Logprobs":
        names = ("drawn_from", "principled", "base")
        opinions = {name: getattr(self, name).to_host() for name in names}
        return replace(self, **opinions, num_plausible=to_host(self.num_plausible), kl=to_host(self.kl))

    def reports(self, tokens: Seq[int]) -> list[tuple[TokenLogprob, ...]]:
        """One for each of `tokens`, on the host, empty where nobody wants it."""
        most = [n or 0 for n in self.wanted]
        found = self.drawn_from.reports(tokens, most)
        if any(self.traced):
            policies = (self.principled.reports(tokens, most), self.base.reports(tokens, most))
            traces = zip(*policies, self.num_plausible.tolist(), self.kl.tolist(), strict=True)
            found = [
                replace(report, trace=Trace(*trace)) if is_traced else report
                for report, is_traced, trace in zip(found, self.traced, traces, strict=True)
            ]
        return [() if n is None else (report,) for n, report in zip(self.wanted, found, strict=True)]


def log_probabilities(logits: Tensor, sequences: Seq[Sequence], positions: Seq[int], tokens: Tensor) -> Logprobs | None:
    """How probable drawn tokens were: under the aligned policy, softmax of z at temperature 1 on the plausible
    set, or, without alignment, under the model itself. None if nobody wants to know.

    logits, sequences, positions: as for `sample`; tokens: [S] int64, what it drew. Of NO_TOKEN nothing is to be had.
    """
    tokens = tokens.clamp(min=0)
    wanted = [sequence.params.num_reported for sequence in sequences]
    if all(n is None for n in wanted):
        return None
    traced = [sequence.params.trace and sequence.prompt.base is not None for sequence in sequences]
    device, most = logits.device, max(n for n in wanted if n is not None)
    drawn_from, principled, base = (Opinions.none(len(sequences), most, device) for _ in range(3))
    num_plausible = torch.zeros(len(sequences), dtype=torch.int64, device=device)
    kl = torch.zeros(len(sequences), device=device)
    unturned = plan(sequences, may_turn=False).to(device)

    def on_device(lines: list[int]) -> Tensor:
        return to_device(torch.tensor(lines), device)

    def reported(is_aligned: bool) -> list[int]:
        return [
            line
            for line, (n, sequence) in enumerate(zip(wanted, sequences, strict=True))
            if n is not None and (sequence.prompt.base is not None) == is_aligned
        ]

    if lines := reported(is_aligned=False):
        index = on_device(lines)
        drawn_from.put(index, principled_logits(logits, unturned[index]).log_softmax(dim=-1), tokens[index])
    if lines := reported(is_aligned=True):
        index = on_device(lines)
        mixing = mixing_of(logits, sequences, positions)[index]
        settings = Settings.of([sequences[i] for i in lines], [positions[i] for i in lines])
        y = principled_logits(logits, mixing)
        edit(y, [sequences[i] for i in lines], [positions[i] for i in lines])
        for some, ids, z in candidates(logits, y, mixing, settings):
            z = z.log_softmax(dim=-1)
            drawn_from.put(index[some], z, tokens[index[some]], ids)
            if any(traced):
                of_base = logits[mixing.base[some]].log_softmax(dim=-1).gather(1, ids).clamp(min=IMPOSSIBLE)
                possible = z > -torch.inf
                num_plausible[index[some]] = possible.sum(dim=-1)
                kl[index[some]] = torch.where(possible, z.exp() * (z - of_base), 0).sum(dim=-1)
    if any(traced):
        index = on_device([line for line, is_one in enumerate(traced) if is_one])
        principled.put(index, principled_logits(logits, unturned[index]).log_softmax(dim=-1), tokens[index])
        base.put(index, logits[unturned.base[index]].log_softmax(dim=-1), tokens[index])
    return Logprobs(wanted, traced, drawn_from, principled, base, num_plausible, kl)

"""Log-probabilities of drawn tokens, their alternatives, and traces of the policies behind them."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from linalign.alignment_core.decoding.alignment import principled_logits
from linalign.alignment_core.decoding.draw_settings import mixing_of
from linalign.alignment_core.decoding.policy import Policy
from linalign.alignment_core.output import IMPOSSIBLE, TokenLogprob, Trace
from linalign.alignment_core.transfer import to_device, to_host


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities that one policy gives to N tokens and to its best tokens.

    drawn: [N] float32. top_ids, top: [N, num_top] int64 and float32, −inf where there are fewer.
    """

    drawn: Tensor
    top_ids: Tensor
    top: Tensor

    @classmethod
    def zeros(cls, num_tokens: int, num_top: int, device: torch.device) -> "TokenScores":
        ids = torch.zeros(num_tokens, num_top, dtype=torch.int64, device=device)
        return cls(torch.zeros(num_tokens, device=device), ids, torch.zeros(ids.shape, device=device))

    def put(self, index: Tensor, z: Tensor, drawn: Tensor, ids: Tensor | None = None) -> None:
        """Fill in the lines `index`.

        z: [N, K] float32, log-probabilities of the tokens `ids`, [N, K], or of all tokens. drawn: [N] int64.
        """
        num_top = self.top.shape[1]
        place = z.topk(min(num_top, z.shape[1])).indices.sort().values  # ties in order of token id
        top, order = z.gather(1, place).sort(descending=True, stable=True)
        place = place.gather(1, order)
        if ids is None:
            self.drawn[index] = z.gather(1, drawn[:, None]).squeeze(1)
        else:
            self.drawn[index] = torch.where(ids == drawn[:, None], z, -torch.inf).amax(dim=-1)
            place = ids.gather(1, place)
        missing = (0, num_top - top.shape[1])
        self.top_ids[index], self.top[index] = pad(place, missing), pad(top, missing, value=-torch.inf)

    def to_host(self) -> "TokenScores":
        return TokenScores(to_host(self.drawn), to_host(self.top_ids), to_host(self.top))

    def reports(self, tokens: Seq[int], num_alternatives: Seq[int]) -> list[TokenLogprob]:
        """One report for each of N tokens, on the host."""
        reports = []
        for token, num_top, drawn, *best in zip(
            tokens, num_alternatives, self.drawn.tolist(), self.top_ids.tolist(), self.top.tolist(), strict=True
        ):
            top = [(id, value) for id, value in zip(*best, strict=True) if value > -torch.inf]
            reports.append(TokenLogprob(token, drawn, tuple(top[:num_top])))
        return reports


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of N of the tokens that a step drew.

    lines: their numbers among the step's tokens. num_alternatives: of each. traced: which of them have a trace.
    drawn_from: scores of the policies that they were drawn from. principled, base: scores of those policies, for traced
    tokens. num_plausible: [N] int64; kl: [N] float32.
    """

    lines: Seq[int]
    num_alternatives: Seq[int]
    traced: Seq[bool]
    drawn_from: TokenScores
    principled: TokenScores
    base: TokenScores
    num_plausible: Tensor
    kl: Tensor

    def to_host(self) -> "Logprobs":
        names = ("drawn_from", "principled", "base")
        scores = {name: getattr(self, name).to_host() for name in names}
        return replace(self, **scores, num_plausible=to_host(self.num_plausible), kl=to_host(self.kl))

    def reports(self, tokens: Seq[int]) -> Iterator[tuple[int, TokenLogprob]]:
        """Each line with its report, on the host. tokens: all tokens of the step."""
        drawn = [tokens[line] for line in self.lines]
        reports = self.drawn_from.reports(drawn, self.num_alternatives)
        if any(self.traced):
            policies = [policy.reports(drawn, self.num_alternatives) for policy in (self.principled, self.base)]
            traces = zip(*policies, self.num_plausible.tolist(), self.kl.tolist(), strict=True)
            reports = [
                replace(report, trace=Trace(*trace)) if is_traced else report
                for report, is_traced, trace in zip(reports, self.traced, traces, strict=True)
            ]
        return zip(self.lines, reports, strict=True)


def log_probabilities(policy: Policy, tokens: Tensor, lines: Seq[int]) -> list[Logprobs]:
    """How probable drawn tokens were: under the aligned policy, softmax of z at temperature 1 on the plausible
    set, or, without alignment, under the model itself. One object, or none if no request needs it.

    tokens: [S] int64, what was drawn from the S lines of the policy. NO_TOKEN gets some number. lines: the numbers of
    the S lines among the step's tokens.
    """
    sequences = [sequence for sequence, _ in policy.next_tokens]
    reported = [line for line, sequence in enumerate(sequences) if sequence.params.num_reported is not None]
    if not reported:
        return []
    num_alternatives = [sequences[line].params.num_reported or 0 for line in reported]
    aligned = [sequences[line].prompt.base is not None for line in reported]
    traced = [sequences[line].params.trace and is_aligned for line, is_aligned in zip(reported, aligned, strict=True)]
    device = policy.logits.device
    drawn_from, principled, base = (TokenScores.zeros(len(reported), max(num_alternatives), device) for _ in range(3))
    logprobs = Logprobs(
        lines=[lines[line] for line in reported],
        num_alternatives=num_alternatives,
        traced=traced,
        drawn_from=drawn_from,
        principled=principled,
        base=base,
        num_plausible=torch.zeros(len(reported), dtype=torch.int64, device=device),
        kl=torch.zeros(len(reported), device=device),
    )
    tokens = tokens.clamp(min=0)[to_device(torch.tensor(reported), device)]
    _put_models(logprobs, policy, tokens, reported, aligned)
    aligned_lines = [line for line, is_aligned in zip(reported, aligned, strict=True) if is_aligned]
    _put_aligned(logprobs, policy, tokens, aligned_lines, reported)
    return [logprobs]


def _put_models(logprobs: Logprobs, policy: Policy, tokens: Tensor, reported: Seq[int], aligned: Seq[bool]) -> None:
    """The model's own policies: of plain lines, and, for traces, of the branches of aligned lines."""
    logits = policy.logits
    unaligned = [place for place, is_one in enumerate(aligned) if not is_one]
    traced = [place for place, is_one in enumerate(logprobs.traced) if is_one]
    if not (unaligned or traced):
        return
    prompts = [sequence.prompt for sequence, _ in policy.next_tokens]
    mixing = mixing_of(prompts, may_start_from_base=False)[torch.tensor(reported)].to(logits.device)
    for places, scores in ((unaligned, logprobs.drawn_from), (traced, logprobs.principled)):
        if places:
            index = to_device(torch.tensor(places), logits.device)
            scores.put(index, principled_logits(logits, mixing[index]).log_softmax(dim=-1), tokens[index])
    if traced:
        logprobs.base.put(index, logits[mixing.base[index]].log_softmax(dim=-1), tokens[index])


def _put_aligned(logprobs: Logprobs, policy: Policy, tokens: Tensor, aligned: Seq[int], reported: Seq[int]) -> None:
    """The aligned policies. aligned: lines of the policy. reported: the line of each of the N tokens."""
    place_of = {line: place for place, line in enumerate(reported)}
    wanted, device = set(aligned), policy.logits.device
    for group in policy.candidates if aligned else ():
        lines = group.lines(len(policy.next_tokens))
        kept = [i for i, line in enumerate(lines) if line in wanted]
        if not kept:
            continue
        of_group = to_device(torch.tensor(kept), device)
        index = to_device(torch.tensor([place_of[lines[i]] for i in kept]), device)
        ids, z = group.token_ids[of_group], group.z[of_group].log_softmax(dim=-1)
        logprobs.drawn_from.put(index, z, tokens[index], ids)
        if any(logprobs.traced):
            rows = policy.settings.mixing.base[to_device(torch.tensor([lines[i] for i in kept]), device)]
            of_base = policy.logits[rows].log_softmax(dim=-1).gather(1, ids).clamp(min=IMPOSSIBLE)
            possible = z > -torch.inf
            logprobs.num_plausible[index] = possible.sum(dim=-1)
            logprobs.kl[index] = torch.where(possible, z.exp() * (z - of_base), 0).sum(dim=-1)

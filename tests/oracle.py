"""The judge: DESIGN section 2, naive and in float64, over full-context calls without any cache.

Shares no code with the engine.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

NEAR_TIE = 1e-4  # closer than this, the two best logits may swap in float32


@dataclass(frozen=True)
class Setting:
    ratios: tuple[float, ...] = (0.0,)
    weights: tuple[float, ...] = (1.0,)
    temperature: float = 0.0
    top_p: float = 0.8
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    allowed: Callable[[list[int]], Iterable[int]] | None = None  # the tokens that may follow a reply


class Oracle:
    """model: a transformers causal LM in float64 with its own attention."""

    def __init__(self, model):
        assert model.dtype == torch.float64
        self.model = model

    @torch.no_grad()
    def logits(self, ids):
        """[len(ids), V]: one full-context call."""
        return self.model(torch.tensor([ids]), use_cache=False).logits[0].double()

    def edited(self, z_p, prompt, output, setting):
        """y of one position."""
        y = z_p.clone()
        for token in {token for ids in prompt.principled for token in ids} | set(output):
            y[token] = y[token] / setting.repetition if y[token] > 0 else y[token] * setting.repetition
        for token in set(output):
            y[token] -= setting.presence + setting.frequency * output.count(token)
        for token, bias in setting.bias:
            y[token] += bias
        if len(output) < setting.min_tokens:
            y[list(setting.stop_ids)] = -torch.inf
        if setting.allowed is not None:
            forbidden = torch.ones(len(y), dtype=torch.bool)
            forbidden[list(setting.allowed(output))] = False
            y[forbidden] = -torch.inf
        return y

    def aligned(self, principled, base, prompt, output, setting):
        """z of one position, −inf outside the plausible set. principled: k logit vectors; base: one or None."""
        z_p = sum(w * z for w, z in zip(setting.weights, principled, strict=True))
        y = self.edited(z_p, prompt, output, setting)
        if base is None:
            return y
        d = sum(w * r * (z - base) for w, r, z in zip(setting.weights, setting.ratios, principled, strict=True))
        probabilities = torch.softmax(y / max(setting.temperature, 0.5), dim=-1)
        order = torch.argsort(probabilities, descending=True, stable=True)
        before = torch.cumsum(probabilities[order], 0) - probabilities[order]
        plausible = order[(before < setting.top_p) | (torch.arange(len(order)) == 0)]
        z = torch.full_like(y, -torch.inf)
        z[plausible] = (y + d)[plausible]
        return z

    def next_logits(self, prompt, output, setting):
        """z after `output`: two separate full-context calls (k + 1 with k principles)."""
        principled = [self.logits([*ids, *output])[-1] for ids in prompt.principled]
        base = None if prompt.base is None else self.logits([*prompt.base, *output])[-1]
        return self.aligned(principled, base, prompt, list(output), setting)

    def greedy(self, prompt, setting, max_tokens, stop_ids=frozenset()):
        """Token by token."""
        output = []
        while len(output) < max_tokens and not (output and output[-1] in stop_ids):
            output.append(int(self.next_logits(prompt, output, setting).argmax()))
        return output

    def check_greedy(self, prompt, setting, output):
        """Number of near ties at which `output` took the runner-up; fails at any other difference.

        By causality one full-context call a branch has the logits of every position, so this judges
        the very tokens that `greedy` would, given each prefix of `output`.
        """
        principled = [self.logits([*ids, *output[:-1]])[len(ids) - 1 :] for ids in prompt.principled]
        base = None if prompt.base is None else self.logits([*prompt.base, *output[:-1]])[len(prompt.base) - 1 :]
        ties = 0
        for position, token in enumerate(output):
            rows = [z[position] for z in principled], None if base is None else base[position]
            z = self.aligned(*rows, prompt, output[:position], setting)
            best = z.topk(2)
            if token != int(best.indices[0]):
                gap = float(best.values[0] - z[token])
                assert gap < NEAR_TIE, f"position {position}: took {token}, {gap} below {int(best.indices[0])}"
                ties += 1
        return ties

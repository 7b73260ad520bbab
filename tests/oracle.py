"""The judge: docs/design.md, section 2, naive and in float64, over full-context calls without any cache.

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
    top_p: float = 0.99
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    allowed: Callable[[list[int]], Iterable[int]] | None = None  # the tokens that may follow a reply
    method: str = "linear"
    scale: float = 50.0  # of "adaptive"


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

    def aligned(self, rows, prompt, output, setting, before=None):
        """z of one position, −inf outside the plausible set.

        rows: (k principled logit vectors, that of the base or None); before: those of the position before, if any.
        """
        principled, base = rows
        start = sum(w * z for w, z in zip(setting.weights, principled, strict=True))
        if base is None:
            return self.edited(start, prompt, output, setting)
        z = mixed(rows, before, setting)
        if away(setting):
            start = base
        y = self.edited(start, prompt, output, setting)
        z = z + (y - start)
        if setting.top_p < 1:
            probabilities = torch.softmax(y / max(setting.temperature, 0.5), dim=-1)
            order = torch.argsort(probabilities, descending=True, stable=True)
            before = torch.cumsum(probabilities[order], 0) - probabilities[order]
            outside = order[(before >= setting.top_p) & (torch.arange(len(order)) > 0)]
            z[outside] = -torch.inf
        return z

    def next_logits(self, prompt, output, setting):
        """z after `output`: two separate full-context calls (k + 1 with k principles)."""
        before = self._rows(prompt, output[:-1]) if output and setting.method == "opad" else None
        return self.aligned(self._rows(prompt, output), prompt, list(output), setting, before)

    def _rows(self, prompt, output):
        principled = [self.logits([*ids, *output])[-1] for ids in prompt.principled]
        return principled, None if prompt.base is None else self.logits([*prompt.base, *output])[-1]

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
        ties, before = 0, None
        for position, token in enumerate(output):
            rows = [z[position] for z in principled], None if base is None else base[position]
            z = self.aligned(rows, prompt, output[:position], setting, before)
            before = rows
            best = z.topk(2)
            if token != int(best.indices[0]):
                gap = float(best.values[0] - z[token])
                assert gap < NEAR_TIE, f"position {position}: took {token}, {gap} below {int(best.indices[0])}"
                ties += 1
        return ties


def mixed(rows, before, setting):
    """What a method makes of one position's logits, by its paper's own formula: docs/methods.md."""
    contexts, base = [torch.log_softmax(z, dim=-1) for z in rows[0]], torch.log_softmax(rows[1], dim=-1)
    weights, ratios = setting.weights, setting.ratios
    each = list(zip(weights, ratios, contexts, strict=True))
    mean = sum(w * c for w, _, c in each)
    if setting.method == "linear":
        return mean + sum(w * r * (c - base) for w, r, c in each)
    if setting.method == "cfg":
        return base + sum(w * (1 + r) * (c - base) for w, r, c in each)
    if setting.method == "context_steering":
        if len(each) == 1:
            return contexts[0] + ratios[0] * (contexts[0] - base)
        return base + sum(r * (c - base) for _, r, c in each)
    if setting.method == "amulet":
        return sum(w * amulet_game(c, base, r) for w, r, c in each)
    if setting.method == "adaptive":
        p, q = torch.softmax(sum(w * z for w, z in zip(weights, rows[0], strict=True)), dim=-1), base.exp()
        m = (p + q) / 2
        divergence = float((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
        return mean + sum(w * min(r, setting.scale * divergence) * (c - base) for w, r, c in each)
    assert setting.method == "opad"
    if before is None:
        return mean
    of_before = [torch.log_softmax(z, dim=-1) for z in before[0]], torch.log_softmax(before[1], dim=-1)
    energy = sum(
        w * r * (c - base + c_before - of_before[1]) for (w, r, c), c_before in zip(each, of_before[0], strict=True)
    )
    return mean + energy


def amulet_game(context, base, alpha, player_lambda=2.0, eta=10.0, iterations=60):
    """Amulet's loop over one token's policy, step by step: utilities, regularised leader, normalise."""
    start = policy = context
    utilities = torch.zeros_like(context)
    for step in range(1, iterations + 1):
        utilities = utilities + alpha * (policy - base)
        leader = player_lambda * start + utilities / step + policy / (eta * step)
        policy = torch.log_softmax(leader / (player_lambda + 1 / (eta * step)), dim=-1)
    return policy


def away(setting):
    """Whether the total weight of the principled policies in the mix is below 0."""
    if setting.method == "context_steering":
        return (1 + setting.ratios[0] if len(setting.ratios) == 1 else sum(setting.ratios)) < 0
    if setting.method == "amulet":
        return False  # its weight tends to λ / (λ − α), which is positive for every α < 0
    return sum(w * (1 + r) for w, r in zip(setting.weights, setting.ratios, strict=True)) < 0

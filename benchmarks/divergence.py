"""Effect of weight rounding on the policies: KL divergence per token from float32, in nats.

    python benchmarks/divergence.py [MODEL] [--tokens 48]

Replies are drawn greedily at ratio 2 with unrounded weights. Then every other setting is forced to the
same tokens, so that all settings see the same contexts. "mixed" is softmax(z_p + r·(z_p − z_b)) over the
whole vocabulary, where the ratio amplifies rounding errors. "same token" is the share of positions at
which the aligned greedy choice (with the plausible set) stays the same.
"""

import argparse
import json
from collections.abc import Sequence as Seq

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from linalign import Engine, EngineConfig, Principle, SamplingParams, load
from linalign.alignment_core.decoding.sampler import Drawn, Sampler
from linalign.alignment_core.loading.loader import Quantization
from linalign.alignment_core.scheduling.sequence import NextToken

RATIO = 2.0
SETTINGS: tuple[tuple[str, Quantization], ...] = (
    ("float32", "auto"),
    ("float32", "int8"),
    ("float32", "int4"),
    ("bfloat16", "auto"),
)
QUESTIONS = (
    "How do I get to work?",
    "What shall I cook tonight?",
    "Explain why the sky is blue.",
    "Write a short letter to my landlord about the heating.",
    "What is the capital of Australia, and how large is it?",
    "Tell me a story about a lighthouse.",
    "How does a bicycle stay upright?",
    "Give me three tips for learning to play the piano.",
)
PRINCIPLES = ("Answer as a patient primary-school teacher.", "Favour whatever is good for the environment.")


class Recorder(Sampler):
    """Records logits and choices. forced: Tokens of an earlier run to return instead of the choices, or None."""

    def __init__(self, forced: list[int] | None) -> None:
        self.forced = forced
        self.logits: list[Tensor] = []
        self.chosen: list[int] = []

    def draw(self, logits: Tensor, next_tokens: Seq[NextToken]) -> Drawn:
        chosen = super().draw(logits, next_tokens).tokens
        self.logits.append(logits.clone())
        self.chosen += chosen.tolist()
        return Drawn(chosen if self.forced is None else torch.tensor([self.forced[len(self.logits) - 1]]), [])


def record(
    name: str | None, dtype: str, quantization: Quantization, num_tokens: int, forced: list[int] | None
) -> Recorder:
    loaded = load(name, dtype=dtype, quantization=quantization, device="cpu")
    engine = Engine(loaded, EngineConfig(max_model_len=min(2048, loaded.max_model_len)))
    recorder = Recorder(forced)
    engine.loop.sampler = recorder
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for question in QUESTIONS:
        for principle in PRINCIPLES:
            prompt = engine.prompts.build([{"role": "user", "content": question}], [Principle(principle, ratio=RATIO)])
            engine.submit(prompt, params, lambda _: None)
            while engine.step():
                pass
    return recorder


def policies(logits: Tensor) -> dict[str, Tensor]:
    principled, base = logits.double()
    rows = {"principled": principled, "base": base, "mixed": principled + RATIO * (principled - base)}
    return {name: row.log_softmax(-1) for name, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    exact = record(args.model, "float32", "none", args.tokens, None)
    for dtype, quantization in SETTINGS:
        other = record(args.model, dtype, quantization, args.tokens, exact.chosen)
        pairs = [(policies(a), policies(b)) for a, b in zip(exact.logits, other.logits, strict=True)]
        means = {
            name: sum(float(kl_div(b[name], a[name], reduction="sum", log_target=True)) for a, b in pairs) / len(pairs)
            for name in pairs[0][0]
        }
        same = sum(a == b for a, b in zip(exact.chosen, other.chosen, strict=True)) / len(pairs)
        row = {"dtype": dtype, "quantization": quantization, "tokens": len(pairs), **means, "same token": same}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

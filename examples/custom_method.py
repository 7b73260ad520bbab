"""A custom alignment method: a function that computes the branches' coefficients from weights and ratios.

The reply is drawn from z = Σ w_i z_i + Σ c_i (z_i − z_b). A method computes the c_i (docs/methods.md).
"""

import math
import queue
from collections.abc import Sequence

from linalign import METHODS, Engine, MethodRule, Output, Principle, SamplingParams


def saturating(weights: Sequence[float], ratios: Sequence[float]) -> tuple[float, ...]:
    """The ratio for small ratios, and at most 3."""
    return tuple(weight * 3 * math.tanh(ratio / 3) for weight, ratio in zip(weights, ratios, strict=True))


METHODS["saturating"] = MethodRule(saturating, top_p=0.99)

messages = [{"role": "user", "content": "How do I get to work?"}]
params = SamplingParams(temperature=0, max_tokens=48)

with Engine.load() as engine:
    for ratio in (0.5, 2, 20):
        prompt = engine.prompts.build(messages, [Principle("Encourage cycling.", ratio=ratio)], method="saturating")
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        engine.submit(prompt, params, outputs.put)
        text = ""
        while not (output := outputs.get()).finish_reason:
            text += output.text
        print(f"ratio {ratio}, coefficient {prompt.coefficients[0]:.2f}: {text + output.text}")

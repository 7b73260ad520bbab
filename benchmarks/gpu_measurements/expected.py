"""Writes expected.json: what the float64 oracle says, on a CPU, beforehand, so that no second of a GPU is spent on it.

    PYTHONPATH=.:benchmarks python -m gpu_measurements.expected

Some minutes. For float32 it takes prompts whose replies are decided everywhere: the best token is more than
CLEAR ahead of the second. Elsewhere a reply may differ though nothing is wrong.
"""

import copy
import json
import sys
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gpu_measurements import features, precision
from gpu_measurements.bench import GREEDY, RATIO, SMALL, exact_model, finish, start
from gpu_measurements.features import FEATURES, Feature
from gpu_measurements.rounding import rounded
from gpu_measurements.smoke import EXPECTED, tokens
from linalign import Engine, EngineConfig, Prompt
from linalign.alignment_core.loading.loader import LoadedModel
from tests.oracle import Oracle, Setting

CPU = torch.device("cpu")
CLEAR = 2e-3  # of a logit, beside which rounding to float32 is small


def oracle_of(loaded: LoadedModel) -> Oracle:
    """To be made before the engine, which changes its model."""
    config = copy.deepcopy(loaded.model.config)
    judge = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    judge.load_state_dict({name: tensor.double() for name, tensor in loaded.model.state_dict().items()})
    return Oracle(judge.eval())


def of_feature(feature: Feature) -> dict[str, Any]:
    loaded = exact_model(features.SHAPE, torch.float32, CPU, features.SCALE, features.SEED)
    oracle = oracle_of(loaded)
    if feature.setting.get("drawn"):  # one number a token, whatever draws it: a CPU's, which tests judge
        config = {"num_pages": 400, "max_num_seqs": 8, "num_speculative_tokens": 0}
        return {"tokens": tokens(Engine(loaded, EngineConfig(**config)), feature)}
    setting = dict(feature.setting)
    if allowed := feature.setting.get("allowed"):
        setting["allowed"] = lambda output: allowed[tuple(output)]
    replies = [
        greedy(oracle, prompt, Setting(prompt.ratios, prompt.weights, **setting), params.max_tokens, allowed)
        for prompt, params in feature.requests
    ]
    found: dict[str, Any] = {"tokens": replies}
    if feature.tolerance is not None:
        found["logprobs"] = logprobs(oracle, feature, replies)
    if quantization := feature.model.get("quantization"):
        judge = rounded(oracle.model, oracle.model.get_output_embeddings(), quantization)
        found["logprobs of rounded weights"] = logprobs(Oracle(judge), feature, replies)
    return found


def logprobs(oracle: Oracle, feature: Feature, replies: list[list[int]]) -> list[list[float]]:
    """Of the tokens of each reply to a plain prompt."""
    found = []
    for (prompt, _), reply in zip(feature.requests, replies, strict=True):
        ids = prompt.principled[0]
        lines = oracle.logits([*ids, *reply[:-1]]).log_softmax(-1)[len(ids) - 1 :]
        found.append([float(line[token]) for line, token in zip(lines, reply, strict=True)])
    return found


def greedy(
    oracle: Oracle, prompt: Prompt, setting: Setting, max_tokens: int, allowed: dict[tuple[int, ...], Any] | None
) -> list[int]:
    """allowed: what may follow each reply in a structure, which ends with one that is not there.

    Raises AssertionError where the best token is not clearly the best.
    """
    reply: list[int] = []
    while len(reply) < max_tokens and (allowed is None or tuple(reply) in allowed):
        best = oracle.next_logits(prompt, reply, setting).topk(2)
        assert best.values[0] - best.values[1] > CLEAR, f"{reply} could go on with {best.indices.tolist()}"
        reply.append(int(best.indices[0]))
    return reply


def of_float32() -> dict[str, Any]:
    """By one pass over each reply of our engine: where it takes the oracle's best token everywhere, it is the oracle's
    greedy reply.
    """
    loaded = exact_model(SMALL, torch.float32, CPU, precision.SCALE, precision.SEED)
    weights, oracle = precision.checksum(loaded), oracle_of(loaded)
    engine = Engine(loaded, EngineConfig(max_num_seqs=8, num_pages=400, num_speculative_tokens=0))
    replies: list[dict[str, Any]] = []
    number = 0
    while len(replies) < precision.NUM_PROMPTS:
        batch = range(number, number + 4)
        number += len(batch)
        prompts = [precision.judged_prompt(n) for n in batch]
        outputs = start(engine, prompts, replace(GREEDY, max_tokens=precision.REPLY))
        finish(engine)
        for n, prompt, output in zip(batch, prompts, outputs, strict=True):
            gap = least_gap(oracle, prompt, output)
            print(n, gap, file=sys.stderr)
            if gap > CLEAR and len(replies) < precision.NUM_PROMPTS:
                replies.append({"prompt": n, "tokens": output})
    return {"weights": weights, "replies": replies}


def least_gap(oracle: Oracle, prompt: Prompt, output: list[int]) -> float:
    """Between the reply's token and the best other one, over all positions; negative where another one is better."""
    (ids,), base = prompt.principled, prompt.base
    assert base is not None
    principled = oracle.logits([*ids, *output[:-1]])[len(ids) - 1 :]
    unprincipled = oracle.logits([*base, *output[:-1]])[len(base) - 1 :]
    gaps = []
    for position, token in enumerate(output):
        rows = [principled[position]], unprincipled[position]
        z = oracle.aligned(rows, prompt, output[:position], Setting((RATIO,)))
        taken = float(z[token])
        z[token] = -torch.inf
        gaps.append(taken - float(z.max()))
    return min(gaps)


def main() -> None:
    found = {"features": {name: of_feature(feature) for name, feature in FEATURES.items()}, "float32": of_float32()}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found["features"].items()]
    replies = ",\n".join(map(json.dumps, found["float32"]["replies"]))
    EXPECTED.write_text(
        '{"features": {\n' + ",\n".join(lines) + '\n},\n"float32": {"weights": '
        f'"{found["float32"]["weights"]}", "replies": [\n{replies}\n]}}}}\n'
    )


if __name__ == "__main__":
    main()

"""Writes expected.json: results of the float64 oracle on a CPU, computed beforehand to save time on the GPU.

    PYTHONPATH=.:benchmarks python -m gpu_measurements.expected

Takes some minutes. For float32 it uses only prompts whose greedy replies are unambiguous: at every position the best
token is more than CLEAR ahead of the second. Other replies could differ by rounding alone.
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
CLEAR = 2e-3  # difference of logits; rounding to float32 changes them by much less


def oracle_of(loaded: LoadedModel) -> Oracle:
    """An oracle with the model's weights. Create it before the engine, which changes the model."""
    config = copy.deepcopy(loaded.model.config)
    judge = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    judge.load_state_dict({name: tensor.double() for name, tensor in loaded.model.state_dict().items()})
    return Oracle(judge.eval())


def of_feature(feature: Feature) -> dict[str, Any]:
    loaded = exact_model(features.SHAPE, torch.float32, CPU, features.SCALE, features.SEED)
    oracle = oracle_of(loaded)
    if feature.setting.get("drawn"):  # draws do not depend on the device: use the CPU engine, which tests check
        config = {"num_pages": 400, "max_num_seqs": 8, "num_speculative_tokens": 0}
        return {"tokens": tokens(Engine(loaded, EngineConfig(**config)), feature)}
    setting = dict(feature.setting)
    if allowed := feature.setting.get("allowed"):
        setting["allowed"] = lambda output: allowed[tuple(output)]
    replies = [
        greedy(oracle, prompt, Setting(prompt.ratios, prompt.weights, **setting), params.max_tokens, allowed)
        for prompt, params in feature.requests
    ]
    result: dict[str, Any] = {"tokens": replies}
    if feature.tolerance is not None:
        result["logprobs"] = logprobs(oracle, feature, replies)
    if quantization := feature.model.get("quantization"):
        judge = rounded(oracle.model, oracle.model.get_output_embeddings(), quantization)
        result["logprobs of rounded weights"] = logprobs(Oracle(judge), feature, replies)
    return result


def logprobs(oracle: Oracle, feature: Feature, replies: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of each reply's tokens, for plain prompts."""
    result = []
    for (prompt, _), reply in zip(feature.requests, replies, strict=True):
        ids = prompt.principled[0]
        lines = oracle.logits([*ids, *reply[:-1]]).log_softmax(-1)[len(ids) - 1 :]
        result.append([float(line[token]) for line, token in zip(lines, reply, strict=True)])
    return result


def greedy(
    oracle: Oracle, prompt: Prompt, setting: Setting, max_tokens: int, allowed: dict[tuple[int, ...], Any] | None
) -> list[int]:
    """The oracle's greedy reply.

    allowed: For each reply so far, the tokens that a structure allows next. A reply that is not a key ends.
    Raises AssertionError if the best token is not more than CLEAR ahead.
    """
    reply: list[int] = []
    while len(reply) < max_tokens and (allowed is None or tuple(reply) in allowed):
        best = oracle.next_logits(prompt, reply, setting).topk(2)
        assert best.values[0] - best.values[1] > CLEAR, f"{reply} could go on with {best.indices.tolist()}"
        reply.append(int(best.indices[0]))
    return reply


def of_float32() -> dict[str, Any]:
    """Replies of our engine that the oracle confirms with one pass each: a reply whose tokens are the oracle's best
    at every position is the oracle's greedy reply.
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
    """Least difference between the reply's token and the best other one, over all positions; negative if worse."""
    (ids,), base = prompt.principled, prompt.base
    assert base is not None
    principled = oracle.logits([*ids, *output[:-1]])[len(ids) - 1 :]
    unprincipled = oracle.logits([*base, *output[:-1]])[len(base) - 1 :]
    gaps = []
    for position, token in enumerate(output):
        rows = [principled[position]], unprincipled[position]
        z = oracle.aligned(rows, prompt, output[:position], Setting((RATIO,)))
        chosen = float(z[token])
        z[token] = -torch.inf
        gaps.append(chosen - float(z.max()))
    return min(gaps)


def main() -> None:
    result = {"features": {name: of_feature(feature) for name, feature in FEATURES.items()}, "float32": of_float32()}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result["features"].items()]
    replies = ",\n".join(map(json.dumps, result["float32"]["replies"]))
    EXPECTED.write_text(
        '{"features": {\n' + ",\n".join(lines) + '\n},\n"float32": {"weights": '
        f'"{result["float32"]["weights"]}", "replies": [\n{replies}\n]}}}}\n'
    )


if __name__ == "__main__":
    main()

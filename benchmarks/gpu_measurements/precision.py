"""How close the device is to the float64 oracle, and whether its results depend on the batch."""

import hashlib
import json
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import kl_div

from gpu_measurements.bench import GREEDY, RATIO, SMALL, Bench, exact_model, finish, random_model, start
from gpu_measurements.parts import without
from gpu_measurements.smoke import EXPECTED
from linalign import Engine, EngineConfig, Prompt
from linalign.alignment_core.decoding.sampler import Drawn
from linalign.alignment_core.loading.loader import LoadedModel

SEED, SCALE = 2, 0.1
REPLY = 64
NUM_PROMPTS = 24
CONFIG = EngineConfig(max_num_seqs=32, num_pages=2000, static=True, num_speculative_tokens=0)


def judged_prompt(number: int) -> Prompt:
    """A prompt for which expected.json may have the oracle's reply."""
    ids = tuple((37 * i * i + 101 * i + 977 * number) % 31_000 + 10 for i in range(50))
    return Prompt((ids[:5] + tuple(range(50, 60)) + ids[5:],), (1.0,), (RATIO,), ids)


def float32(bench: Bench) -> dict[str, Any]:
    """Number of greedy aligned float32 replies that differ from the oracle's, of 24 replies of 64 tokens."""
    expected = json.loads(EXPECTED.read_text())["float32"]
    chosen = expected["replies"] if bench.on_cuda else expected["replies"][:1]
    num_tokens = REPLY if bench.on_cuda else 8
    loaded = exact_model(SMALL, torch.float32, bench.device, SCALE, SEED)
    assert checksum(loaded) == expected["weights"], "the weights are not those that the oracle was asked about"
    with without("compile"):  # the feature "compiled" covers it, and it would take a minute
        engine = Engine(loaded, CONFIG)
    replies = start(engine, [judged_prompt(r["prompt"]) for r in chosen], replace(GREEDY, max_tokens=num_tokens))
    finish(engine)
    wrong = [
        {"prompt": r["prompt"], "expected": r["tokens"][:num_tokens], "got": tokens}
        for r, tokens in zip(chosen, replies, strict=True)
        if r["tokens"][:num_tokens] != tokens
    ]
    return {"float32 replies that differ": len(wrong), "float32 replies": len(chosen), "those that differ": wrong[:2]}


def checksum(loaded: LoadedModel) -> str:
    digest = hashlib.sha256()
    for parameter in loaded.model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def bfloat16(bench: Bench) -> dict[str, float]:
    """Mean KL of the bfloat16 engine from transformers' pass in float32, in nats per token of greedy replies."""
    expected = json.loads(EXPECTED.read_text())["float32"]["replies"][: 8 if bench.on_cuda else 1]
    exact = exact_model(SMALL, torch.float32, bench.device, SCALE, SEED)
    with without("compile"):
        engine = Engine(exact_model(SMALL, torch.bfloat16, bench.device, SCALE, SEED), CONFIG)
    divergences = []
    for reply in expected:
        prompt, tokens = judged_prompt(reply["prompt"]), reply["tokens"][: REPLY if bench.on_cuda else 4]
        wanted = log_probabilities(exact.model, prompt.principled[0], tokens)
        got = forced(engine, Prompt(prompt.principled), tokens)
        divergences.append(kl_div(got, wanted, log_target=True, reduction="none").sum(-1))
    return {"bfloat16 KL, nats": float(torch.cat(divergences).mean())}


@torch.inference_mode()
def log_probabilities(model: Any, prompt: tuple[int, ...], tokens: list[int]) -> torch.Tensor:
    """[tokens, V] log-probabilities at each token of a reply: one call without a cache, in torch's eager attention."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=model.device)
    return model(ids, use_cache=False).logits[0, len(prompt) - 1 :].float().log_softmax(-1)


def forced(engine: Engine, prompt: Prompt, tokens: list[int]) -> torch.Tensor:
    """[tokens, V] log-probabilities of the engine while it is forced to reply with `tokens`."""
    seen: list[torch.Tensor] = []
    sampler, wanted = engine.loop.sampler, iter(tokens)

    def spy(logits: torch.Tensor, *_: object) -> Drawn:
        seen.append(logits[:1].float().log_softmax(-1).clone())
        return Drawn(engine.runner.drawn[:1].fill_(next(wanted)), [])

    with mock.patch.object(sampler, "draw", spy):
        start(engine, [prompt], replace(GREEDY, max_tokens=len(tokens)))
        finish(engine)
    return torch.cat(seen)


def invariance(bench: Bench) -> dict[str, int]:
    """Number of tokens that differ between a greedy bfloat16 reply alone and in a batch, in batch-invariant mode."""
    shape = SMALL if bench.on_cuda else bench.shape.model
    replies = []
    for company in (0, 15 if bench.on_cuda else 2):
        loaded = random_model(shape, torch.bfloat16, bench.device, 0.06)
        with without("compile"):
            engine = Engine(loaded, replace(CONFIG, batch_invariant=True))
        prompts = [bench.prompt(i, True, shape["vocab_size"]) for i in range(1 + company)]
        replies.append(start(engine, prompts, replace(GREEDY, max_tokens=64 if bench.on_cuda else 8))[0])
        finish(engine)
    return {"tokens that differ in company": sum(a != b for a, b in zip(*replies, strict=True))}

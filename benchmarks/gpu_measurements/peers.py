"""Other software with the same model: transformers' generate with guidance, and its continuous batching."""

from typing import Any

import torch
from transformers import GenerationConfig

from gpu_measurements.bench import RATIO, Bench, NotHere


def guided_generate(bench: Bench) -> dict[str, float]:
    """Decode time per token of transformers' generate with classifier-free guidance: one request, greedy."""
    model = bench.loaded.model
    prompt, most = bench.prompt(0, True), min(bench.shape.reply, 32)
    ids, negative = (torch.tensor([x], device=bench.device) for x in (prompt.principled[0], prompt.base))
    model.set_attn_implementation("sdpa")

    def run(n: int) -> float:
        options = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n, "eos_token_id": None}
        guidance = {"guidance_scale": 1 + RATIO, "negative_prompt_ids": negative}
        return bench.timed(lambda: model.generate(ids, pad_token_id=0, **options, **guidance))

    run(2)
    per_token = (bench.median(lambda: run(most + 1)) - bench.median(lambda: run(1))) / most
    return {"generate with guidance, s a token": per_token}


def continuous_batching(bench: Bench) -> dict[str, float]:
    """transformers' continuous batching with both prompts of 64 aligned requests, as plain prompts."""
    if not bench.on_cuda:
        raise NotHere("transformers' continuous batching is for GPUs")
    model = bench.loaded.model
    model.set_attn_implementation("sdpa")
    inputs = [list(ids) for i in range(bench.shape.some) for ids in bench.prompt(i, True).branches]
    n = bench.shape.reply
    config = GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs: list[Any] = []

    def run() -> None:
        outputs.append(
            model.generate_batch(inputs, generation_config=config, progress_bar=False, persistent_manager=True)
        )

    run()  # warm-up: creates its cache and its graphs
    seconds = bench.timed(run)
    num_tokens = sum(len(output.generated_tokens) for output in outputs[-1].values())
    assert num_tokens == len(inputs) * n, f"{num_tokens} tokens instead of {len(inputs) * n}"
    return {"continuous batching, tokens/s": num_tokens / seconds}

"""The engine on this CPU compared with other software: interleaved in one run, medians and ratios.

    python benchmarks/cpu.py [--rounds 3] [--tokens 64] [--llama-python PYTHON] [--vllm-python PYTHON] [--output FILE]

In this process, in eager float32: transformers' generate, the reference loop of Linear Alignment (two
calls per token), and both passes stacked in one batch. With --llama-python (a Python that has
llama_cpp), llama.cpp runs the same GGUF (benchmarks/llama_rows.py). With --vllm-python (one that has
vLLM's CPU build), vLLM runs the same weights in bfloat16 (benchmarks/vllm_rows.py). Rates are decoded
tokens per second of all sequences together, without prefill.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from linalign import Engine, Principle, Prompt, SamplingParams, load
from linalign.alignment_core.cpu.kernels import library
from linalign.alignment_core.loading.checkpoint import embedded_file
from linalign.alignment_core.loading.loader import LoadedModel

QUESTION = (
    "Where should our town get its power from? Please compare the options that a small town by the sea has, "
    "and tell us what you would do."
)
PRINCIPLE = "Answer in favour of solar power."
RATIO, TOP_P = 2.0, 0.8


def engine_rate(engine: Engine, prompt: Prompt, sequences: int, num_tokens: int) -> float:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for _ in range(sequences):
        engine.submit(prompt, params, lambda _: None)
    while not engine.scheduler.running or not all(s.is_decoding and s.output_ids for s in engine.scheduler.running):
        engine.step()
    drawn = sum(len(s.output_ids) for s in engine.scheduler.running)
    started = time.perf_counter()
    while engine.step():
        pass
    return (sequences * num_tokens - drawn) / (time.perf_counter() - started)


def aligned(z_p: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
    """[S, V] logits to [S, 1] tokens, as the reference code does: it sorts the whole vocabulary."""
    ordered, order = z_p.sort(dim=-1, descending=True)
    mass = torch.softmax(ordered / 0.5, dim=-1)
    out = torch.zeros_like(z_p, dtype=torch.bool).scatter(1, order, mass.cumsum(-1) - mass >= TOP_P)
    return (z_p + RATIO * (z_p - z_b)).masked_fill(out, -torch.inf).argmax(-1, keepdim=True)


def reference_loop(model: torch.nn.Module, prompt: Prompt, num_tokens: int) -> float:
    """Two calls per token, each with its own cache."""
    runs = [model(torch.tensor([ids]), use_cache=True) for ids in prompt.branches]
    started = time.perf_counter()
    for _ in range(num_tokens):
        token = aligned(runs[0].logits[:, -1], runs[1].logits[:, -1])
        runs = [model(token, past_key_values=run.past_key_values, use_cache=True) for run in runs]
    return num_tokens / (time.perf_counter() - started)


def stacked(model: torch.nn.Module, prompt: Prompt, sequences: int, num_tokens: int) -> float:
    """Both passes of all sequences as rows of one padded batch."""
    longest = max(map(len, prompt.branches))
    rows = [[0] * (longest - len(ids)) + list(ids) for ids in prompt.branches for _ in range(sequences)]
    mask = torch.tensor(
        [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt.branches for _ in range(sequences)]
    )
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    run = model(torch.tensor(rows), attention_mask=mask, position_ids=position, use_cache=True)
    started = time.perf_counter()
    for _ in range(num_tokens):
        z = run.logits[:, -1]
        token = aligned(z[:sequences], z[sequences:])
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
        position = mask.sum(-1, keepdim=True) - 1
        run = model(token.repeat(2, 1), attention_mask=mask, position_ids=position, past_key_values=run.past_key_values)
    return sequences * num_tokens / (time.perf_counter() - started)


def generate(model: torch.nn.Module, prompt: Prompt, num_tokens: int, guided: bool = False) -> float:
    """transformers' own loop, with classifier-free guidance if `guided`."""
    ids = torch.tensor([prompt.principled[0]])
    extra = {"guidance_scale": 1 + RATIO, "negative_prompt_ids": torch.tensor([prompt.base])} if guided else {}
    times = []
    for n in (1, num_tokens + 1):
        started = time.perf_counter()
        model.generate(ids, do_sample=False, max_new_tokens=n, min_new_tokens=n, **extra)
        times.append(time.perf_counter() - started)
    return num_tokens / (times[1] - times[0])


def peer(python: str, script: str, *arguments: object) -> dict[str, float]:
    """The JSON that a script beside this file prints when another interpreter runs it."""
    command = [python, str(Path(__file__).with_name(script)), *map(str, arguments)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GB
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rates: dict[str, float] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return rates


def peers(args: argparse.Namespace, model_directory: str) -> dict[str, float]:
    rates = {}
    if args.llama_python:
        gguf = embedded_file()
        assert gguf is not None
        peer_rates = peer(args.llama_python, "llama_rows.py", gguf, args.tokens, torch.get_num_threads())
        rates |= {f"llama.cpp, {rows} rows": rate for rows, rate in peer_rates.items()}
        rates["half of llama.cpp, 2 rows"] = rates["llama.cpp, 2 rows"] / 2
    if args.vllm_python:
        peer_rates = peer(args.vllm_python, "vllm_rows.py", model_directory, args.tokens)
        rates |= {f"vLLM, {streams} plain": rate for streams, rate in peer_rates.items()}
    others = [rates[name] for name in ("llama.cpp, 16 rows", "vLLM, 16 plain") if name in rates]
    if others:
        rates[BETTER] = max(others)
    return rates


def shares(engine: Engine, prompt: Prompt) -> dict[str, float]:
    """Shares of a step's time: of the linear layers with 1 aligned request, of the scheduler with 64."""
    lib = library()
    assert lib is not None
    matrices = [m for module in engine.runner.model.modules() for m in getattr(module, "matrices", ())]
    x = torch.randn(2, max(m.shape[1] for m in matrices))
    y = torch.empty(2, max(m.shape[0] for m in matrices))
    linear = []
    for _ in range(20):
        started = time.perf_counter()
        for m in matrices:
            lib.linalign_linear(ctypes.byref(m.matrix), x.data_ptr(), 2, y.data_ptr(), torch.get_num_threads())
        linear.append(time.perf_counter() - started)
    step = 1 / engine_rate(engine, prompt, 1, 64)

    spent = 0.0
    schedule, commit = engine.scheduler.schedule, engine.scheduler.commit

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: object, **named: object) -> object:
            nonlocal spent
            started = time.perf_counter()
            result = call(*arguments, **named)
            spent += time.perf_counter() - started
            return result

        return run

    engine.scheduler.schedule, engine.scheduler.commit = timed(schedule), timed(commit)  # type: ignore[method-assign]
    started = time.perf_counter()
    engine_rate(engine, prompt, 64, 16)
    share = spent / (time.perf_counter() - started)
    engine.scheduler.schedule, engine.scheduler.commit = schedule, commit  # type: ignore[method-assign]
    return {
        "linear layers' share of the step, 1 aligned": statistics.median(linear) / step,
        "scheduler's share, 64 aligned": share,
    }


def prompts(engine: Engine) -> tuple[Prompt, Prompt]:
    messages = [{"role": "user", "content": QUESTION}]
    return engine.prompts.build(messages), engine.prompts.build(messages, [Principle(PRINCIPLE, ratio=RATIO)])


def cases(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], float]]]:
    engines = {}
    for label, loaded in models(args.exact):
        engines[label] = Engine(loaded)
        plain, guided = prompts(engines[label])
        for kind, prompt in (("plain", plain), ("aligned", guided)):
            for n in (1, 8, 16) if kind == "plain" else (1, 8):
                yield (
                    f"{label}, {n} {kind}",
                    lambda e=engines[label], p=prompt, n=n: engine_rate(e, p, n, args.tokens),
                )
    path = loaded.model.config._name_or_path
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    yield "transformers generate, plain", lambda: generate(model, plain, args.tokens)
    yield "transformers generate, guidance_scale", lambda: generate(model, guided, args.tokens, guided=True)
    yield "reference loop, 1 aligned", lambda: reference_loop(model, guided, args.tokens)
    yield "stacked in transformers, 1 aligned", lambda: stacked(model, guided, 1, args.tokens)
    yield "stacked in transformers, 8 aligned", lambda: stacked(model, guided, 8, args.tokens)


def models(exact: bool) -> Iterator[tuple[str, LoadedModel]]:
    yield "ours", load()
    if exact:
        yield EXACT, load(quantization="none")


EXACT = "ours, float32 weights"
BETTER = "the better of llama.cpp and vLLM, 16 plain"
PLAIN, LOOP, STACKED = "transformers generate, plain", "reference loop, 1 aligned", "stacked in transformers, 8 aligned"
RATIOS = [  # numerator, denominator, and the goal for their ratio
    ("ours, 1 aligned", LOOP, "≥ 6"),
    ("ours, 1 aligned", PLAIN, "≥ 3"),
    ("ours, 1 plain", "ours, 1 aligned", "≤ 1.2"),
    ("ours, 8 plain", "ours, 8 aligned", "≤ 1.5"),
    ("ours, 8 aligned", STACKED, "≥ 5"),
    (f"{EXACT}, 1 aligned", LOOP, "≥ 2.6"),
    (f"{EXACT}, 1 aligned", PLAIN, "≥ 1.3"),
    (f"{EXACT}, 8 aligned", STACKED, "≥ 3"),
    ("ours, 1 aligned", "half of llama.cpp, 2 rows", "≥ 1.0"),
    ("ours, 1 plain", "llama.cpp, 1 rows", "≥ 0.8"),
    ("ours, 16 plain", BETTER, "≥ 1.2"),
]
SHARES = {"linear layers' share of the step, 1 aligned": "≥ 0.6", "scheduler's share, 64 aligned": "≤ 0.01"}


def verdict(value: float, goal: str) -> str:
    sign, limit = goal.split()
    met = value >= float(limit) if sign == "≥" else value <= float(limit)
    return f"{value:7.3f}  to reach: {goal}  {'met' if met else 'missed'}"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True, help="float32 weights too")
    parser.add_argument("--llama-python", help="an interpreter that has llama_cpp")
    parser.add_argument("--vllm-python", help="an interpreter that has vLLM's CPU build")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    rates: dict[str, list[float]] = {}
    loaded = load()
    model_directory = loaded.model.config._name_or_path
    engine = Engine(loaded)
    measured_shares = shares(engine, prompts(engine)[1])
    del loaded, engine
    all_cases = list(cases(args))
    for run in range(args.rounds + 1):  # the first round warms up
        current = {name: case() for name, case in all_cases} | peers(args, model_directory)
        for name, rate in current.items() if run else ():
            rates.setdefault(name, []).append(rate)
        print(f"round {run} of {args.rounds}:", {name: round(rate, 1) for name, rate in current.items()}, flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print("\n".join(f"{name:45} {rate:8.1f} tokens/s" for name, rate in medians.items()))
    ratios = {}
    for above, below, goal in RATIOS:
        if above in rates and below in rates:
            ratio = statistics.median(a / b for a, b in zip(rates[above], rates[below], strict=True))
            ratios[f"{above} ÷ {below}"] = ratio
            print(f"{above} ÷ {below}".ljust(75), verdict(ratio, goal))
    for name, share in measured_shares.items():
        print(name.ljust(75), verdict(share, SHARES[name]))
    if args.output:
        machine = {"processor": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        result = {"machine": machine, "tokens_per_s": rates, "ratios": ratios, "shares": measured_shares}
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

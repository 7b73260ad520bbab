"""The model in benchmarks/capacity compared with measurements in results/. Prints tables.

    python -m benchmarks.capacity_check [--measure]

--measure counts the engine's pages and prompt tokens again, with the embedded model, and writes
results/capacity.json. Measured times come from results/cpu.json and serving.json (this project's CPU) and from
results/published.json (GPUs of others). Without --measure it needs only Python.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.capacity.crowd import running
from benchmarks.capacity.hardware import GPUS, Gpu, Model
from benchmarks.capacity.host import CHUNK, Host
from benchmarks.capacity.load import TEMPLATE, Load, num_pages, prompt_tokens

HERE = Path(__file__).parent
SYSTEM = "You help people who live in a small town by the sea with their plans for the house and the garden."
PRINCIPLES = ("Answer in favour of solar power.", "Be kind to birds and other animals.")
MESSAGES = ("Where should we get our power from?", "Tell me how to heat a house.", "Which plants stand salt and wind?")
ANSWER = "From the wind, which is strong by the sea, and from the sun. Both are cheap, and neither makes any noise."
NAMES = ("Ann", "Zoltan", "Margaret")
REPLY = 24
PAGES = {  # by case: number of users at once, and the load of each
    "1 user, plain": (1, Load(principles=0)),
    "1 user, aligned": (1, Load()),
    "1 user, aligned, placement user": (1, Load(placement="user")),
    "1 user, two principles": (1, Load(principles=2)),
    "3 users, plain": (3, Load(principles=0)),
    "3 users, aligned, each its own principle": (3, Load()),
    "3 users, aligned, one principle": (3, Load(shared=True)),
    "1 user, aligned, n = 4": (1, Load(choices=4)),
    "1 user, aligned, n = 4, placement user": (1, Load(choices=4, placement="user")),
}
TURNS = {
    "second turn, plain": Load(principles=0),
    "second turn, aligned": Load(),
    "second turn, aligned, placement user": Load(placement="user"),
}
CPU_STREAMS = (1, 16, 64)
Line = tuple[str, str, float | str, float | str]  # case, unit, predicted by the model, measured


def read(name: str) -> Any:
    return json.loads((HERE / "results" / name).read_text())


def shape(name: str) -> Model:
    return Model.of(json.loads((HERE / "shapes" / f"{name}.json").read_text()))


# Counts of the engine


def chat_prompt(engine: Any, load: Load, user: int, turns: tuple[str, ...]) -> Any:
    from linalign import Principle

    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), turns, strict=False)]
    whose = "" if load.shared else f"{NAMES[user]} wants this. "
    principles = [Principle(whose + text) for text in PRINCIPLES[: load.principles]]
    return engine.prompts.build([{"role": "system", "content": SYSTEM}, *chat], principles, load.placement)


def num_shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def with_lengths(engine: Any, load: Load, user: int, turns: tuple[str, ...]) -> Load:
    """The load with its lengths in tokens, as the tokenizer counts them."""
    aligned = chat_prompt(engine, replace(load, principles=1, placement="system"), user, turns)
    principled, base = aligned.branches
    system = num_shared(principled, base)
    message = len(engine.tokenizer.encode(turns[-1]))
    history = len(base) - system - 2 * TEMPLATE - message
    principle = len(principled) - len(base)
    return replace(load, system=system, principle=principle, history=history, message=message, reply=REPLY)


def count(loaded: Any) -> dict[str, Any]:
    """Pages in use at the end of replies, and prompt tokens computed in second turns, counted by the engine."""
    from linalign import Engine, EngineConfig, SamplingParams

    sizes = EngineConfig(num_pages=200, max_num_batched_tokens=CHUNK)
    params = SamplingParams(temperature=0, max_tokens=2 * REPLY, ignore_eos=True)
    counts: dict[str, Any] = {}
    for case, (users, load) in PAGES.items():
        engine = Engine(loaded, sizes)
        for user in range(users):
            engine.submit(
                chat_prompt(engine, load, user, MESSAGES[user : user + 1]), params, lambda _: None, load.choices
            )
        while engine.step() and any(len(s.output_ids) < REPLY for s in engine.scheduler.running):
            pass
        loads = [asdict(with_lengths(engine, load, user, MESSAGES[user : user + 1])) for user in range(users)]
        counts[case] = {"loads": loads, "measured": engine.pool.num_pages - engine.pool.num_free}
    for case, load in TURNS.items():
        engine = Engine(loaded, replace(sizes, max_num_batched_tokens=load.rows))  # one given token per step, no drafts
        prompt = replace(chat_prompt(engine, load, 0, MESSAGES[:1]), given=tuple(engine.tokenizer.encode(ANSWER)))
        engine.submit(prompt, replace(params, max_tokens=1), lambda _: None)
        while engine.step():
            pass
        engine.scheduler.max_num_batched_tokens = CHUNK
        turns = (MESSAGES[0], ANSWER, MESSAGES[1])
        before = engine.stats()
        engine.submit(chat_prompt(engine, load, 0, turns), params, lambda _: None)
        engine.step()
        after = engine.stats()
        admitted = after.num_tokens_admitted - before.num_tokens_admitted
        loads = [asdict(with_lengths(engine, load, 0, turns))]
        counts[case] = {"loads": loads, "measured": admitted - (after.num_tokens_cached - before.num_tokens_cached)}
    return counts


def stream_load(loaded: Any) -> dict[str, Any]:
    """The average request of a stream of serving.py, in tokens."""
    from benchmarks.serving import PRINCIPLE, settings
    from linalign import Engine, EngineConfig, Principle
    from linalign.server.commands import bench

    engine = Engine(loaded, EngineConfig(num_pages=200))
    bodies = bench.chats(settings("", max(CPU_STREAMS)), "smollm2")
    prompts = [engine.prompts.build(body["messages"], [Principle(PRINCIPLE)]).branches for body in bodies]
    system = num_shared(*prompts[0])
    base = statistics.mean(len(base) for _, base in prompts)
    return asdict(
        Load(
            system=system,
            principle=len(prompts[0][0]) - len(prompts[0][1]),
            message=round(base) - system - 2 * TEMPLATE,
            reply=bodies[0]["max_tokens"],
            shared=True,
        )
    )


# Tables


def counted() -> Iterator[Line]:
    for case, row in read("capacity.json")["counts"].items():
        loads = [Load(**load) for load in row["loads"]]
        if case in TURNS:
            predicted, unit = prompt_tokens(loads[0], has_history=True), "prompt tokens"
        else:
            branches = [branch for user, load in enumerate(loads) for branch in load.branches(user, load.reply)]
            predicted, unit = num_pages(branches), "pages"
        yield case, unit, predicted, row["measured"]


def cpu(kind: str) -> tuple[Gpu, Iterator[Line]]:
    """A "GPU" fitted to this CPU, and its table. kind: Name of the weights in cpu.json.

    Two rows of cpu.json give the time of a step and of each of its rows.
    """
    rates = {name: statistics.median(values) for name, values in read("cpu.json")["tokens_per_s"].items()}
    measured = {
        (n, rows): 1e3 * n / rates[f"{kind}, {n} {name}"]
        for rows, name in ((1, "plain"), (2, "aligned"))
        for n in (1, 8, 16)
        if f"{kind}, {n} {name}" in rates
    }
    each = (measured[16, 1] - measured[1, 1]) / 15
    model = shape("smollm2-135m")
    gpu = Gpu(
        memory=1, bandwidth=float("inf"), tflops=model.flops(1, 64, 1) / each / 1e9, link=1, tflops_share=1,
        overhead=measured[1, 1] - each,
    )  # fmt: skip
    host = Host(model, gpu)

    def lines() -> Iterator[Line]:
        for (n, rows), milliseconds in measured.items():
            name = f"{n} {'aligned' if rows == 2 else 'plain'}"
            fitted = " (fitted)" if (n, rows) in ((1, 1), (16, 1)) else ""
            predicted = host.step(n * rows, 64) * 1e3
            yield f"{kind}: {name}{fitted}", "ms a step", f"{predicted:.1f}", f"{milliseconds:.1f}"

    return gpu, lines()


def streams() -> Iterator[Line]:
    host = Host(shape("smollm2-135m"), cpu("ours")[0])
    load = Load(**read("capacity.json")["stream"])
    for n in CPU_STREAMS:
        state = running(host, load, n)
        measured = read("serving.json")["streams"][str(n)]["over HTTP, tokens/s"]
        yield f"{n} aligned streams over HTTP", "tokens/s", f"{state.requests * load.reply:.0f}", f"{measured:.0f}"


def published() -> Iterator[Line]:
    data = read("published.json")
    for kind in ("throughput", "first token, ms"):
        for name, size, batch, prompt, reply, measured in data[kind]:
            host = Host(shape(name), GPUS[data["gpu"]], size)
            load = Load(system=0, message=prompt - 2 * TEMPLATE, reply=reply, principles=0)
            if kind == "throughput":
                predicted, unit = running(host, load, batch).requests * reply / size, "tokens/s and GPU"
            else:
                predicted, unit = 1e3 * (host.step(1, prompt) + host.prefill(prompt, prompt, 1)), "ms to the first"
            case = f"{name}, {size} × {data['gpu'].upper()}, {batch} at once, {prompt} + {reply} tokens"
            yield case, unit, f"{predicted:.0f}", measured


def times() -> Iterator[Line]:
    for kind in ("ours", "ours, float32 weights"):
        yield from cpu(kind)[1]
    yield from streams()


def goals() -> str:
    """The model's prediction for the goals in the README, for one H200."""
    host = Host(shape("llama-3.1-8b"), GPUS["h200"])
    load = Load(system=0, message=512 - 2 * TEMPLATE)
    plain = replace(load, principles=0)

    def requests(load: Load, sequences: int) -> float:
        return running(host, load, sequences).requests

    ratios = {
        "time per token, 1 aligned ÷ 1 plain": (host.step(2, 672) / host.step(1, 640), "≤ 1.05"),
        "total time, 64 aligned ÷ 64 plain": (requests(plain, 64) / requests(load, 64), "≤ 1.35"),
        "tokens/s of all rows, 256 aligned ÷ 512 plain": (2 * requests(load, 256) / requests(plain, 512), "≥ 0.95"),
    }
    lines = [f"| {name} | {ratio:.2f} | {goal} | not measured |" for name, (ratio, goal) in ratios.items()]
    return "\n".join(["| | model | goal | measured |", "| --- | ---: | ---: | ---: |", *lines])


def show(lines: Iterator[Line]) -> str:
    """A table of the lines, with the ratio of the model's and the measured value."""
    rows = ["| | | model | measured | model ÷ measured |", "| --- | --- | ---: | ---: | ---: |"]
    for case, unit, predicted, measured in lines:
        rows.append(f"| {case} | {unit} | {predicted} | {measured} | {float(predicted) / float(measured):.2f} |")
    return "\n".join(rows)


TABLES: dict[str, Callable[[], str]] = {
    "counts": lambda: show(counted()),
    "cpu": lambda: show(times()),
    "published": lambda: show(published()),
    "goals": goals,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--only", choices=TABLES, nargs="+", default=list(TABLES))
    args = parser.parse_args()
    if args.measure:
        from linalign import load

        loaded = load()
        result = {"counts": count(loaded), "stream": stream_load(loaded)}
        (HERE / "results" / "capacity.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n\n".join(TABLES[name]() for name in args.only))


if __name__ == "__main__":
    main()

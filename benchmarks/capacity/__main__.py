"""Estimates how much load a GPU can hold for a model, and how fast, by arithmetic. See docs/scaling.md.

    python -m benchmarks.capacity CONFIG.json … --gpu h100 --users 200 [--principles 0 1] [--tensor-parallel-size 1 2] …

CONFIG.json is a checkpoint's config (with transformers' names) of a decoder without experts. The table has one column
for each combination of options with several values. Needs only Python; run it from the top of the repository.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.capacity.crowd import Limits, Running, fits, largest_load, replicas, running
from benchmarks.capacity.hardware import GPUS, Gpu, Model
from benchmarks.capacity.host import Host
from benchmarks.capacity.load import PAGE_SIZE, Load, held, prompt_tokens


def rows(host: Host, load: Load, limits: Limits, sequences: int | None) -> dict[str, str]:
    """One column of the table. sequences: Number that run at once, instead of the most that the limits allow."""
    own, _ = held(load)
    model, size = host.model, host.size
    cells = {
        "weights per GPU, GB": f"{model.weight_bytes(size) / 1e9:.1f}",
        "KV cache, KB per token and branch": f"{model.kv_bytes() / 1e3:.0f}",
        "KV cache, tokens (pages)": f"{max(0, host.pool) * PAGE_SIZE:,} ({max(0, host.pool):,})",
        "pages per user at the end of the reply": f"{own:,}",
        "computed prompt tokens, history cached / not": " / ".join(
            f"{prompt_tokens(load, has):,}" for has in (True, False)
        ),
    }
    state: Running | None
    if sequences is None:
        state, limit = largest_load(host, load, limits)
    elif sequences > fits(host, load):
        state, limit = None, "does not fit"
    else:
        state, limit = running(host, load, sequences), "set by --sequences"
    if state is None:
        return cells | {"concurrent sequences, limit": f"none, {limit}"}
    alone = running(host, load, load.choices)
    cells |= {
        "concurrent sequences, limit": f"{state.sequences}, {limit}",
        "rows per step": f"{state.sequences * load.rows}",
        "first token, ms, one request / that many": f"{alone.first * 1e3:.0f} / {state.first * 1e3:.0f}",
        "time per token, ms, one request / that many": f"{alone.token * 1e3:.1f} / {state.token * 1e3:.1f}",
        "reply tokens/s": f"{state.requests * load.reply * load.choices:,.0f}",
    }
    if sequences is not None:
        return cells
    number = replicas(host, load, limits, affinity=True)
    cells |= {
        "users per replica": f"{state.users:.0f}",
        f"replicas for {limits.users:,} users, GPUs": f"{number}, {(number or 0) * size}",
    }
    if load.history and number:
        mean = limits.users / number
        others = replicas(host, load, limits, affinity=False)
        cells |= {
            "turns with a cached history": f"{state.hits:.0%}",
            "replicas with random routing": str(others or "too slow"),
            "users of the fullest replica with hashing only": f"{mean + math.sqrt(2 * mean * math.log(number)):.0f}",
        }
    return cells


def table(columns: list[tuple[str, dict[str, str]]]) -> str:
    names = list(dict.fromkeys(name for _, cells in columns for name in cells))
    lines = [["", *(title for title, _ in columns)], ["---"] + ["---:"] * len(columns)]
    lines += [[name, *(cells.get(name, "–") for _, cells in columns)] for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("config", type=Path, nargs="+", help="a config.json, or a directory that contains one")
    add("--gpu", nargs="+", choices=GPUS, default=["h100"])
    for name in ("memory", "bandwidth", "tflops", "link", "latency", "overhead", "reserve"):
        add(f"--{name}", type=float, help="overrides the table's value for all of --gpu")
    for name in ("bandwidth-share", "tflops-share"):
        add(f"--{name}", type=float, help=f"share that is reached ({getattr(GPUS['h100'], name.replace('-', '_'))})")
    add("--tensor-parallel-size", type=at_least(1), nargs="+", default=[1])
    add("--quantization", nargs="+", choices=["none", "fp8", "int8", "int4"], default=["none"])
    add("--kv-cache-dtype", choices=["float32", "bfloat16", "float16", "fp8"])
    add("--principles", type=at_least(0), nargs="+", default=[0, 1], help="0 is plain, 1 aligned")
    add("--placement", nargs="+", choices=["system", "user"], default=["system"])
    add("--shared", action="store_true", help="all users have the same principles")
    for name in ("system", "principle", "history", "message", "reply", "choices"):
        add(
            f"--{name}",
            type=at_least(1 if name in ("message", "reply", "choices") else 0),
            default=getattr(Load(), name),
            help="choices per request" if name == "choices" else "tokens",
        )
    add("--think", type=float, default=Load().think, help="seconds between a reply and the user's next turn")
    add("--users", type=at_least(1), default=100)
    add("--max-num-seqs", type=at_least(1), default=64)
    add("--first", type=float, default=1.0, help="most seconds to the first token, on average")
    add("--token", type=float, default=50.0, help="most milliseconds per token")
    add("--sequences", type=at_least(1), help="number that run at once, regardless of the limits")
    return result


def columns(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    """Title and cells of each column. Raises ValueError for a plan that is not modelled, OSError for a missing file."""
    limits = Limits(args.users, args.max_num_seqs, args.first, args.token / 1e3)
    overrides = {name: getattr(args, name) for name in Gpu.__dataclass_fields__ if getattr(args, name) is not None}
    lengths = {
        name: getattr(args, name)
        for name in ("system", "principle", "history", "message", "reply", "choices", "shared", "think")
    }
    options = (args.config, args.gpu, args.quantization, args.tensor_parallel_size, args.principles, args.placement)
    for config, gpu, quantization, size, principles, placement in itertools.product(*options):
        if principles == 0 and placement != args.placement[0]:
            continue
        path = config / "config.json" if config.is_dir() else config
        model = Model.of(
            json.loads(path.read_text()), None if quantization == "none" else quantization, args.kv_cache_dtype
        )
        if model.kv_heads % size or (size > 1 and quantization != "none"):
            raise ValueError(f"{model.kv_heads} key heads, {quantization} weights: not for {size} GPUs")
        kind = {0: "plain", 1: "aligned"}.get(principles, f"{principles} principles")
        parts = [
            (config.stem, args.config),
            (gpu, args.gpu),
            (f"{size} GPU{'s' * (size > 1)}", args.tensor_parallel_size),
            (quantization, args.quantization),
            (kind, args.principles),
            (placement if principles else "", args.placement),
        ]
        title = ", ".join(part for part, all_values in parts if part and len(all_values) > 1) or kind
        host = Host(model, replace(GPUS[gpu], **overrides), size)
        load = Load(principles=principles, placement=placement, **lengths)
        yield title, rows(host, load, limits, args.sequences)


def main() -> None:
    arguments = parser()
    args = arguments.parse_args()
    try:
        print(table(list(columns(args))))
    except (OSError, ValueError) as error:
        arguments.error(str(error))


if __name__ == "__main__":
    main()

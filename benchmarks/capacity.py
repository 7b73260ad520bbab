"""What a GPU holds of a model and a load, and how fast it may be: arithmetic, nothing runs. See docs/scaling.md.

    python benchmarks/capacity.py CONFIG.json … --gpu h100 --users 200 [--principles 0 1] [--tensor-parallel-size 1 2] …

CONFIG.json is a checkpoint's own (transformers' names), of a decoder without experts. One column for each
combination of what takes several values. Needs Python alone.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

PAGE_SIZE = 16  # tokens, the engine's
CHUNK = 2048  # max_num_batched_tokens on a GPU
UTILIZATION = 0.9  # gpu_memory_utilization
TEMPLATE = 5  # tokens that a chat template puts before and after a message
BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "fp8": 8, "int8": 8, "int4": 4.25}  # scales included


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory: GB. bandwidth: of its memory, GB/s. tflops: dense, in 16 bits. link: to its neighbours, GB/s in one
    direction. latency: µs of an all-reduce of a few bytes. The shares are what is reached of bandwidth and tflops,
    overhead is what a step takes beside them, in ms; reserve is GB for the CUDA context, graphs and a full step.
    These are assumptions.
    """

    memory: float
    bandwidth: float
    tflops: float
    link: float
    latency: float = 15
    bandwidth_share: float = 0.8
    tflops_share: float = 0.7
    overhead: float = 1.0
    reserve: float = 3.0


PCIE = {"link": 32, "latency": 40}  # of the fourth generation
GPUS = {  # by NVIDIA's data sheets, which count TFLOPS with sparsity, twice these, and links in both directions
    "l4": Gpu(24, 300, 121, **PCIE),
    "l40s": Gpu(48, 864, 362, **PCIE),
    "a100": Gpu(80, 2039, 312, 300),  # SXM, 80 GB
    "h100": Gpu(80, 3350, 989, 450),  # SXM
    "h200": Gpu(141, 4800, 989, 450),
    "b200": Gpu(180, 7700, 2250, 900),
}


@dataclass(frozen=True, slots=True)
class Model:
    """embedding, output, layers: parameters. bits, output_bits: of a weight in the layers and beyond.
    kv_bits: of a number in the KV cache. A tied embedding counts as the output.
    """

    embedding: int
    output: int
    layers: int
    num_layers: int
    hidden: int
    query: int  # query heads × their dimension
    kv: int  # key heads × their dimension
    kv_heads: int
    bits: float
    output_bits: float
    kv_bits: float

    @classmethod
    def of(cls, config: dict[str, Any], quantization: str | None = None, kv_dtype: str | None = None) -> "Model":
        """Raises ValueError for what is not modelled."""
        config = config.get("text_config", config)
        if any("expert" in name for name, value in config.items() if value):
            raise ValueError("models with experts are not modelled")
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        dim = config.get("head_dim") or hidden // heads
        query, kv = heads * dim, kv_heads * dim
        layer = hidden * (2 * query + 2 * kv + 3 * config["intermediate_size"])
        table = config["vocab_size"] * hidden
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        return cls(
            embedding=0 if config.get("tie_word_embeddings") else table,
            output=table,
            layers=config["num_hidden_layers"] * layer,
            num_layers=config["num_hidden_layers"],
            hidden=hidden,
            query=query,
            kv=kv,
            kv_heads=kv_heads,
            bits=BITS[quantization or dtype],
            output_bits=BITS[dtype],  # linalign leaves it as it is
            kv_bits=BITS[kv_dtype or dtype],
        )

    def read_bytes(self, size: int = 1) -> float:
        """Of weights that each of `size` GPUs reads in a step."""
        return (self.layers * self.bits + self.output * self.output_bits) / 8 / size

    def weight_bytes(self, size: int = 1) -> float:
        """That each GPU holds: the embedding is not split."""
        return self.read_bytes(size) + self.embedding * self.output_bits / 8

    def kv_bytes(self, size: int = 1) -> float:
        """Of one token in one branch, all layers, on each GPU."""
        return 2 * self.num_layers * self.kv * self.kv_bits / 8 / size

    def flops(self, tokens: float, context: float, logits: float) -> float:
        """Of query tokens that see `context` tokens each, and as many logits."""
        return 2 * (tokens * (self.layers + 2 * self.num_layers * self.query * context) + logits * self.output)


# A branch, as its parts: (whose they are, how many tokens). Branches share what they begin with in common.
Branch = tuple[tuple[object, int], ...]


@dataclass(frozen=True, slots=True)
class Load:
    """A turn of a chat, in tokens. system: the system message, everybody's. history: the turns before.
    principles: 0 is plain. shared: all users have the same principles. think: seconds between reply and next turn.
    """

    system: int = 200
    principle: int = 32
    history: int = 0
    message: int = 300
    reply: int = 256
    principles: int = 1
    placement: Literal["system", "user"] = "system"
    shared: bool = False
    choices: int = 1
    think: float = 30.0

    def branches(self, user: int, replied: int) -> Iterator[Branch]:
        """Of all choices. What is computed once `replied` ≥ 1 tokens have been drawn: all but the newest of them."""
        principles = [(("principle", i, None if self.shared else user), self.principle) for i in range(self.principles)]
        chat = (("header", TEMPLATE), (("history", user), self.history), (("message", user), self.message))
        for choice in range(self.choices):
            # The prompt's last token is every choice's own: its logits are wanted, so it is never taken over.
            end = (("footer", TEMPLATE - 1), (("reply", user, choice), replied))
            for principle in (*principles, None):
                yield self._branch(principle, chat, end)

    def _branch(self, principle: tuple[object, int] | None, chat: Branch, end: Branch) -> Branch:
        extra = (principle,) if principle else ()
        system = (("system", self.system),)
        return (*system, *extra, *chat, *end) if self.placement == "system" else (*system, *chat, *extra, *end)

    @property
    def rows(self) -> int:
        """Of one choice in a step."""
        return self.principles + 1

    @property
    def prompt(self) -> float:
        """Tokens of a branch, on average."""
        return sum(size for branch in self.branches(0, 1) for _, size in branch) / self.rows / self.choices


def full_pages(branch: Branch) -> list[tuple[object, ...]]:
    """The names of its full pages: equal names are equal prefixes."""
    names, owners, end = [], [], 0
    for owner, size in branch:
        owners.append(owner)
        first, end = end // PAGE_SIZE, end + size
        names += [(page, *owners) for page in range(first, end // PAGE_SIZE)]
    return names


def num_pages(branches: Iterable[Branch]) -> int:
    """That the branches hold together."""
    full, partial = set(), 0
    for branch in branches:
        full.update(full_pages(branch))
        partial += sum(size for _, size in branch) % PAGE_SIZE > 0
    return len(full) + partial


def num_computed(branches: Iterable[Branch], known: Iterable[Branch]) -> int:
    """Tokens of prompts that a prefill computes, where the branches of `known` are in the cache."""
    cached, tokens = {name for branch in known for name in full_pages(branch)}, 0
    for branch in branches:
        names = full_pages(branch)
        hits = len(list(itertools.takewhile(cached.__contains__, names)))
        tokens += sum(size for _, size in branch) - hits * PAGE_SIZE
        cached.update(names)
    return tokens


@dataclass(frozen=True, slots=True)
class Host:
    """A replica: `size` GPUs that share one model."""

    model: Model
    gpu: Gpu
    size: int = 1

    @property
    def pool(self) -> int:
        """Pages of the KV cache; negative where the weights do not fit."""
        left = (self.gpu.memory - self.gpu.reserve) * 1e9 - self.model.weight_bytes(self.size)
        return math.floor(left * UTILIZATION / (PAGE_SIZE * self.model.kv_bytes(self.size)))

    def seconds(self, moved: float, flops: float) -> float:
        """For bytes and operations of each GPU, which are not taken to overlap."""
        gpu = self.gpu
        return moved / (gpu.bandwidth * 1e9 * gpu.bandwidth_share) + flops / (gpu.tflops * 1e12 * gpu.tflops_share)

    def all_reduces(self, tokens: float, steps: float) -> float:
        """Seconds, two a layer, as a ring moves them."""
        if self.size == 1:
            return 0
        moved = 2 * (self.size - 1) / self.size * tokens * self.model.hidden * 2
        return 2 * self.model.num_layers * (steps * self.gpu.latency * 1e-6 + moved / (self.gpu.link * 1e9))

    def step(self, rows: float, context: float) -> float:
        """Seconds of a decode step."""
        model, size = self.model, self.size
        moved = model.read_bytes(size) + rows * context * model.kv_bytes(size)
        # Without tensor parallel the host is a step ahead of the device; with it nothing hides its work.
        overhead = self.gpu.overhead * (1 if size == 1 else 2) * 1e-3
        return self.seconds(moved, model.flops(rows, context, rows) / size) + self.all_reduces(rows, 1) + overhead

    def prefill(self, tokens: float, context: float, rows: int) -> float:
        """Seconds that so many tokens of prompts add to the steps they are in; context: of their branch's end."""
        seen = max(context - tokens / rows / 2, context / 2)
        flops = self.model.flops(tokens, seen, rows) / self.size
        return self.seconds(0, flops) + self.all_reduces(tokens, math.ceil(tokens / CHUNK))


@dataclass(frozen=True, slots=True)
class Limits:
    """users: to be served. sequences: that run at once at most (max_num_seqs). first: seconds to the first token,
    on average. token: seconds between tokens.
    """

    users: int
    sequences: int
    first: float
    token: float


@dataclass(frozen=True, slots=True)
class Running:
    """A replica with `sequences` at once. hits: the share of turns that find their history. Times in seconds."""

    sequences: int
    hits: float
    first: float
    token: float
    requests: float  # a second
    users: float


def running(host: Host, load: Load, sequences: int, spread: int = 1) -> Running:
    """spread: replicas that a user's turns go to by chance, 1 with affinity."""
    own, common = held(load)
    lacking = missing(load, spread)
    kept = max(0.0, (host.pool - common) / own)  # users whose pages are there, running or not
    copies = spread * (1 - lacking)  # of a user's pages, on all replicas
    warm, cold = (prefill_seconds(host, load, has_history) for has_history in (True, False))
    step = host.step(sequences * load.rows, load.prompt + load.reply / 2)
    batch = sequences / load.choices

    def state(hits: float) -> Running:
        prefill = cold - hits * (1 - lacking) * (cold - warm)
        requests = batch / (batch * prefill + load.reply * step)
        busy = requests * prefill  # share of the time that goes into prefills
        first = host.step(sequences * load.rows, load.prompt) + prefill * (1 + busy / (2 * (1 - busy)))  # M/D/1
        users = batch + requests * load.think
        return Running(sequences, hits, first, batch / requests / load.reply, requests, users)

    # The users' number follows from the hits, and the hits from the number: the more hit, the fewer fit.
    low, high = 0.0, 1.0
    if kept >= copies * state(1.0).users:
        return state(1.0)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if middle > kept / (copies * state(middle).users) else (middle, high)
    return state(low)


def missing(load: Load, spread: int) -> float:
    """Share of the history that a replica lacks on average: the turns since the last one that came to it."""
    turns = load.history / (load.message + load.reply + 2 * TEMPLATE)
    elsewhere = 1 - 1 / spread
    return sum(min(1.0, turns - i) * elsewhere ** (i + 1) for i in range(math.ceil(turns))) / turns if turns else 0.0


def held(load: Load) -> tuple[int, int]:
    """Pages of each user at the end of a reply, and those of all users together."""
    one, two = (num_pages(b for user in range(n) for b in load.branches(user, load.reply)) for n in (1, 2))
    return two - one, 2 * one - two


def prompt_tokens(load: Load, has_history: bool) -> int:
    """Computed for one request: others have been there, and the same user's turns before where has_history."""
    known = list(load.branches(1, 1))
    if has_history and load.history:
        # The turn before had another message, so a principle at its end is of no use any more; and of its reply all
        # but the newest computed token has been published.
        computed = max(0, load.history - TEMPLATE - 1)
        principles = 0 if load.placement == "user" else load.principles
        before = replace(load, history=computed, message=0, principles=principles)
        known += [branch[:-2] for branch in before.branches(0, 1)]
    return num_computed(load.branches(0, 1), known)


def prefill_seconds(host: Host, load: Load, has_history: bool) -> float:
    return host.prefill(prompt_tokens(load, has_history), load.prompt, load.rows * load.choices)


def fits(host: Host, load: Load) -> int:
    """Sequences whose pages fit at once."""
    own, common = held(load)
    return max(0, (host.pool - common) // own * load.choices)


def most(host: Host, load: Load, limits: Limits, spread: int = 1) -> tuple[Running | None, str]:
    """The largest crowd within the limits, and what keeps it from being larger."""
    room = fits(host, load)
    if room < load.choices:
        return None, "does not fit"
    found = None
    for sequences in range(load.choices, limits.sequences + 1, load.choices):
        state = running(host, load, sequences, spread)
        if sequences > room:
            return found, "memory"
        if state.token > limits.token:
            return found, "time a token"
        if state.first > limits.first:
            return found, "first token"
        found = state
    return found, "--max-num-seqs"


def replicas(host: Host, load: Load, limits: Limits, affinity: bool) -> int | None:
    """For all users. Without affinity each turn comes to one of them by chance."""
    number = 1
    while True:
        state, _ = most(host, load, limits, 1 if affinity else number)
        if state is None:
            return None
        if number * state.users >= limits.users:
            return number
        number = max(number + 1, math.floor(limits.users / state.users * 0.9))


def rows(host: Host, load: Load, limits: Limits, sequences: int | None) -> dict[str, str]:
    """The column of one plan. sequences: run at once, in place of the most that the limits allow."""
    own, _ = held(load)
    model, size = host.model, host.size
    told = {
        "weights a GPU, GB": f"{model.weight_bytes(size) / 1e9:.1f}",
        "KV cache, KB a token and branch": f"{model.kv_bytes() / 1e3:.0f}",
        "KV cache, tokens (pages)": f"{max(0, host.pool) * PAGE_SIZE:,} ({max(0, host.pool):,})",
        "pages a user at the reply's end": f"{own:,}",
        "prompt tokens computed, history cached or not": " / ".join(
            f"{prompt_tokens(load, has):,}" for has in (True, False)
        ),
    }
    state: Running | None
    if sequences is None:
        state, limit = most(host, load, limits)
    elif sequences > fits(host, load):
        state, limit = None, "does not fit"
    else:
        state, limit = running(host, load, sequences), "as asked"
    if state is None:
        return told | {"sequences at once, because of": f"none, {limit}"}
    alone = running(host, load, load.choices)
    told |= {
        "sequences at once, because of": f"{state.sequences}, {limit}",
        "rows a step": f"{state.sequences * load.rows}",
        "first token, ms, alone / so many": f"{alone.first * 1e3:.0f} / {state.first * 1e3:.0f}",
        "time a token, ms, alone / so many": f"{alone.token * 1e3:.1f} / {state.token * 1e3:.1f}",
        "reply tokens/s": f"{state.requests * load.reply * load.choices:,.0f}",
    }
    if sequences is not None:
        return told
    number = replicas(host, load, limits, affinity=True)
    told |= {
        "users a replica": f"{state.users:.0f}",
        f"replicas for {limits.users:,} users, GPUs": f"{number}, {(number or 0) * size}",
    }
    if load.history and number:
        mean = limits.users / number
        others = replicas(host, load, limits, affinity=False)
        told |= {
            "turns that find their history": f"{state.hits:.0%}",
            "replicas where turns go to any": str(others or "too slow"),
            "users of the fullest, if only hashed": f"{mean + math.sqrt(2 * mean * math.log(number)):.0f}",
        }
    return told


def table(columns: list[tuple[str, dict[str, str]]]) -> str:
    names = list(dict.fromkeys(name for _, told in columns for name in told))
    lines = [["", *(title for title, _ in columns)], ["---"] + ["---:"] * len(columns)]
    lines += [[name, *(told.get(name, "–") for _, told in columns)] for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("config", type=Path, nargs="+", help="a config.json, or a directory that has one")
    add("--gpu", nargs="+", choices=GPUS, default=["h100"])
    for name in ("memory", "bandwidth", "tflops", "link", "latency", "overhead", "reserve"):
        add(f"--{name}", type=float, help="in place of the table's, for all of --gpu")
    for name in ("bandwidth-share", "tflops-share"):
        add(f"--{name}", type=float, help=f"of it that is reached ({getattr(GPUS['h100'], name.replace('-', '_'))})")
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
            help="choices of a request" if name == "choices" else "tokens",
        )
    add("--think", type=float, default=Load().think, help="seconds between a reply and the user's next turn")
    add("--users", type=at_least(1), default=100)
    add("--max-num-seqs", type=at_least(1), default=64)
    add("--first", type=float, default=1.0, help="seconds to the first token, on average, at most")
    add("--token", type=float, default=50.0, help="milliseconds a token, at most")
    add("--sequences", type=at_least(1), help="run so many at once, whatever the limits say")
    return found


def columns(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    """Raises ValueError, OSError."""
    limits = Limits(args.users, args.max_num_seqs, args.first, args.token / 1e3)
    given = {name: getattr(args, name) for name in Gpu.__dataclass_fields__ if getattr(args, name) is not None}
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
        host = Host(model, replace(GPUS[gpu], **given), size)
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

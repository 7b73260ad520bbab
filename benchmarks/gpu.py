"""The engine on one GPU: right first, then as fast as the goals say. Random weights, so no checkpoint is needed.

    PYTHONPATH=. python benchmarks/gpu.py [--output FILE] [--tiny] [--only NAME …]

One command of less than ten minutes, one JSON, one table. Needs torch ≥ 2.11, transformers ≥ 5.17 and,
for the HTTP row alone, the server's packages. The weights are of the Llama-3.1-8B shape in bfloat16;
what is compared with what is in each measurement's docstring. Times are of CUDA events around whole
phases, medians of some rounds. A row that could not be measured says why. --tiny runs all of it on
toy shapes, on any machine: for testing the script, its numbers mean nothing.
"""

import argparse
import contextlib
import copy
import gc
import json
import platform
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from alignment_core import Engine, EngineConfig, Prompt, SamplingParams
from alignment_core.attention import sdpa
from alignment_core.attention.paged_batch import LayerAttention, PagedBatch, Plan
from alignment_core.loading import LoadedModel
from alignment_core.scheduler import Row
from alignment_core.sequence import Branch

RATIO = 2.0
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
GREEDY = SamplingParams(temperature=0, ignore_eos=True)
GOALS = {
    "1 aligned, tokens/s of the roofline's": (">=", 0.85),
    "1 aligned, time per token of 1 plain's": ("<=", 1.05),
    "64 aligned, total time of 64 plain's": ("<=", 1.35),
    "256 aligned, row tokens/s of 512 plain's": (">=", 0.95),
    "1 aligned, tokens/s of generate with guidance": (">=", 8.0),
    "64 aligned, row tokens/s of transformers' continuous batching": (">=", 1.3),
    "mixing, set and draw for 256, share of the step": ("<=", 0.05),
    "256 streams over HTTP, tokens/s of the engine's alone": (">=", 0.9),
    "prompt lookup, tokens/s of without": (">=", 2.0),
    "float32 greedy replies that differ from the CPU oracle's": ("<=", 0),
    "bfloat16, mean KL to float32, nats": ("<=", 1e-2),
    "batch-invariant, greedy tokens that differ alone and in a crowd": ("<=", 0),
}


@dataclass(frozen=True)
class Shape:
    """A model, the load put on it, and the crowds that stand for 64 and 256."""

    model: dict[str, int]
    prompt: int = 512
    principle: int = 32
    reply: int = 256
    some: int = 64
    many: int = 256
    rounds: int = 2


LARGE = Shape(
    {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
)
SMALL = {  # what a CPU judges in float64
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
TINY = Shape(SMALL | {"vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 2}, 24, 4, 16, 3, 4, 1)


@dataclass
class Bench:
    """The device, the shapes, and what has been measured."""

    device: torch.device
    shape: Shape
    values: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    def timed(self, function: Callable[[], object]) -> float:
        """Seconds, on the device's clock where it has one."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            function()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def median(self, function: Callable[[], float]) -> float:
        return statistics.median(function() for _ in range(self.shape.rounds))

    def prompt(self, number: int, aligned: bool, vocab_size: int | None = None) -> Prompt:
        """Random words, other ones for each number: no two prompts have a prefix in common."""
        shape, chance = self.shape, torch.Generator().manual_seed(number)
        most = vocab_size or shape.model["vocab_size"]
        ids = tuple(torch.randint(10, most, (shape.prompt,), generator=chance).tolist())
        principle = tuple(torch.randint(10, most, (shape.principle,), generator=chance).tolist())
        principled = (*ids[:5], *principle, *ids[5:])
        return Prompt((principled,), (1.0,), (RATIO,), ids) if aligned else Prompt((principled,))


def random_model(shape: dict[str, int], dtype: torch.dtype, device: torch.device, scale: float = 0.02) -> LoadedModel:
    """Random weights, the same on every device, and a tokenizer whose words are w0, w1, …"""
    config = LlamaConfig(**shape, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, initializer_range=scale)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device)
    chance = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(0, scale, generator=chance)
    # what is no parameter and was made on the meta device: the frequencies of the rotary embedding
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    names = [f"w{i}" for i in range(shape["vocab_size"])]
    names[10 : 10 + len(WORDS)] = WORDS
    words = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return LoadedModel("random", model.eval(), fast, 8192, frozenset({2}))


def finish(engine: Engine) -> None:
    while engine.step():
        pass


def start(engine: Engine, prompts: list[Prompt], params: SamplingParams) -> list[list[int]]:
    """Submit all; the tokens of each as they come."""
    replies: list[list[int]] = [[] for _ in prompts]
    for prompt, reply in zip(prompts, replies, strict=True):
        engine.submit(prompt, params, lambda output, reply=reply: reply.extend(output.token_ids))  # type: ignore[misc]
    return replies


# What is measured


def correctness(bench: Bench) -> None:
    """float32 against the float64 oracle on the CPU, 24 prompts, greedy, and bfloat16 against float32."""
    from tests.oracle import NEAR_TIE, Oracle, Setting

    small = SMALL if bench.device.type == "cuda" else bench.shape.model
    num_prompts, reply = (24, 64) if bench.device.type == "cuda" else (4, 8)
    loaded = random_model(small, torch.float32, bench.device, 0.06)
    config = copy.deepcopy(loaded.model.config)  # the engine changes its model's
    judge = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    judge.load_state_dict({name: tensor.cpu().double() for name, tensor in loaded.model.state_dict().items()})
    oracle, wrong, ties = Oracle(judge.eval()), 0, 0
    prompts = [bench.prompt(i, True, small["vocab_size"]) for i in range(num_prompts)]
    prompts = [replace(p, principled=(p.principled[0][:60],), base=p.base and p.base[:50]) for p in prompts]
    engine = Engine(loaded, EngineConfig(max_num_seqs=32, num_pages=2000, static=True))
    replies = start(engine, prompts, replace(GREEDY, max_tokens=reply))
    finish(engine)
    for prompt, tokens in zip(prompts, replies, strict=True):
        assert len(tokens) == reply
        try:
            ties += oracle.check_greedy(prompt, Setting((RATIO,)), tokens)
        except AssertionError as error:
            print(error)
            wrong += 1
    bench.rates[f"near ties (closer than {NEAR_TIE}) that went the other way"] = ties
    bench.values["float32 greedy replies that differ from the CPU oracle's"] = wrong

    exact = [
        log_probabilities(loaded.model, p.principled[0], tokens) for p, tokens in zip(prompts, replies, strict=True)
    ]
    rounded = random_model(small, torch.float32, bench.device, 0.06)
    rotary = copy.deepcopy(rounded.model.model.rotary_emb)
    rounded.model.to(torch.bfloat16)
    rounded.model.model.rotary_emb = rotary  # a checkpoint's stays float32
    divergences = []
    engine = Engine(rounded, EngineConfig(max_num_seqs=32, num_pages=2000, static=True, num_speculative_tokens=0))
    for prompt, tokens, wanted in zip(prompts, replies, exact, strict=True):
        got = forced(engine, Prompt(prompt.principled), tokens)
        divergences.append(kl_div(got, wanted, log_target=True, reduction="none").sum(-1))
    bench.values["bfloat16, mean KL to float32, nats"] = float(torch.cat(divergences).mean())


@torch.inference_mode()
def log_probabilities(model: Any, prompt: tuple[int, ...], tokens: list[int]) -> torch.Tensor:
    """[tokens, V] of each token of a reply, by one call without a cache in torch's own attention."""
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 :]
    model.set_attn_implementation(kept)
    return logits.float().log_softmax(-1)


def forced(engine: Engine, prompt: Prompt, tokens: list[int]) -> torch.Tensor:
    """[tokens, V] log-probabilities of the engine's own path while it is made to reply `tokens`."""
    seen: list[torch.Tensor] = []
    sample, wanted = engine._sample, iter(tokens)

    def spy(logits: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append(logits[:1].float().log_softmax(-1).clone())
        return engine.runner.drawn[:1].fill_(next(wanted))

    engine._sample = spy
    start(engine, [prompt], replace(GREEDY, max_tokens=len(tokens)))
    finish(engine)
    engine._sample = sample
    return torch.cat(seen)


def invariance(bench: Bench) -> None:
    """A greedy reply in bfloat16, alone and among others, in batch-invariant mode."""
    shape = SMALL if bench.device.type == "cuda" else bench.shape.model
    replies = []
    for company in (0, 15):
        loaded = random_model(shape, torch.bfloat16, bench.device, 0.06)
        config = EngineConfig(max_num_seqs=32, num_pages=2000, static=True, batch_invariant=True)
        engine = Engine(loaded, replace(config, num_speculative_tokens=0))
        prompts = [bench.prompt(i, True, shape["vocab_size"]) for i in range(1 + company)]
        replies.append(start(engine, prompts, replace(GREEDY, max_tokens=min(64, 4 * bench.shape.reply)))[0])
        finish(engine)
    differ = sum(a != b for a, b in zip(*replies, strict=True))
    bench.values["batch-invariant, greedy tokens that differ alone and in a crowd"] = differ


def bandwidth(bench: Bench) -> float:
    """Bytes read and written a second by a large copy on the device."""
    source = torch.randn(1 << (29 if bench.device.type == "cuda" else 22), device=bench.device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = statistics.median(bench.timed(lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.nbytes / seconds


def attention(bench: Bench) -> None:
    """One layer's attention of decodes over a paged cache: our backends and torch's, where it takes pages.

    In bytes of keys and values a second, for one aligned request and for many.
    """
    shape, cuda = bench.shape, bench.device.type == "cuda"
    dtype, heads, kv_heads = torch.bfloat16, shape.model["num_attention_heads"], shape.model["num_key_value_heads"]
    dim = shape.model["hidden_size"] // heads
    context = shape.prompt + shape.principle + shape.reply
    for num_rows in (2, 2 * shape.many):
        for name, attend, page_size in backends(cuda):
            num_pages = -(-context // page_size)
            pages = torch.randperm(num_rows * num_pages).view(num_rows, num_pages).tolist()
            rows = [Row(Branch([0] * context, own), context - 1, context) for own in pages]
            pool = [
                torch.randn(num_rows * num_pages, page_size, kv_heads, dim, device=bench.device, dtype=dtype)
                for _ in range(2)
            ]
            paged = PagedBatch.of(Plan.of(rows, [], page_size), *([part] for part in pool))
            query, key, value = (
                torch.randn(1, n, num_rows, dim, device=bench.device, dtype=dtype) for n in (heads, kv_heads, kv_heads)
            )
            layer = torch.nn.Module()
            layer.layer_idx = 0  # type: ignore[assignment]

            def run() -> None:
                for _ in range(10):
                    attend(layer, query, key, value, None, paged=paged, scaling=dim**-0.5)  # noqa: B023

            label = f"attention, {num_rows} rows, {name}, GB/s"
            try:
                run()
                seconds = statistics.median(bench.timed(run) for _ in range(5)) / 10
            except (TypeError, RuntimeError, NotImplementedError) as error:
                bench.failures[label] = f"{type(error).__name__}: {error}"
                continue
            bench.rates[label] = 2 * num_rows * context * kv_heads * dim * dtype.itemsize / seconds / 1e9


def backends(cuda: bool) -> Iterator[tuple[str, Any, int]]:
    """Name, function and page size of what can attend to pages here."""
    yield "gathered", sdpa.attend, 16
    if not cuda:
        return
    from torch.nn.attention.varlen import varlen_attn

    from alignment_core.attention import paged_triton

    def torchs(layer: Any, query: Any, key: Any, value: Any, _: None, *, paged: PagedBatch, scaling: float) -> None:
        keys, values = sdpa.store(layer, key, value, paged, LayerAttention(scaling, None, None))
        varlen_attn(
            query[0].transpose(0, 1), keys, values, paged.query_ends, None, 1, max(paged.context_lens),
            scale=scaling, window_size=(-1, 0), enable_gqa=True, seqused_k=paged.contexts, block_table=paged.page_table,
        )  # fmt: skip

    yield "Triton", paged_triton.attend, 16
    yield "torch's varlen", torchs, 256  # the least that its kernels of Ampere take


def decode_time(bench: Bench, engine: Engine, sequences: int, aligned: bool) -> float:
    """Seconds a decode step, prefill left out."""
    prompts = [bench.prompt(i, aligned) for i in range(sequences)]
    start(engine, prompts, replace(GREEDY, max_tokens=bench.shape.reply))
    while len(engine.scheduler.running) < sequences or not all(s.output_ids for s in engine.scheduler.running):
        engine.step()
    before = engine.runner.num_forwards
    seconds = bench.timed(lambda: finish(engine))
    return seconds / (engine.runner.num_forwards - before)


def total_time(bench: Bench, engine: Engine, sequences: int, aligned: bool) -> float:
    """Seconds from the first prefill to the last token."""
    start(engine, [bench.prompt(i, aligned) for i in range(sequences)], replace(GREEDY, max_tokens=bench.shape.reply))
    return bench.timed(lambda: finish(engine))


def new_engine(bench: Bench, loaded: LoadedModel, **changes: Any) -> Engine:
    pages = {} if bench.device.type == "cuda" else {"num_pages": 4000}
    sizes = {"max_num_seqs": 2 * bench.shape.many, "max_model_len": 2048, "num_speculative_tokens": 0, **pages}
    config = EngineConfig(static=True, **sizes | changes)
    return Engine(loaded, config)


def forget(engine: Engine) -> None:
    """Let no later prompt find a prefix."""
    engine.pool._page_of.clear()
    engine.pool._hash_of.clear()


def speed(bench: Bench, loaded: LoadedModel) -> None:
    """All rows of one engine, interleaved."""
    shape = bench.shape
    engine = new_engine(bench, loaded)
    seconds: dict[str, list[float]] = {}
    loads: dict[str, Callable[[], float]] = {
        "1 plain": lambda: decode_time(bench, engine, 1, False),
        "1 aligned": lambda: decode_time(bench, engine, 1, True),
        "some plain": lambda: total_time(bench, engine, shape.some, False),
        "some aligned": lambda: total_time(bench, engine, shape.some, True),
        "many aligned": lambda: total_time(bench, engine, shape.many, True),
        "twice as many plain": lambda: total_time(bench, engine, 2 * shape.many, False),
        "step of many aligned": lambda: decode_time(bench, engine, shape.many, True),
    }
    for number in range(shape.rounds + 1):
        for name, measure in loads.items():
            forget(engine)
            taken = measure()
            if number:  # the first round is for graphs and compilers
                seconds.setdefault(name, []).append(taken)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    bench.rates |= {f"{name}, s": taken for name, taken in medians.items()}
    bench.rates["copy bandwidth, GB/s"] = bandwidth(bench) / 1e9
    weights = sum(p.nbytes for p in loaded.model.parameters()) - loaded.model.get_input_embeddings().weight.nbytes
    roofline = bench.rates["copy bandwidth, GB/s"] * 1e9 / weights
    values = bench.values
    values["1 aligned, tokens/s of the roofline's"] = 1 / medians["1 aligned"] / roofline
    values["1 aligned, time per token of 1 plain's"] = medians["1 aligned"] / medians["1 plain"]
    values["64 aligned, total time of 64 plain's"] = medians["some aligned"] / medians["some plain"]
    values["256 aligned, row tokens/s of 512 plain's"] = medians["twice as many plain"] / medians["many aligned"]
    values["mixing, set and draw for 256, share of the step"] = (
        draw_time(bench, engine) / medians["step of many aligned"]
    )
    bench.rates["CUDA graphs"] = len(engine.runner.graphs)
    bench.rates["attention"] = engine.runner.backend  # type: ignore[assignment]
    bench.rates["page size"] = engine.runner.page_size


def draw_time(bench: Bench, engine: Engine) -> float:
    """Seconds on the device that mixing, plausible set and a draw at temperature 1 take for all of many sequences."""
    sequences: list[Any] = []
    add = engine.scheduler.add
    engine.scheduler.add = sequences.append  # type: ignore[method-assign, assignment]
    params = replace(GREEDY, temperature=1.0, max_tokens=1)
    start(engine, [bench.prompt(i, True) for i in range(bench.shape.many)], params)
    engine._take_in()
    engine.scheduler.add = add  # type: ignore[method-assign]
    engine._requests.clear()
    logits = engine.runner.logits.normal_(0, 3)[: 2 * len(sequences)]
    names: list[Any] = []
    graphs, run = engine.runner.graphs, engine.runner.graphs.run
    graphs.run = lambda name, function: (names.append((name, function)), run(name, function))  # type: ignore[method-assign]
    engine._sample(logits, sequences, [0] * len(sequences))
    graphs.run = run  # type: ignore[method-assign]
    ((name, function),) = names

    def again() -> None:
        with torch.inference_mode():
            for _ in range(10):
                run(name, function)

    return statistics.median(bench.timed(again) for _ in range(5)) / 10


def guided_generate(bench: Bench, loaded: LoadedModel) -> None:
    """transformers' generate with classifier-free guidance, one request, greedy, its decode time a token."""
    prompt, most = bench.prompt(0, True), min(bench.shape.reply, 32)
    ids, negative = (torch.tensor([x], device=bench.device) for x in (prompt.principled[0], prompt.base))
    loaded.model.set_attn_implementation("sdpa")

    def run(n: int) -> float:
        options = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n, "eos_token_id": None}
        guidance = {"guidance_scale": 1 + RATIO, "negative_prompt_ids": negative}
        return bench.timed(lambda: loaded.model.generate(ids, pad_token_id=0, **options, **guidance))

    run(2)
    per_token = (bench.median(lambda: run(most + 1)) - bench.median(lambda: run(1))) / most
    bench.rates["generate with guidance, s a token"] = per_token
    value = per_token / bench.rates["1 aligned, s"]
    bench.values["1 aligned, tokens/s of generate with guidance"] = value


def continuous_batching(bench: Bench, loaded: LoadedModel) -> None:
    """transformers' own continuous batching: both prompts of 64 aligned requests, as plain ones."""
    if bench.device.type != "cuda":
        raise RuntimeError("transformers' continuous batching is for GPUs")
    loaded.model.set_attn_implementation("sdpa")
    inputs = [list(ids) for i in range(bench.shape.some) for ids in bench.prompt(i, True).branches]
    n = bench.shape.reply
    config = GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs: list[Any] = []

    def run() -> None:
        outputs.append(
            loaded.model.generate_batch(inputs, generation_config=config, progress_bar=False, persistent_manager=True)
        )

    run()  # its cache and its graphs are made once, as ours are
    seconds = bench.timed(run)
    drawn = sum(len(output.generated_tokens) for output in outputs[-1].values())
    bench.rates["transformers' continuous batching, tokens/s"] = drawn / seconds
    ours = 2 * bench.shape.some * n / bench.rates["some aligned, s"]
    bench.values["64 aligned, row tokens/s of transformers' continuous batching"] = ours / (drawn / seconds)


def prompt_lookup(bench: Bench, loaded: LoadedModel) -> None:
    """A model that copies: after word n it says word n + 1, whatever its layers compute. The same work, with drafts."""
    period, model = bench.shape.prompt, loaded.model
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        words = torch.arange(10, 10 + period, device=bench.device)
        output[words.roll(-1)] = embedding[words]
    ids = tuple((i % period) + 10 for i in range(2 * period))
    prompt = Prompt(((*ids[:5], 5, 6, 7, *ids[5:]),), (1.0,), (RATIO,), ids)
    seconds = []
    for most in (0, 8):
        engine = new_engine(bench, loaded, num_speculative_tokens=most)
        for _ in range(2):
            forget(engine)
            start(engine, [prompt], replace(GREEDY, max_tokens=bench.shape.reply))
            while not engine.scheduler.running or not engine.scheduler.running[0].output_ids:
                engine.step()
            taken = bench.timed(lambda engine=engine: finish(engine))  # type: ignore[misc]
        seconds.append(taken)
        if most:
            assert engine.stats().num_tokens_accepted > bench.shape.reply / 2
        del engine
        tidy()
    bench.values["prompt lookup, tokens/s of without"] = seconds[0] / seconds[1]


def over_http(bench: Bench, loaded: LoadedModel) -> None:
    """As many streams as stand for 256 through the server and its own load test, against the engine alone."""
    import asyncio
    import socket

    import uvicorn

    from server.app import create_app
    from server.bench import BenchSettings, chats
    from server.bench import bench as load_test
    from server.settings import Settings

    many, reply = bench.shape.many, bench.shape.reply
    settings = BenchSettings(
        requests=many, warmup=0, concurrency=many, prompt_words=bench.shape.prompt, max_tokens=reply,
        principle="w5 " * bench.shape.principle, alignment_ratio=RATIO,
    )  # fmt: skip
    rate = rate_alone(bench, loaded, chats(settings, "random"))
    tidy()  # two caches of 90 % of what is free don't fit

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = create_app(new_engine(bench, loaded), Settings())
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.1)
        settings.url = f"http://127.0.0.1:{port}"
        result = asyncio.run(load_test(settings))
    finally:
        server.should_exit = True
        thread.join()
    assert not result["failures"], result["failures"][:3]
    bench.rates["over HTTP, tokens/s"] = result["tokens_per_s"]
    bench.values["256 streams over HTTP, tokens/s of the engine's alone"] = result["tokens_per_s"] / rate


def rate_alone(bench: Bench, loaded: LoadedModel, bodies: list[Any]) -> float:
    """Tokens a second of the engine for the same requests."""
    from alignment_core import Principle

    engine = new_engine(bench, loaded)
    prompts = [engine.prompts.build(b["messages"], [Principle(b["principle"], ratio=RATIO)]) for b in bodies]
    replies = start(engine, prompts, replace(GREEDY, max_tokens=bench.shape.reply, ignore_eos=False))
    seconds = bench.timed(lambda: finish(engine))
    return sum(map(len, replies)) / seconds


# The run


def tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def reported(bench: Bench, name: str) -> Iterator[None]:
    """A measurement that fails leaves its rows unmeasured, and the others alone."""
    started = time.perf_counter()
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        bench.failures[name] = f"{type(error).__name__}: {error}"
    tidy()
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def result(bench: Bench) -> dict[str, Any]:
    rows = {}
    for name, (kind, goal) in GOALS.items():
        value = bench.values.get(name)
        met = None if value is None else value >= goal if kind == ">=" else value <= goal
        rows[name] = {"value": value, "goal": f"{kind} {goal}", "met": met}
    cuda = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
        },
        "shape": bench.shape.model,
        "ratios": rows,
        "measured": bench.rates,
        "failures": bench.failures,
    }


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="*", help="measurements, by their functions' names")
    options = parser.parse_args(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, TINY if options.tiny else LARGE)
    wanted = options.only

    for measure in (correctness, invariance, attention):
        if wanted is None or measure.__name__ in wanted:
            with reported(bench, measure.__name__):
                measure(bench)
    of_a_model = (speed, over_http, guided_generate, continuous_batching, prompt_lookup)
    for measure_model in of_a_model:  # prompt_lookup last: it changes the weights
        if wanted is None or measure_model.__name__ in wanted:
            with reported(bench, measure_model.__name__):
                dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
                measure_model(bench, random_model(bench.shape.model, dtype, device))

    found = result(bench)
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    for name, row in found["ratios"].items():
        value = "not measured" if row["value"] is None else f"{row['value']:.3g}"
        print(f"{name:65} {value:>12}  {row['goal']:8} {({True: 'met', False: 'MISSED', None: ''})[row['met']]}")


if __name__ == "__main__":
    main()

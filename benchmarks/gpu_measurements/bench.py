"""The device, the shapes, and random models on it."""

import copy
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from gpu_measurements.parts import without
from linalign import Engine, EngineConfig, Prompt, SamplingParams
from linalign.alignment_core.loading.loader import LoadedModel

RATIO = 2.0
GREEDY = SamplingParams(temperature=0, ignore_eos=True)
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")


class NotHere(Exception):
    """This kind of device has no such thing."""


@dataclass(frozen=True)
class Shape:
    """A model, the load put on it in tokens, the crowds that stand for 64 and 256, and rounds of each measurement."""

    model: dict[str, int]
    prompt: int = 512
    principle: int = 32
    reply: int = 256
    some: int = 64
    many: int = 256
    rounds: int = 3


LARGE = Shape(  # that of Llama-3.1-8B
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


class Bench:
    """What the measurements of one process share.

    without: the part of the engine that a retry leaves out. partial: what the present measurement has found so far,
    for the report if it fails.
    """

    def __init__(self, tiny: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.shape = TINY if tiny else LARGE
        self.without: str | None = None
        self.partial: dict[str, Any] = {}

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def loaded(self) -> LoadedModel:
        """The large model in bfloat16, made on the device."""
        return random_model(self.shape.model, torch.bfloat16 if self.on_cuda else torch.float32, self.device)

    @cached_property
    def engine(self) -> Engine:
        """Over `loaded`, for the most sequences that are measured; without drafts."""
        return self.new_engine()

    def new_engine(self, **changes: Any) -> Engine:
        pages = {} if self.on_cuda else {"num_pages": 4000}
        sizes = {"max_num_seqs": 2 * self.shape.many, "max_model_len": 2048, "num_speculative_tokens": 0, **pages}
        if self.without == "graphs":  # for good: other measurements go on with this engine
            changes["enforce_eager"] = True
        with without(self.without):
            return Engine(self.loaded, EngineConfig(static=True, **sizes | changes))

    def timed(self, function: Callable[[], object]) -> float:
        """Seconds, on the device's clock where it has one."""
        if not self.on_cuda:
            started = time.perf_counter()
            function()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def median(self, function: Callable[[], float], rounds: int | None = None) -> float:
        return statistics.median(function() for _ in range(rounds or self.shape.rounds))

    def prompt(self, number: int, aligned: bool, vocab_size: int | None = None) -> Prompt:
        """Random words, other ones for each number: no two prompts have a prefix in common."""
        shape, chance = self.shape, torch.Generator().manual_seed(number)
        most = vocab_size or shape.model["vocab_size"]
        ids = tuple(torch.randint(10, most, (shape.prompt,), generator=chance).tolist())
        principle = tuple(torch.randint(10, most, (shape.principle,), generator=chance).tolist())
        principled = (*ids[:5], *principle, *ids[5:])
        return Prompt((principled,), (1.0,), (RATIO,), ids) if aligned else Prompt((principled,))

    def synchronize(self) -> None:
        """Raises RuntimeError where the device has failed meanwhile."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def tidy(self) -> None:
        """End all requests and free memory. Raises where that can't be done: another process has to go on."""
        if "engine" in vars(self):
            drop(self.engine)
            assert self.engine.pool.num_free == self.engine.pool.num_pages, "pages are lost"
        gc.collect()
        self.synchronize()
        if self.on_cuda:
            torch.cuda.empty_cache()


def about(bench: Bench) -> dict[str, Any]:
    """The machine; the first use of the device can take seconds."""
    started = time.perf_counter()
    torch.ones(1, device=bench.device)
    bench.synchronize()
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "shape": "tiny" if bench.shape is TINY else "large",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "first use, s": time.perf_counter() - started,
    }
    if bench.on_cuda:
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["memory, bytes"] = properties.total_memory
        found["compute capability"] = f"{properties.major}.{properties.minor}"
    return found


def random_model(shape: dict[str, int], dtype: torch.dtype, device: torch.device, scale: float = 0.02) -> LoadedModel:
    """Random weights, made on the device: other ones on each kind of device."""
    loaded = empty_model(shape, dtype, device, scale)
    chance = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(0, scale, generator=chance)
    return loaded


def exact_model(
    shape: dict[str, int], dtype: torch.dtype, device: torch.device, scale: float, seed: int
) -> LoadedModel:
    """Uniform weights in ± scale, the same to the bit on every machine: from the bits of PCG64, whose stream NumPy
    guarantees (NEP 19). The rotary embedding stays float32, as a checkpoint's does.
    """
    loaded = empty_model(shape, torch.float32, torch.device("cpu"), scale)
    bits = np.random.PCG64(seed)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
                continue
            uniform = (bits.random_raw(parameter.numel()) >> 40).astype(np.float32) * np.float32(2.0**-23) - 1
            parameter.copy_(torch.from_numpy(uniform * np.float32(scale)).view(parameter.shape))
    rotary = copy.deepcopy(loaded.model.model.rotary_emb)
    loaded.model.to(device, dtype)
    loaded.model.model.rotary_emb = rotary.to(device)
    return loaded


def empty_model(shape: dict[str, int], dtype: torch.dtype, device: torch.device, scale: float) -> LoadedModel:
    """A model whose weights are to be filled in, and a tokenizer whose words are w0, w1, …"""
    config = LlamaConfig(**shape, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, initializer_range=scale)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device)
    # what is no parameter and was made on the meta device: the frequencies of the rotary embedding
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    names = [f"w{i}" for i in range(shape["vocab_size"])]
    names[10 : 10 + len(WORDS)] = WORDS
    words = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()  # so that llguidance knows what bytes a word has
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


def start_decodes(engine: Engine, prompts: list[Prompt], max_tokens: int) -> None:
    """Submit all and run until each has drawn a token; all go on for `max_tokens` at least, the first for longer."""
    num_rows = sum(len(prompt.branches) for prompt in prompts)
    num_tokens = sum(len(ids) for prompt in prompts for ids in prompt.branches)
    steps = num_tokens // max(1, engine.scheduler.max_num_batched_tokens - num_rows) + len(prompts)
    start(engine, prompts, replace(GREEDY, max_tokens=max_tokens + steps))
    running = engine.scheduler.running
    while len(running) < len(prompts) or not all(sequence.output_ids for sequence in running):
        if not engine.step():
            raise RuntimeError(f"replies have ended before all of {len(prompts)} had begun")


def drop(engine: Engine) -> None:
    """End all requests."""
    for request_id in list(engine.loop.requests):
        engine.abort(request_id)
    finish(engine)


def forget(engine: Engine) -> None:
    """Let no later prompt find a prefix."""
    engine.pool._page_of.clear()
    engine.pool._hash_of.clear()

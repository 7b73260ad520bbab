"""The device, the shapes, and random models."""

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
    """A measurement that this kind of device does not support."""


@dataclass(frozen=True)
class Shape:
    """A model and the load on it; lengths in tokens."""

    model: dict[str, int]  # fields of its LlamaConfig
    prompt: int = 512
    principle: int = 32
    reply: int = 256
    some: int = 64  # requests of the measurements called "64"
    many: int = 256  # requests of the measurements called "256"
    rounds: int = 3  # of each measurement


LARGE = Shape(  # the shape of Llama-3.1-8B
    {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
)
SMALL = {  # small enough for the float64 oracle on a CPU
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
TINY = Shape(SMALL | {"vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 2}, 24, 4, 16, 3, 4, 1)


class Bench:
    """State that the measurements of one process share.

    without: The part of the engine that a retry leaves out, or None.
    partial: Results so far of the current measurement, for the report if it fails.
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
        """The large model in bfloat16 (float32 on a CPU), created on the device."""
        return random_model(self.shape.model, torch.bfloat16 if self.on_cuda else torch.float32, self.device)

    @cached_property
    def engine(self) -> Engine:
        """An engine with `loaded`, without drafts, for the most sequences that are measured."""
        return self.new_engine()

    def new_engine(self, **changes: Any) -> Engine:
        pages = {} if self.on_cuda else {"num_pages": 4000}
        sizes = {"max_num_seqs": 2 * self.shape.many, "max_model_len": 2048, "num_speculative_tokens": 0, **pages}
        if self.without == "graphs":  # permanent, because later measurements use this engine too
            changes["enforce_eager"] = True
        with without(self.without):
            return Engine(self.loaded, EngineConfig(static=True, **sizes | changes))

    def timed(self, function: Callable[[], object]) -> float:
        """Seconds that the function takes, on the device's clock if it has one."""
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
        """A prompt of random words that depend on `number`, so that no two prompts have a common prefix."""
        shape, generator = self.shape, torch.Generator().manual_seed(number)
        most = vocab_size or shape.model["vocab_size"]
        ids = tuple(torch.randint(10, most, (shape.prompt,), generator=generator).tolist())
        principle = tuple(torch.randint(10, most, (shape.principle,), generator=generator).tolist())
        principled = (*ids[:5], *principle, *ids[5:])
        return Prompt((principled,), (1.0,), (RATIO,), ids) if aligned else Prompt((principled,))

    def synchronize(self) -> None:
        """Wait for the device. Raises RuntimeError if it has failed."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def tidy(self) -> None:
        """End all requests and free memory. Raises if that fails; then a new process must continue."""
        if "engine" in vars(self):
            drop(self.engine)
            assert self.engine.pool.num_free == self.engine.pool.num_pages, "pages are lost"
        gc.collect()
        self.synchronize()
        if self.on_cuda:
            torch.cuda.empty_cache()


def about(bench: Bench) -> dict[str, Any]:
    """The machine, and the time of the first use of the device, which can be seconds."""
    started = time.perf_counter()
    torch.ones(1, device=bench.device)
    bench.synchronize()
    facts: dict[str, Any] = {
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
        facts["device"] = properties.name
        facts["memory, bytes"] = properties.total_memory
        facts["compute capability"] = f"{properties.major}.{properties.minor}"
    return facts


def random_model(shape: dict[str, int], dtype: torch.dtype, device: torch.device, scale: float = 0.02) -> LoadedModel:
    """A model with normal random weights, created on the device; each kind of device gets other values."""
    loaded = empty_model(shape, dtype, device, scale)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(0, scale, generator=generator)
    return loaded


def exact_model(
    shape: dict[str, int], dtype: torch.dtype, device: torch.device, scale: float, seed: int
) -> LoadedModel:
    """A model with uniform weights in ± scale, bit-identical on every machine: from the bits of PCG64, whose stream
    NumPy guarantees (NEP 19). The rotary embedding stays float32, as when a checkpoint is loaded.
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
    """A model with uninitialised weights, and a tokenizer with the words w0, w1, …"""
    config = LlamaConfig(**shape, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, initializer_range=scale)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device)
    # Recreate the rotary embedding's frequencies, which are buffers on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    names = [f"w{i}" for i in range(shape["vocab_size"])]
    names[10 : 10 + len(WORDS)] = WORDS
    words = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()  # tells llguidance the bytes of a word
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return LoadedModel("random", model.eval(), fast, 8192, frozenset({2}))


def finish(engine: Engine) -> None:
    while engine.step():
        pass


def start(engine: Engine, prompts: list[Prompt], params: SamplingParams) -> list[list[int]]:
    """Submit all prompts. Returns a list per prompt, to which its tokens are appended as they arrive."""
    replies: list[list[int]] = [[] for _ in prompts]
    for prompt, reply in zip(prompts, replies, strict=True):
        engine.submit(prompt, params, lambda output, reply=reply: reply.extend(output.token_ids))  # type: ignore[misc]
    return replies


def start_decodes(engine: Engine, prompts: list[Prompt], max_tokens: int) -> None:
    """Submit all prompts and run until each has drawn a token. Every reply then continues for at least `max_tokens`."""
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
    """Clear the prefix cache."""
    engine.pool._page_of.clear()
    engine.pool._hash_of.clear()

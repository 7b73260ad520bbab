"""Numbers of GPUs and models."""

from dataclasses import dataclass
from typing import Any

BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "fp8": 8, "int8": 8, "int4": 4.25}  # scales included


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU. The values with defaults are assumptions."""

    memory: float  # GB
    bandwidth: float  # of its memory, GB/s
    tflops: float  # dense, 16 bits
    link: float  # bandwidth to other GPUs, GB/s in one direction
    latency: float = 15  # of an all-reduce of a few bytes, µs
    bandwidth_share: float = 0.8  # share of the bandwidth that is reached
    tflops_share: float = 0.7  # share of the TFLOPS that is reached
    overhead: float = 1.0  # additional time of a step, ms
    reserve: float = 3.0  # memory for the CUDA context, graphs and a full step, GB


PCIE = {"link": 32, "latency": 40}  # fourth generation
GPUS = {  # from NVIDIA's data sheets, which give TFLOPS with sparsity (twice these) and links in both directions
    "l4": Gpu(24, 300, 121, **PCIE),
    "l40s": Gpu(48, 864, 362, **PCIE),
    "a100": Gpu(80, 2039, 312, 300),  # SXM, 80 GB
    "h100": Gpu(80, 3350, 989, 450),  # SXM
    "h200": Gpu(141, 4800, 989, 450),
    "b200": Gpu(180, 7700, 2250, 900),
}


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a model. A tied embedding counts as the output."""

    embedding: int  # parameters
    output: int  # parameters
    layers: int  # parameters of all layers
    num_layers: int
    hidden: int
    query: int  # query heads × their dimension
    kv: int  # key heads × their dimension
    kv_heads: int
    bits: float  # per weight in the layers
    output_bits: float  # per weight of output and embedding
    kv_bits: float  # per number in the KV cache

    @classmethod
    def of(cls, config: dict[str, Any], quantization: str | None = None, kv_dtype: str | None = None) -> "Model":
        """The sizes from a checkpoint's config. Raises ValueError for models with experts."""
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
            output_bits=BITS[dtype],  # linalign does not quantise the output layer
            kv_bits=BITS[kv_dtype or dtype],
        )

    def read_bytes(self, size: int = 1) -> float:
        """Bytes of weights that each of `size` GPUs reads per step."""
        return (self.layers * self.bits + self.output * self.output_bits) / 8 / size

    def weight_bytes(self, size: int = 1) -> float:
        """Bytes of weights that each GPU holds. The embedding is not split."""
        return self.read_bytes(size) + self.embedding * self.output_bits / 8

    def kv_bytes(self, size: int = 1) -> float:
        """Bytes of one token in one branch, all layers, on each GPU."""
        return 2 * self.num_layers * self.kv * self.kv_bits / 8 / size

    def flops(self, tokens: float, context: float, logits: float) -> float:
        """Operations for `tokens` query tokens that see `context` tokens each, and for `logits` lines of logits."""
        return 2 * (tokens * (self.layers + 2 * self.num_layers * self.query * context) + logits * self.output)

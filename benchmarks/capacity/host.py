"""A replica: how many pages it has, and how long its steps take."""

import math
from dataclasses import dataclass

from benchmarks.capacity.hardware import Gpu, Model
from benchmarks.capacity.load import PAGE_SIZE

CHUNK = 2048  # max_num_batched_tokens on a GPU
UTILIZATION = 0.9  # gpu_memory_utilization


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

"""A replica: its number of pages, and the duration of its steps."""

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
        """Pages of the KV cache; negative if the weights do not fit."""
        free_bytes = (self.gpu.memory - self.gpu.reserve) * 1e9 - self.model.weight_bytes(self.size)
        return math.floor(free_bytes * UTILIZATION / (PAGE_SIZE * self.model.kv_bytes(self.size)))

    def seconds(self, moved: float, flops: float) -> float:
        """Seconds to move bytes and to compute operations on each GPU, assuming that these do not overlap."""
        gpu = self.gpu
        return moved / (gpu.bandwidth * 1e9 * gpu.bandwidth_share) + flops / (gpu.tflops * 1e12 * gpu.tflops_share)

    def all_reduces(self, tokens: float, steps: float) -> float:
        """Seconds of two ring all-reduces per layer."""
        if self.size == 1:
            return 0
        moved = 2 * (self.size - 1) / self.size * tokens * self.model.hidden * 2
        return 2 * self.model.num_layers * (steps * self.gpu.latency * 1e-6 + moved / (self.gpu.link * 1e9))

    def step(self, rows: float, context: float) -> float:
        """Seconds of a decode step with this number of rows; context: Tokens that each row sees."""
        model, size = self.model, self.size
        moved = model.read_bytes(size) + rows * context * model.kv_bytes(size)
        # Without tensor parallelism the host runs a step ahead of the device; with it nothing hides the host's work.
        overhead = self.gpu.overhead * (1 if size == 1 else 2) * 1e-3
        return self.seconds(moved, model.flops(rows, context, rows) / size) + self.all_reduces(rows, 1) + overhead

    def prefill(self, tokens: float, context: float, rows: int) -> float:
        """Seconds that `tokens` prompt tokens add to steps. context: Final length of their branch, in tokens."""
        mean_context = max(context - tokens / rows / 2, context / 2)
        flops = self.model.flops(tokens, mean_context, rows) / self.size
        return self.seconds(0, flops) + self.all_reduces(tokens, math.ceil(tokens / CHUNK))

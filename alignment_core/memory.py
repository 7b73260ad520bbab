"""How many pages of KV cache the memory holds."""

import logging

import psutil
import torch

from linalign.alignment_core.decoding.static_sampler import draw_everything
from linalign.alignment_core.engine_config import EngineConfig
from linalign.alignment_core.execution.model_runner import ModelRunner

log = logging.getLogger(__name__)


def pages_that_fit(runner: ModelRunner, config: EngineConfig, max_model_len: int, max_num_batched_tokens: int) -> int:
    """Enough pages for one aligned sequence of full length, or more if the memory allows. Raises ValueError if there is
    no memory for a page."""
    min_pages = 2 * -(-max_model_len // runner.page_size)
    if runner.model.device.type == "cuda":
        num_rows = max(runner.config.max_rows, 1)
        step_bytes = runner.activation_bytes(max_num_batched_tokens, num_rows, draw_everything)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(runner.model.device)
        budget = int((free - step_bytes) * config.gpu_memory_utilization)
    else:
        budget = max(min_pages * runner.page_bytes(), 1 << 30)
        budget = min(budget, psutil.virtual_memory().available // 2)  # available counts the caches of files
    pages = budget // runner.page_bytes()
    if pages < 1:
        raise ValueError("there is no memory left for a KV cache")
    if pages < min_pages:
        log.warning(
            "The KV cache holds %d tokens: too few for an aligned reply of full length", pages * runner.page_size
        )
    return pages

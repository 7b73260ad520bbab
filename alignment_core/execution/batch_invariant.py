"""Numbers that do not depend on the other rows of the batch.

The rounding of a matrix product depends on its kernel, and the kernel depends on the number of rows. So all linear
layers and norms get blocks of one fixed number of rows. (He et al., "Defeating Nondeterminism in LLM Inference", 2025,
show that kernels are the cause, not atomics. They write new kernels; this keeps the library's.)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

ROWS = 128  # smaller steps are hardly faster on a GPU, because it reads the same weights


def run_in_blocks(model: nn.Module) -> None:
    """Let every linear layer and norm of the model run on ROWS rows at a time.

    Raises ValueError for a model with other layers that have matrices.
    """
    for name, module in model.named_modules():
        matrices = [part for part in module.parameters(recurse=False) if part.dim() > 1]
        if matrices and not isinstance(module, nn.Linear | nn.Embedding):
            raise ValueError(f"batch_invariant is for models of linear layers; {name} is a {type(module).__name__}")
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__.endswith("Norm"):
            module.forward = in_blocks(module.forward)


def in_blocks(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A forward function in blocks. forward: Computes each row independently, [rows, K] to [rows, N]."""

    def blocked(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        padded = pad(rows, (0, 0, 0, -len(rows) % ROWS))
        out = torch.cat([forward(block) for block in torch.split(padded, ROWS)])
        return out[: len(rows)].view(*x.shape[:-1], out.shape[-1])

    return blocked

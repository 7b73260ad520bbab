"""Finds the attention parameters of every layer by running one token through the model.

transformers puts sliding windows into the attention mask. Backends without a mask get them only from those models that
also pass them as arguments. So this backend registers a mask function too. It evaluates the rule behind a mask at a few
positions, up to the longest context but without a mask of that size. The mask that it returns holds the rule's number.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from linalign.alignment_core.attention.paged_batch import LayerAttention

NAME = "linalign_probe"
MARK = 16  # the masks hold MARK, MARK + 1, …: exact in every dtype, and not found in masks that models build
UNSUPPORTED = ("s_aux", "position_bias")  # attention sinks, relative position biases
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@torch.inference_mode()
def probe(model: PreTrainedModel, reach: int, **arguments: object) -> dict[int, LayerAttention]:
    """The attention parameters of each layer that uses transformers' attention interface, by layer number.

    reach: Tokens of the longest context.
    arguments: More arguments of the model's forward pass.

    The model keeps this backend: set another one afterwards. Raises ValueError if a layer needs a kind of attention
    that no backend of ours supports.
    """
    recorder = _Probe(type(model).__name__, reach)
    AttentionInterface.register(NAME, recorder.attend)
    AttentionMaskInterface.register(NAME, recorder.mask)
    model.set_attn_implementation(NAME)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    is_compiled = any(module._compiled_call_impl for module in model.modules())  # by an earlier engine
    try:
        with torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext():
            model(input_ids=token, position_ids=token, use_cache=False, **arguments)
    except TypeError as error:
        if "paged" not in str(error):
            raise
        message = f"{recorder.name} does not pass its arguments on to transformers' attention interface"
        raise ValueError(message) from error
    return recorder.layers


class _Probe:
    """The backend. `layers` has the parameters of the layers that have called it. name: The model's, for messages."""

    def __init__(self, name: str, reach: int) -> None:
        self.name, self.layers = name, dict[int, LayerAttention]()
        self._reach = reach
        self._windows: list[int | None] = []

    def mask(self, q_length: int, kv_length: int, mask_function: MaskFunction, device: Any, **_: object) -> Tensor:
        """A mask filled with the number of its window, with the signature of transformers' AttentionMaskInterface."""
        self._windows.append(self._window_of(mask_function, device))
        mark = MARK + len(self._windows) - 1
        return torch.full((1, 1, q_length, kv_length), mark, dtype=torch.float32, device=device)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        paged: object,  # noqa: ARG002 - required, because the other backends need it
        **others: object,
    ) -> tuple[Tensor, None]:
        """Attention of one token to itself, with the signature of transformers' AttentionInterface."""
        self._check_support(key, value, others)
        window = sliding_window if attention_mask is None else self._window_in(attention_mask)
        self.layers[int(module.layer_idx)] = LayerAttention(scaling, window, softcap)  # type: ignore[arg-type]
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None

    def _check_support(self, key: Tensor, value: Tensor, others: Mapping[str, object]) -> None:
        unsupported = [name for name in UNSUPPORTED if others.get(name) is not None]
        if unsupported:
            features = ", ".join(unsupported)
            raise ValueError(f"{self.name} has attention features that can't be served yet: {features}")
        if key.shape != value.shape:
            sizes = f"{key.shape[1]} × {key.shape[-1]} and {value.shape[1]} × {value.shape[-1]}"
            raise ValueError(f"{self.name} has keys and values of different sizes, {sizes}, which can't be served yet")

    def _window_in(self, mask: Tensor) -> int | None:
        """The window whose number `mask` has put into this mask."""
        mark = float(mask.flatten()[0])
        if not (mark.is_integer() and 0 <= mark - MARK < len(self._windows)):
            raise ValueError(f"{self.name} uses its own attention masks, which can't be served")
        return self._windows[int(mark) - MARK]

    def _window_of(self, mask_function: MaskFunction, device: Any) -> int | None:
        """Number of tokens that a query sees, itself included; None if it sees all tokens up to itself."""

        def visible(query: int) -> Tensor:
            """Which of the keys up to one after the query's own position the query sees."""
            zero, keys = torch.zeros((), dtype=torch.int64, device=device), torch.arange(query + 2, device=device)
            return mask_function(zero, zero, torch.tensor(query, device=device), keys).expand(len(keys))

        last = self._reach
        window = int(visible(last).sum())
        for query in {0, 1, 2, window - 1, window, window + 1, 2 * window, last // 2, last - 1, last}:
            if query <= last:
                keys = torch.arange(query + 2, device=device)
                expected = (keys <= query) & (keys > query - window)
                if not torch.equal(visible(query), expected):
                    message = "has attention masks other than causal ones and sliding windows (for example chunks)"
                    raise ValueError(f"{self.name} {message}, which can't be served")
        return None if window > last else window

"""What every layer asks of its attention, found out by one token through the model.

Windows reach transformers' own attention in the mask, and backends without a mask only where a family passes them on
as arguments too. So this backend asks for masks: what it gets is a number that stands for a rule, and the rule is
judged at places beyond every window, without a mask of that size.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from linalign.alignment_core.attention.paged_batch import LayerAttention

NAME = "linalign_probe"
MARK = 16  # masks are filled with MARK, MARK + 1, …, which every dtype holds exactly, and no mask of a model's own
BEYOND = ("s_aux", "position_bias")  # attention sinks, relative position biases
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@torch.inference_mode()
def probe(model: PreTrainedModel, reach: int, **arguments: object) -> dict[int, LayerAttention]:
    """What each layer that uses transformers' attention interface asks for, by its number.

    reach: tokens of the longest context. arguments: of the model's forward pass, beside the token.
    Leaves the model with this backend. Raises ValueError for what no backend of ours can do.
    """
    asked = _Probe(type(model).__name__, reach)
    AttentionInterface.register(NAME, asked.attend)
    AttentionMaskInterface.register(NAME, asked.mask)
    model.set_attn_implementation(NAME)
    nothing = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    is_compiled = any(module._compiled_call_impl for module in model.modules())  # for an engine before this one
    try:
        with torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext():
            model(input_ids=nothing, position_ids=nothing, use_cache=False, **arguments)
    except TypeError as error:
        if "paged" not in str(error):
            raise
        told = f"{asked.name} does not pass its arguments on to transformers' attention interface"
        raise ValueError(told) from error
    return asked.layers


class _Probe:
    """name: of the model, for messages."""

    def __init__(self, name: str, reach: int) -> None:
        self.name, self.layers = name, dict[int, LayerAttention]()
        self._reach = reach
        self._windows: list[int | None] = []

    def mask(self, q_length: int, kv_length: int, mask_function: MaskFunction, device: Any, **_: object) -> Tensor:
        """In the shape of transformers' AttentionMaskInterface."""
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
        paged: object,  # noqa: ARG002 - must come, as the other backends need it
        **others: object,
    ) -> tuple[Tensor, None]:
        """One token attends to itself. In the shape of transformers' AttentionInterface."""
        self._refuse(key, value, others)
        window = sliding_window if attention_mask is None else self._marked(attention_mask)
        self.layers[int(module.layer_idx)] = LayerAttention(scaling, window, softcap)  # type: ignore[arg-type]
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None

    def _refuse(self, key: Tensor, value: Tensor, others: Mapping[str, object]) -> None:
        beyond = [name for name in BEYOND if others.get(name) is not None]
        if beyond:
            raise ValueError(f"{self.name} has an attention that can't be served yet: {', '.join(beyond)}")
        if key.shape != value.shape:
            sizes = f"{key.shape[1]} × {key.shape[-1]} and {value.shape[1]} × {value.shape[-1]}"
            raise ValueError(f"{self.name} has keys and values of different sizes, {sizes}, which can't be served yet")

    def _marked(self, mask: Tensor) -> int | None:
        mark = float(mask.flatten()[0])
        if not (mark.is_integer() and 0 <= mark - MARK < len(self._windows)):
            raise ValueError(f"{self.name} makes masks of its own, which can't be served")
        return self._windows[int(mark) - MARK]

    def _window_of(self, mask_function: MaskFunction, device: Any) -> int | None:
        """How many tokens a query sees, itself included; None for all before it."""

        def seen(place: int) -> Tensor:
            zero, places = torch.zeros((), dtype=torch.int64, device=device), torch.arange(place + 2, device=device)
            return mask_function(zero, zero, torch.tensor(place, device=device), places).expand(len(places))

        last = self._reach
        window = int(seen(last).sum())
        for place in {0, 1, 2, window - 1, window, window + 1, 2 * window, last // 2, last - 1, last}:
            if place <= last:
                places = torch.arange(place + 2, device=device)
                expected = (places <= place) & (places > place - window)
                if not torch.equal(seen(place), expected):
                    raise ValueError(f"{self.name} masks its attention otherwise than by windows (chunks, say)")
        return None if window > last else window

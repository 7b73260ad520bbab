"""What the HTTP server asks of an engine, be it in this process or on other machines."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from linalign import Output, Prompt, SamplingParams
from linalign.alignment_core.output import Stats
from linalign.alignment_core.text.detokenizer import TokenBytes
from linalign.alignment_core.text.prompts import PromptBuilder


class EngineClient(Protocol):
    """`alignment_core.Engine` is one, `linalign.ray.remote_engine.RemoteEngine` another. Entered as the application
    starts, left as it ends; its coroutines are awaited on one event loop.
    """

    model_id: str
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_model_len: int
    prompts: PromptBuilder
    token_bytes: TokenBytes

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def refuse_early(self) -> None:
        """Raises EngineDead or EngineBusy where no request would be taken in; to be asked before work."""

    async def submit_async(
        self, prompt: Prompt, params: SamplingParams, on_output: Callable[[Output], None], n: int = 1
    ) -> int:
        """Queue a request for n choices; returns its id. Raises EngineDead, EngineBusy, InvalidRequest.

        on_output: called from any thread with every Output, each choice's last with a finish_reason, a usage and
        times; also where the coroutine is cancelled, but not where it raises anything else.
        """
        ...

    def abort(self, request_id: int) -> None:
        """End what is still going of a request."""

    async def check_health(self) -> None:
        """Raises EngineDead if no request would be served."""

    async def all_stats(self) -> dict[str, Stats]:
        """What is going on in each engine, by its name; the only one need not have any."""
        ...

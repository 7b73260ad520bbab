"""What the HTTP server needs of an engine, in this process or on other machines."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from linalign import Output, Prompt, SamplingParams
from linalign.alignment_core.output import Stats
from linalign.alignment_core.text.detokenizer import TokenBytes
from linalign.alignment_core.text.prompts import PromptBuilder


class EngineClient(Protocol):
    """`LocalEngine` is one, `linalign.ray.remote_engine.RemoteEngine` another. The application enters it at its start
    and leaves it at its end. Its coroutines run on one event loop.
    """

    model_id: str
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_model_len: int
    num_pages: int  # of the KV cache
    page_size: int  # tokens
    prompts: PromptBuilder
    token_bytes: TokenBytes

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def refuse_early(self) -> None:
        """Raises EngineDead or EngineBusy if any request would be refused. Call it before expensive work."""

    async def submit(
        self, prompt: Prompt, params: SamplingParams, on_output: Callable[[Output], None], n: int = 1
    ) -> int:
        """Queue a request for n choices; returns its id. Raises EngineDead, EngineBusy, InvalidRequest.

        on_output: called from any thread with every Output. The last one of each choice has a finish_reason, a usage
        and times. It is also called if the coroutine is cancelled, but not if it raises anything else.
        """
        ...

    def abort(self, request_id: int) -> None:
        """End the unfinished choices of a request."""

    async def check_health(self) -> None:
        """Raises EngineDead if no request would be served."""

    async def all_stats(self) -> dict[str, Stats]:
        """The stats of each engine by its name. A single engine may have the name ""."""
        ...

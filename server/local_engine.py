"""The engine of this process, as the HTTP server sees it."""

import asyncio
from collections.abc import Callable
from types import TracebackType

from linalign import Engine, Output, Prompt, SamplingParams, Stats
from linalign.alignment_core.output import terminal_output


class LocalEngine:
    """An EngineClient over an Engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.model_id = engine.model_id
        self.tokenizer = engine.tokenizer
        self.vocab_size = engine.vocab_size
        self.max_model_len = engine.max_model_len
        self.num_pages = engine.pool.num_pages
        self.page_size = engine.pool.page_size
        self.prompts = engine.prompts
        self.token_bytes = engine.token_bytes

    def __enter__(self) -> "LocalEngine":
        self.engine.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.stop()

    def refuse_early(self) -> None:
        self.engine.refuse_early()

    async def submit(
        self, prompt: Prompt, params: SamplingParams, on_output: Callable[[Output], None], n: int = 1
    ) -> int:
        """`Engine.submit` in a thread, because a structure may have to be compiled. If the coroutine is cancelled,
        on_output still gets the end of every choice.
        """

        def end(submitted: asyncio.Future[int]) -> None:
            if submitted.exception() is None:
                self.engine.abort(submitted.result())
                return
            for choice in range(n):
                on_output(terminal_output(prompt, choice, "abort"))

        pool = self.engine.grammars.pool(params.structure) if params.structure else None
        loop = asyncio.get_running_loop()
        submitted = loop.run_in_executor(pool, self.engine.submit, prompt, params, on_output, n)
        try:
            return await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(end)
            raise

    def abort(self, request_id: int) -> None:
        self.engine.abort(request_id)

    async def check_health(self) -> None:
        self.engine.ensure_accepting()

    async def all_stats(self) -> dict[str, Stats]:
        """One entry without a name."""
        return {"": self.engine.stats()}

"""OpenAI's objects of /v1/completions."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from linalign import Output, Prompt, TokenLogprob, Usage
from linalign.alignment_core.output import IMPOSSIBLE
from linalign.alignment_core.text.detokenizer import TextStream, special_ids
from linalign.server.engine_client import EngineClient
from linalign.server.exchange import Applied
from linalign.server.protocol.completions import CompletionRequest
from linalign.server.replies.events import DONE, FAILURES, Event, failure
from linalign.server.replies.objects import trace_object, usage_object
from linalign.server.replies.submission import Replies

PATH = "/v1/completions"


class TextCompletion:
    """Creates the reply of one text completion: `whole` for a single object, `events` for a stream.

    The choices of all prompts are numbered consecutively.
    """

    def __init__(
        self,
        engine: EngineClient,
        fingerprint: str,
        body: CompletionRequest,
        texts: Sequence[tuple[int, ...]],
        prompts: Sequence[Prompt],
        applied: Applied | None,
    ) -> None:
        """texts: The token ids of the request's prompts, without principles. applied: What they are aligned with."""
        self._applied = applied
        self._engine, self._body, self._texts, self._prompts, self._n = engine, body, texts, prompts, body.n or 1
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, outputs: Sequence[Sequence[Output]]) -> dict[str, Any]:
        choices = []
        for number, of_prompt in enumerate(outputs):
            for index in range(self._n):
                of_choice = [output for output in of_prompt if output.choice == index]
                text = self._echoed(number) + "".join(output.text for output in of_choice)
                reported = self._token_reports(number).of(of_choice)
                choices.append(self._choice(number * self._n + index, text, of_choice[-1].finish_reason, reported))
        usages = [[output.usage for output in of_prompt if output.usage] for of_prompt in outputs]
        return {**self._head, "choices": choices, "usage": _sum(usages, self._applied)}

    async def events(self, replies: Sequence[Replies]) -> AsyncIterator[Event]:
        options = self._body.stream_options
        include_usage = bool(options and options.include_usage)
        continuous = include_usage and bool(options and options.continuous_usage_stats)
        usages: list[list[Usage]] = [[] for _ in replies]
        counts = [[-len(prompt.given)] * self._n for prompt in self._prompts]
        num_prompt_tokens = sum(len(prompt.principled[0]) + len(prompt.given) for prompt in self._prompts)
        reporters = [[self._token_reports(number) for _ in range(self._n)] for number in range(len(replies))]

        def event(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> Event:
            if continuous and usage is None:
                drawn = sum(max(count, 0) for of_prompt in counts for count in of_prompt)
                usage = {
                    "prompt_tokens": num_prompt_tokens,
                    "completion_tokens": drawn,
                    "total_tokens": num_prompt_tokens + drawn,
                }
            return Event({**self._head, "choices": choices} | ({"usage": usage} if include_usage else {}))

        try:
            for number in range(len(replies)):
                if self._body.echo:
                    for index in range(self._n):
                        yield event([self._choice(number * self._n + index, self._echoed(number), None, {})])
            async for number, output in _merged(replies):
                counts[number][output.choice] += len(output.token_ids)
                if output.text or output.logprobs or output.finish_reason:
                    reported = reporters[number][output.choice].of([output])
                    index = number * self._n + output.choice
                    yield event([self._choice(index, output.text, output.finish_reason, reported)])
                if output.usage:
                    usages[number].append(output.usage)
            if include_usage:
                yield event([], _sum(usages, self._applied))
            yield DONE
        except FAILURES as error:
            yield failure(error, PATH)
        finally:
            for one in replies:
                one.abort()

    def _echoed(self, number: int) -> str:
        if not self._body.echo:
            return ""
        prompt = self._body.prompts()[number]
        return prompt if isinstance(prompt, str) else self._engine.tokenizer.decode(prompt)

    def _token_reports(self, number: int) -> "_TokenReports":
        prompt, ids = self._body.prompts()[number], self._texts[number]
        offsets = None
        if self._body.logprobs is not None:
            text = prompt if isinstance(prompt, str) else None
            offsets = _Offsets(self._engine.tokenizer, text, ids, is_scored=self._body.scores)
        return _TokenReports(self._engine, self._body, offsets, ids[0] if self._body.scores else None)

    @staticmethod
    def _choice(index: int, text: str, reason: str | None, reported: Mapping[str, Any]) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason, **reported}


class _TokenReports:
    """A choice's log-probabilities, in the form of OpenAI's completions, and its trace, if they are requested.

    first: The first token of a scored text, which has no log-probability; None for other texts.
    """

    def __init__(
        self, engine: EngineClient, body: CompletionRequest, offsets: "_Offsets | None", first: int | None
    ) -> None:
        self._token_bytes = engine.token_bytes
        self._body, self._offsets, self._first = body, offsets, first

    def of(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The fields of a choice for these outputs. Call this for all outputs in order."""
        reports: list[TokenLogprob | None] = [report for output in outputs for report in output.logprobs]
        ids = [report.token_id for report in reports if report]
        if self._first is not None:
            ids, reports, self._first = [self._first, *ids], [None, *reports], None
        fields: dict[str, Any] = {}
        if reports and self._offsets:
            fields["logprobs"] = self._logprobs(ids, reports, self._offsets)
        if self._body.traces:
            fields["alignment"] = [report and trace_object(report, self._token_bytes) for report in reports]
        return fields

    def _logprobs(
        self, ids: Sequence[int], reports: Sequence[TokenLogprob | None], offsets: "_Offsets"
    ) -> dict[str, Any]:
        return {
            "tokens": [self._name(id) for id in ids],
            "token_logprobs": [report and max(report.logprob, IMPOSSIBLE) for report in reports],
            "top_logprobs": [report and self._top(report) for report in reports],
            "text_offset": [offsets.next(id) for id in ids],
        }

    def _top(self, report: TokenLogprob) -> dict[str, float]:
        """The requested alternatives and the drawn token, without tokens that cannot be drawn."""
        pairs = [(report.token_id, report.logprob)] if report.logprob > IMPOSSIBLE else []
        return {self._name(id): value for id, value in (*report.top, *pairs)}

    def _name(self, id: int) -> str:
        """A token's text, or its bytes in OpenAI's notation if it is part of a character."""
        content = self._token_bytes(id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class _Offsets:
    """Character offsets of tokens in a choice's text. If the prompt is scored, its tokens are the first.

    text: The prompt, if the request has it as text. ids: Its tokens. A first token that the tokenizer has added has no
    text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: str | None, ids: Sequence[int], is_scored: bool
    ) -> None:
        decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        mark = tokenizer.bos_token
        is_added = text is not None and mark and ids[0] == tokenizer.bos_token_id and not text.startswith(mark)
        self._prompt = TextStream(decode)
        self._reply = TextStream(decode, before=ids, skipped=special_ids(tokenizer))
        self._num_added, self._num_prompt = int(is_scored and bool(is_added)), len(ids) if is_scored else 0
        self._num_returned = self._offset = 0

    def next(self, id: int) -> int:
        """The offset of the next token, which is `id`."""
        begin, place = self._offset, self._num_returned
        self._num_returned += 1
        if place >= self._num_added:
            self._offset += len((self._prompt if place < self._num_prompt else self._reply).add(id))
        return begin


async def _merged(replies: Sequence[Replies]) -> AsyncIterator[tuple[int, Output]]:
    """The outputs of several prompts as they arrive, each with the number of its prompt."""
    queue: asyncio.Queue[tuple[int, Output | BaseException | None]] = asyncio.Queue()

    async def forward(number: int, one: Replies) -> None:
        try:
            async for output in one:
                queue.put_nowait((number, output))
            queue.put_nowait((number, None))
        except FAILURES as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.ensure_future(forward(number, one)) for number, one in enumerate(replies)]
    try:
        num_unfinished = len(replies)
        while num_unfinished:
            number, output = await queue.get()
            if isinstance(output, BaseException):
                raise output
            num_unfinished -= output is None
            if output is not None:
                yield number, output
    finally:
        for task in tasks:
            task.cancel()


def _sum(usages: Sequence[Sequence[Usage]], applied: Applied | None) -> dict[str, Any]:
    """The usage of all prompts together. applied: What the request is aligned with."""
    objects = [usage_object(of_prompt, None) for of_prompt in usages]
    total = {name: sum(usage[name] for usage in objects) for name in objects[0] if name.endswith("_tokens")}
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in objects)
    details = [usage["alignment_details"] for usage in objects]
    return {
        **total,
        "prompt_tokens_details": {"cached_tokens": cached},
        "alignment_details": {
            **{name: sum(detail[name] for detail in details) for name in details[0]},
            "branches": max(detail["branches"] for detail in details),
            **(applied.details() if applied else {}),
        },
    }

"""What every endpoint does with a request first: it completes the request, and notes the fields that have no effect."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from fastapi import Request

from linalign import Prompt
from linalign.alignment_core.text.chat_template import RESERVED, Rendering
from linalign.server.alignment_sources import aligned
from linalign.server.core_errors import name_on
from linalign.server.exchange import exchange_of
from linalign.server.protocol.chat_request import ChatFields
from linalign.server.protocol.generation import AlignmentFields
from linalign.server.protocol.strict_json import InvalidBody
from linalign.server.state import state_of

Body = TypeVar("Body", bound=AlignmentFields)
OFF = (None, False, "none", "disabled")  # values of template variables that ask for nothing
ACCEPTED = {"metadata", "user"}  # bookkeeping that --strict-fields accepts too


def accept(body: Body, request: Request) -> Body:
    """The request with the alignment fields of all sources. Raises ModelNotFound, InvalidBody."""
    note_ignored(request, body.ignored)
    return aligned(body, request)


def note_ignored(request: Request, paths: Iterable[str]) -> None:
    """Name fields in the response's header. Raises InvalidBody with --strict-fields."""
    paths = list(dict.fromkeys(paths))
    refused = [path for path in paths if path not in ACCEPTED]
    if refused and state_of(request).settings.strict_fields:
        message = f"{refused[0]} has no effect, and this server refuses such fields"
        raise InvalidBody(message, refused[0], "unknown_field")
    exchange_of(request.scope).ignored += paths


def rendering_of(body: ChatFields, request: Request) -> Rendering:
    """How the template renders the chat, without variables that it does not use."""
    state, rendering = state_of(request), body.rendering()
    known = state.engine.prompts.variables | RESERVED
    variables, effort = dict(rendering.variables), body.reasoning_effort
    sets_thinking = effort is not None and "enable_thinking" in known
    if sets_thinking:
        variables.setdefault("enable_thinking", effort != "none")
    used = {name: value for name, value in variables.items() if name in known}
    ignored = {name for name, value in variables.items() if name not in known and value not in OFF}
    if sets_thinking or effort in state.settings.thinking_budgets:
        ignored.discard("reasoning_effort")
    path = request.scope["route"].path
    note_ignored(request, [name_on(path, f"variables.{name}") for name in variables if name in ignored])
    return replace(rendering, variables=used)


def note_if_shortened(request: Request, prompts: Iterable[Prompt], max_tokens: int | None, field: str) -> None:
    """Note max_tokens, which the endpoint calls `field`, if the context or the KV cache leaves less."""
    engine = state_of(request).engine
    for prompt in prompts if max_tokens else ():
        lengths = [len(ids) + len(prompt.given) for ids in prompt.branches]
        needed = [length + (max_tokens or 0) for length in lengths]
        num_pages = sum(-(-length // engine.page_size) for length in needed)  # rounded up
        fits = max(needed) <= engine.max_model_len and num_pages <= engine.num_pages
        if not fits and max(lengths) < engine.max_model_len:
            note_ignored(request, [name_on(request.scope["route"].path, field)])
            return

"""POST /v1/responses: a chat completion in the form of OpenAI's items and events."""

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic_core import PydanticCustomError

from linalign.server.exchange import exchange_of
from linalign.server.protocol.chat_request import ChatCompletionRequest
from linalign.server.protocol.responses import ResponsesRequest, items_of
from linalign.server.protocol.strict_json import InvalidBody
from linalign.server.replies.events import STREAMED, event_stream
from linalign.server.replies.model_response import PATH, Keep, ModelResponse
from linalign.server.replies.submission import gather
from linalign.server.routes.acceptance import accept, note_ignored
from linalign.server.routes.chat_completions import submit_chat
from linalign.server.routes.strict_route import StrictRoute
from linalign.server.state import state_of

router = APIRouter(route_class=StrictRoute)


@router.post(PATH, response_model=None, responses=STREAMED)
async def create_response(body: ResponsesRequest, request: Request) -> Response | dict[str, Any]:
    body = _resolved(accept(body, request), request)
    chat = _continued(body, request)
    keep = _keep(body, chat, request)
    replies, _, new_parser = await submit_chat(chat, request)
    response = ModelResponse(state_of(request).engine, body, new_parser(), exchange_of(request.scope).applied, keep)
    if body.stream:
        return event_stream(response.events(replies), [replies])
    outputs = await gather([replies], request)
    return response.whole(outputs[0]) if outputs else Response(status_code=499)


def _resolved(body: ResponsesRequest, request: Request) -> ResponsesRequest:
    """The request with the items that it refers to. Raises InvalidBody."""
    if not body.references:
        return body
    store = state_of(request).responses
    if store is None:
        message = "this server keeps no items: send the items themselves, as clients do with store: false, or start "
        raise InvalidBody(message + "the server with --responses-store N", "input", "unsupported_field")
    items = store.items(exchange_of(request.scope).key, body.references)
    for id in body.references:
        if id not in items:
            message = f"the item {id[:100]!r} is not kept (any more): send the item itself"
            raise InvalidBody(message, "input", "item_not_found")
    try:
        return body.resolved(items)
    except PydanticCustomError as error:
        raise InvalidBody(error.message(), (error.context or {})["param"], error.type) from error


def _continued(body: ResponsesRequest, request: Request) -> ChatCompletionRequest:
    """The chat completion, behind the conversation of `previous_response_id`. Raises InvalidBody."""
    if body.previous_response_id is None:
        return body.chat
    field, store = "previous_response_id", state_of(request).responses
    if store is None:
        message = "this server keeps no responses: send the whole input, or start the server with --responses-store N"
        raise InvalidBody(message, field, "unsupported_field")
    earlier = store.get(exchange_of(request.scope).key, body.previous_response_id)
    if earlier is None:
        message = f"the response {body.previous_response_id[:100]!r} is not kept (any more): send the whole input"
        raise InvalidBody(message, field, "previous_response_not_found")
    return body.continued(body.chat, earlier)


def _keep(body: ResponsesRequest, chat: ChatCompletionRequest, request: Request) -> Keep | None:
    """A function that keeps the response, if the server keeps responses and the request does not decline."""
    store, key = state_of(request).responses, exchange_of(request.scope).key
    if store is None:
        note_ignored(request, ["store"] if body.store else [])
        return None
    if body.store is False:
        return None

    def put(response_id: str, output: list[dict[str, Any]]) -> None:
        items = items_of(output)
        store.put(key, response_id, body.conversation(chat, items), items)

    return put

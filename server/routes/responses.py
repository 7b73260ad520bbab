"""POST /v1/responses: a chat completion in the form of OpenAI's items and events."""

from typing import Any

from fastapi import APIRouter, Request, Response

from linalign.server.exchange import exchange_of
from linalign.server.protocol.responses import ResponsesRequest
from linalign.server.replies.events import STREAMED, event_stream
from linalign.server.replies.model_response import PATH, ModelResponse
from linalign.server.replies.submission import gather
from linalign.server.routes.acceptance import accept
from linalign.server.routes.chat_completions import submit_chat
from linalign.server.routes.strict_route import StrictRoute
from linalign.server.state import state_of

router = APIRouter(route_class=StrictRoute)


@router.post(PATH, response_model=None, responses=STREAMED)
async def create_response(body: ResponsesRequest, request: Request) -> Response | dict[str, Any]:
    state = state_of(request)
    body = accept(body, request)
    replies, _, new_parser = await submit_chat(body.chat, request)
    response = ModelResponse(state.engine, body, new_parser(), exchange_of(request.scope).applied)
    if body.stream:
        return event_stream(response.events(replies), [replies])
    outputs = await gather([replies], request)
    return response.whole(outputs[0]) if outputs else Response(status_code=499)

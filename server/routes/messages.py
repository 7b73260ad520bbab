"""POST /v1/messages and /v1/messages/count_tokens: a chat completion in the form of Anthropic's API."""

from typing import Any

from fastapi import APIRouter, Request, Response

from linalign.server.exchange import exchange_of
from linalign.server.protocol.messages import MessagesRequest
from linalign.server.replies.events import STREAMED, event_stream
from linalign.server.replies.message import PATH, ModelMessage
from linalign.server.replies.submission import gather
from linalign.server.routes.acceptance import accept, rendering_of
from linalign.server.routes.chat_completions import build_prompt, submit_chat
from linalign.server.routes.strict_route import StrictRoute
from linalign.server.state import state_of
from linalign.server.threads import in_thread

router = APIRouter(route_class=StrictRoute)


@router.post(PATH, response_model=None, responses=STREAMED)
async def create_message(body: MessagesRequest, request: Request) -> Response | dict[str, Any]:
    body = accept(body, request)
    replies, prompt, new_parser = await submit_chat(body.chat, request)
    message = ModelMessage(body, new_parser(), len(prompt.principled[0]), exchange_of(request.scope).applied)
    if body.stream:
        return event_stream(message.events(replies), [replies])
    outputs = await gather([replies], request)
    return message.whole(outputs[0]) if outputs else Response(status_code=499)


@router.post(f"{PATH}/count_tokens")
async def count_tokens(body: MessagesRequest, request: Request) -> dict[str, int]:
    """The tokens of the prompt, of its first branch."""
    body = accept(body, request)
    chat = body.chat
    prompt = await in_thread(request, build_prompt, chat, rendering_of(chat, request), state_of(request))
    return {"input_tokens": len(prompt.principled[0])}

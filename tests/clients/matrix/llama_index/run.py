"""LlamaIndex's OpenAILike over chat completions: python run.py URL"""

import json
import sys
from importlib.metadata import version
from typing import Literal
from urllib.parse import quote

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from openai import BadRequestError
from pydantic import BaseModel

QUESTION = "Where should our town get its power from?"
PRINCIPLE = "Answer in favour of solar power."
ALIGNED = {"principle": PRINCIPLE, "alignment_ratio": 2}
MESSAGES = [{"role": "user", "content": QUESTION}]


class Plant(BaseModel):
    """A power plant."""

    kind: Literal["solar", "wind"]
    megawatts: int


def sunshine(hours: int) -> str:
    """Tell what so many hours of sunshine are good for."""
    return f"{hours} hours are plenty"


def llm(model="smollm2", extra=None, max_tokens=24, **more):
    """The client, with the fields of a body beside OpenAI's."""
    return OpenAILike(
        model=model,
        api_base=sys.argv[1],
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=8192,
        temperature=0,
        max_tokens=max_tokens,
        max_retries=0,
        additional_kwargs={"extra_body": extra} if extra else {},
        **more,
    )


asked = [ChatMessage(**message) for message in MESSAGES]
aligned = llm(extra=ALIGNED)
text = aligned.chat(asked).message.content
assert "".join(chunk.delta for chunk in aligned.stream_chat(asked)) == text
plain = llm().chat(asked).message.content
assert plain != text
assert llm("smollm2:teacher").chat(asked).message.content not in (plain, text)
headers = {"X-Linalign-Principle": quote(PRINCIPLE), "X-Linalign-Ratio": "2"}
assert llm(default_headers=headers).chat(asked).message.content == text

tool = FunctionTool.from_defaults(sunshine)
long = llm(extra=ALIGNED, max_tokens=200)
called = long.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
(call,) = long.get_tool_calls_from_response(called)
assert call.tool_name == "sunshine"
assert isinstance(call.tool_kwargs["hours"], int)
*_, last = long.stream_chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
assert long.get_tool_calls_from_response(last)[0].tool_kwargs == call.tool_kwargs
result = ChatMessage(
    role="tool", content=tool(**call.tool_kwargs).content, additional_kwargs={"tool_call_id": call.tool_id}
)
turns = [*asked, called.message, result]
assert aligned.chat_with_tools([tool], chat_history=turns, tool_choice="none").message.content

typed = long.as_structured_llm(Plant)
assert isinstance(typed.chat(asked).raw, Plant)
typed = llm(extra=ALIGNED, max_tokens=200, should_use_structured_outputs=True).as_structured_llm(Plant)
whole = typed.chat(asked).raw
*_, last = typed.stream_chat(asked)
assert last.raw == whole
assert isinstance(whole, Plant)

form = {"type": "json_schema", "json_schema": {"name": "Plant", "schema": Plant.model_json_schema()}}
fields = {"user_msg": QUESTION, "response_format": form}
both = long.chat_with_tools([tool], tool_choice="none", **fields)
assert Plant.model_validate_json(both.message.content)
both = long.chat_with_tools([tool], tool_required=True, **fields)
assert isinstance(long.get_tool_calls_from_response(both)[0].tool_kwargs["hours"], int)

try:
    llm(extra={"alignment_ration": 2}).chat(asked)
except BadRequestError as error:
    assert "alignment_ratio" in str(error)
else:
    raise AssertionError("a misspelt field was accepted")

print(json.dumps({"version": version("llama-index-llms-openai-like"), "messages": MESSAGES, "text": text}))

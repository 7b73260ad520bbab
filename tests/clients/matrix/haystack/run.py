"""Haystack's OpenAIChatGenerator over chat completions: python run.py URL"""

import json
import os
import sys
from importlib.metadata import version
from typing import Literal
from urllib.parse import quote

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function
from haystack.utils import Secret
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


def generator(model="smollm2", extra=None, http=None, **kwargs):
    """The client, with the fields of a body beside OpenAI's."""
    return OpenAIChatGenerator(
        model=model,
        api_base_url=sys.argv[1],
        api_key=Secret.from_token("none"),
        max_retries=0,
        timeout=120,
        http_client_kwargs=http,
        generation_kwargs={"temperature": 0, "max_tokens": 24, "extra_body": extra, **kwargs},
    )


def reply(client, messages=None, **more):
    (message,) = client.run(messages or [ChatMessage.from_user(QUESTION)], **more)["replies"]
    return message


aligned = generator(extra=ALIGNED)
text = reply(aligned).text
pieces = []
assert reply(aligned, streaming_callback=lambda chunk: pieces.append(chunk.content)).text == text
assert "".join(pieces) == text
plain = reply(generator()).text
assert plain != text
assert reply(generator("smollm2:teacher")).text not in (plain, text)
headers = {"X-Linalign-Principle": quote(PRINCIPLE), "X-Linalign-Ratio": "2"}
assert reply(generator(http={"headers": headers})).text == text

tool = create_tool_from_function(sunshine)
caller = generator(extra=ALIGNED, max_tokens=200, tool_choice="required", parallel_tool_calls=False)
called = reply(caller, tools=[tool])
(call,) = called.tool_calls
assert call.tool_name == "sunshine"
assert isinstance(call.arguments["hours"], int)
streamed = reply(caller, tools=[tool], streaming_callback=lambda _: None)
assert streamed.tool_call.arguments == call.arguments
turns = [ChatMessage.from_user(QUESTION), called, ChatMessage.from_tool(tool.invoke(**call.arguments), origin=call)]
assert reply(generator(extra=ALIGNED, tool_choice="none"), turns, tools=[tool]).text

typed = generator(extra=ALIGNED, max_tokens=200, response_format=Plant)
assert Plant.model_validate_json(reply(typed).text)
fields = {"tools": [tool], "tools_strict": True}
both = reply(typed, generation_kwargs={"tool_choice": "none"}, **fields)
assert Plant.model_validate_json(both.text)
both = reply(typed, generation_kwargs={"tool_choice": "required", "parallel_tool_calls": False}, **fields)
assert isinstance(both.tool_call.arguments["hours"], int)

try:
    reply(generator(extra={"alignment_ration": 2}))
except BadRequestError as error:
    assert "alignment_ratio" in str(error)
else:
    raise AssertionError("a misspelt field was accepted")

print(json.dumps({"version": version("haystack-ai"), "messages": MESSAGES, "text": text}))

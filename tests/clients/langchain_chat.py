"""A LangChain chat with a principle. Usage: python langchain_chat.py URL"""

import asyncio
import json
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

QUESTION = "Where should our town get its power from?"


class Plant(BaseModel):
    """A power plant."""

    kind: str
    megawatts: int


@tool
def sunshine(hours: int) -> str:
    """Tell what so many hours of sunshine are good for."""
    return f"{hours} hours are plenty"


def chat(**more):
    principle = {"principle": "Answer in favour of solar power.", "alignment_ratio": 2}
    settings = {"model": "smollm2", "temperature": 0, "max_tokens": 60, "extra_body": principle} | more
    return ChatOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, **settings)


def main():
    whole = chat().invoke(QUESTION)
    assert whole.response_metadata["token_usage"]["alignment_details"]["branches"] == 2
    streamed = "".join(chunk.content for chunk in chat().stream(QUESTION))
    assert streamed == whole.content
    assert asyncio.run(chat().ainvoke(QUESTION)).content == whole.content

    plant = chat(max_tokens=200).with_structured_output(Plant, method="json_schema").invoke(QUESTION)
    assert isinstance(plant, Plant)

    model = chat(max_tokens=200).bind_tools([sunshine], tool_choice="required", parallel_tool_calls=False)
    called = model.invoke(QUESTION)
    (call,) = called.tool_calls
    result = ToolMessage(sunshine.invoke(call["args"]), tool_call_id=call["id"])
    last = chat(max_tokens=12).bind_tools([sunshine]).invoke([HumanMessage(QUESTION), called, result])
    assert last.content or last.tool_calls

    preset = chat(model="smollm2:concise", extra_body=None, max_tokens=12).invoke(QUESTION)
    assert preset.response_metadata["token_usage"]["alignment_details"]["branches"] == 2
    print(json.dumps({"text": whole.content[:20], "call": call["args"]}))


main()

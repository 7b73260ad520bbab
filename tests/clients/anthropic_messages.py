"""Anthropic's SDK over /v1/messages. Usage: python anthropic_messages.py URL (without /v1)"""

import json
import sys
from typing import Literal

import anthropic
from pydantic import BaseModel

QUESTION = "Where should our town get its power from?"
TOOL = {
    "name": "sunshine",
    "description": "Tell what so many hours of sunshine are good for.",
    "input_schema": {"type": "object", "properties": {"hours": {"type": "integer"}}, "required": ["hours"]},
}
client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)


class Plant(BaseModel):
    """A power plant."""

    kind: Literal["solar", "wind"]
    megawatts: int


def fields(extra=None, **more):
    body = {"temperature": 0, "principle": "Answer in favour of solar power.", "alignment_ratio": 2, **(extra or {})}
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": "smollm2", "max_tokens": 24, "messages": messages, "extra_body": body, **more}


def main():
    whole = client.messages.create(**fields())
    assert whole.usage.alignment_details["branches"] == 2
    with client.messages.stream(**fields()) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == whole.content[0].text == last.content[0].text
    assert last.stop_reason == whole.stop_reason == "max_tokens"

    choice = {"type": "any", "disable_parallel_tool_use": True}
    with client.messages.stream(**fields(tools=[TOOL], tool_choice=choice, max_tokens=100)) as stream:
        called = stream.get_final_message()
    (call,) = called.content
    assert (called.stop_reason, call.name, type(call.input["hours"])) == ("tool_use", "sunshine", int)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "plenty"}
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": called.content}]
    turns.append({"role": "user", "content": [result]})
    assert client.messages.create(**fields(messages=turns, tools=[TOOL])).content

    parsed = client.messages.parse(**fields(output_format=Plant, max_tokens=200))
    assert isinstance(parsed.parsed_output, Plant)

    counted = client.messages.count_tokens(model="smollm2", messages=[{"role": "user", "content": QUESTION}])
    assert counted.input_tokens > 10
    for extra, kind in (
        ({"alignment_ration": 2}, anthropic.BadRequestError),
        ({"model": "x"}, anthropic.NotFoundError),
    ):
        try:
            client.messages.create(**fields(extra))
        except kind as error:
            assert error.body["type"] == "error"
        else:
            raise AssertionError("a wrong field was accepted")
    headers = {"X-Linalign-Principle": "Answer%20in%20favour%20of%20solar%20power.", "X-Linalign-Ratio": "2"}
    by_header = client.messages.create(**fields(extra_body={"temperature": 0}, extra_headers=headers))
    assert by_header.content[0].text == text
    print(json.dumps({"text": text}))


main()

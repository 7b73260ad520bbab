"""Semantic Kernel's OpenAIChatCompletion over chat completions: python run.py URL"""

import asyncio
import json
import sys
from importlib.metadata import version
from typing import Literal
from urllib.parse import quote

from openai import AsyncOpenAI
from pydantic import BaseModel
from semantic_kernel import Kernel
from semantic_kernel.connectors.ai import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
from semantic_kernel.contents import ChatHistory
from semantic_kernel.exceptions import ServiceResponseException
from semantic_kernel.functions import kernel_function

QUESTION = "Where should our town get its power from?"
PRINCIPLE = "Answer in favour of solar power."
ALIGNED = {"principle": PRINCIPLE, "alignment_ratio": 2}
MESSAGES = [{"role": "user", "content": QUESTION}]
REQUIRED = FunctionChoiceBehavior.Required
hours = []


class Plant(BaseModel):
    """A power plant."""

    kind: Literal["solar", "wind"]
    megawatts: int


class Weather:
    """The tool."""

    @kernel_function
    def sunshine(self, hours_of_sun: int) -> str:
        """Tell what so many hours of sunshine are good for."""
        hours.append(hours_of_sun)
        return f"{hours_of_sun} hours are plenty"


def service(model="smollm2", **headers):
    client = AsyncOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=120, default_headers=headers)
    return OpenAIChatCompletion(ai_model_id=model, async_client=client)


def settings(extra=ALIGNED, max_tokens=24, **more):
    return OpenAIChatPromptExecutionSettings(temperature=0, max_tokens=max_tokens, extra_body=extra, **more)


def asked():
    return ChatHistory(messages=MESSAGES)


async def streamed(chosen, **more):
    stream = service().get_streaming_chat_message_content(asked(), chosen, **more)
    return "".join([str(chunk) async for chunk in stream if chunk])


async def main():
    text = str(await service().get_chat_message_content(asked(), settings()))
    assert await streamed(settings()) == text
    plain = str(await service().get_chat_message_content(asked(), settings(None)))
    assert plain != text
    preset = str(await service("smollm2:teacher").get_chat_message_content(asked(), settings(None)))
    assert preset not in (plain, text)
    headers = {"X-Linalign-Principle": quote(PRINCIPLE), "X-Linalign-Ratio": "2"}
    assert str(await service(**headers).get_chat_message_content(asked(), settings(None))) == text

    kernel = Kernel()
    kernel.add_plugin(Weather(), "weather")
    tools = {"max_tokens": 200, "parallel_tool_calls": False, "function_choice_behavior": REQUIRED()}
    history = asked()
    short = settings(**{**tools, "max_tokens": 30})
    answer = await service().get_chat_message_content(history, short, kernel=kernel)
    assert str(answer)
    assert [type(number) for number in hours] == [int]
    assert [message.role for message in history.messages] == ["user", "assistant", "tool"]
    await streamed(short, kernel=kernel)
    assert hours == [hours[0]] * 2

    typed = await service().get_chat_message_content(asked(), settings(max_tokens=200, response_format=Plant))
    assert Plant.model_validate_json(str(typed))
    assert Plant.model_validate_json(await streamed(settings(max_tokens=200, response_format=Plant)))
    both = settings(**tools, response_format=Plant)
    typed = await service().get_chat_message_content(asked(), both, kernel=kernel)
    assert Plant.model_validate_json(str(typed))
    assert len(hours) == 3

    try:
        await service().get_chat_message_content(asked(), settings({"alignment_ration": 2}))
    except ServiceResponseException as error:
        assert "alignment_ratio" in str(error)
    else:
        raise AssertionError("a misspelt field was accepted")
    print(json.dumps({"version": version("semantic-kernel"), "messages": MESSAGES, "text": text}))


asyncio.run(main())

"""OpenAI's Agents SDK over chat completions and over responses. Usage: python agents_sdk.py URL"""

import asyncio
import json
import sys
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI, BadRequestError
from pydantic import BaseModel

QUESTION = "Say yes."  # a short reply, because the SDK raises an error for one that max_tokens ends
ALIGNED = {"principle": "Answer in favour of solar power.", "alignment_ratio": 2}


class Plant(BaseModel):
    """A power plant."""

    kind: Literal["solar", "wind"]
    megawatts: int


calls = []


@function_tool(is_enabled=lambda *_: not calls)  # a small model would call it again and again
def sunshine(hours: int) -> str:
    """Tell what so many hours of sunshine are good for."""
    calls.append(hours)
    return f"{hours} hours are plenty"


def agent(model, extra=ALIGNED, **more):
    settings = {"temperature": 0, "max_tokens": 100, "extra_body": extra, "parallel_tool_calls": False}
    settings |= more.pop("settings", {})
    return Agent(name="Mayor", model=model, model_settings=ModelSettings(**settings), **more)


async def check(model):
    whole = await Runner.run(agent(model), QUESTION)
    streamed = Runner.run_streamed(agent(model), QUESTION)
    async for _ in streamed.stream_events():
        pass
    assert streamed.final_output == whole.final_output != ""

    typed = await Runner.run(agent(model, output_type=Plant), QUESTION)
    assert isinstance(typed.final_output, Plant)

    # With a typed result and tools, every request has both a schema and the tools.
    both = agent(model, tools=[sunshine], output_type=Plant, settings={"tool_choice": "required"})
    calls.clear()
    result = await Runner.run(both, QUESTION, max_turns=3)
    assert isinstance(result.final_output, Plant)
    assert len(calls) == 1

    turns = [*whole.to_input_list(), {"role": "user", "content": "Why?"}]
    assert (await Runner.run(agent(model), turns)).final_output
    try:
        await Runner.run(agent(model, extra={"alignment_ration": 2}), QUESTION)
    except BadRequestError as error:
        assert error.param == "alignment_ration"
    else:
        raise AssertionError("a misspelt field was accepted")
    return whole.final_output


async def main():
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
    texts = [await check(kind("smollm2", client)) for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel)]
    preset = await Runner.run(agent(OpenAIChatCompletionsModel("smollm2:concise", client), extra=None), QUESTION)
    assert preset.final_output != texts[0]
    print(json.dumps({"text": texts[0], "response": texts[1]}))


asyncio.run(main())

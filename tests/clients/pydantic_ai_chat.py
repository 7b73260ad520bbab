"""pydantic-ai over chat completions. Usage: python pydantic_ai_chat.py URL"""

import asyncio
import json
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, RunContext, Tool
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "Where should our town get its power from?"
ALIGNED = {"principle": "Answer in favour of solar power.", "alignment_ratio": 2}


class Plant(BaseModel):
    """A power plant."""

    kind: Literal["solar", "wind"]
    megawatts: int


def agent(name="smollm2", extra=ALIGNED, **more):
    model = OpenAIChatModel(name, provider=OpenAIProvider(base_url=sys.argv[1], api_key="none"))
    settings = {"temperature": 0, "max_tokens": 100, "extra_body": extra, "parallel_tool_calls": False}
    return Agent(model, instructions="You are a mayor.", model_settings=settings, retries=3, **more)


def sunshine(hours: int) -> str:
    """Tell what so many hours of sunshine are good for."""
    return f"{hours} hours are plenty"


async def only_in_the_first_step(context: RunContext, definition):
    """Offer the tool once, because a small model would call it again and again."""
    return definition if context.run_step == 1 else None


async def streamed():
    async with agent().run_stream(QUESTION) as result:
        return await result.get_output()


def main():
    whole = agent().run_sync(QUESTION)
    assert asyncio.run(streamed()) == whole.output != ""
    assert isinstance(agent(output_type=Plant).run_sync(QUESTION).output, Plant)  # as a call of a tool
    assert isinstance(agent(output_type=NativeOutput(Plant)).run_sync(QUESTION).output, Plant)  # as a format
    once = Tool(sunshine, prepare=only_in_the_first_step)
    assert isinstance(agent(output_type=Plant, tools=[once]).run_sync(QUESTION).output, Plant)
    assert isinstance(agent(output_type=NativeOutput(Plant), tools=[once]).run_sync(QUESTION).output, Plant)
    again = agent().run_sync("Why?", message_history=whole.all_messages())
    assert again.output
    try:
        agent(extra={"alignment_ration": 2}).run_sync(QUESTION)
    except ModelHTTPError as error:
        assert error.status_code == 400
        assert "alignment_ratio" in str(error.body)
    else:
        raise AssertionError("a misspelt field was accepted")
    preset = agent("smollm2:concise", extra=None).run_sync(QUESTION)
    assert preset.output != whole.output
    print(json.dumps({"text": whole.output}))


main()

"""DSPy's LM over chat completions: python run.py URL"""

import asyncio
import json
import os
import sys
from importlib.metadata import version
from typing import Literal
from urllib.parse import quote

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it fetches a list of prices

import dspy
from dspy.lm15 import (
    AccessPolicy,
    Config,
    FunctionTool,
    Message,
    ModelSupport,
    OpenAIChatCompat,
    ProviderDefinition,
    Request,
    ToolChoice,
    register_provider,
)
from dspy.utils.exceptions import LMInvalidRequestError
from pydantic import BaseModel

QUESTION = "Where should our town get its power from?"
PRINCIPLE = "Answer in favour of solar power."
ALIGNED = {"principle": PRINCIPLE, "alignment_ratio": 2}
HEADERS = {"X-Linalign-Principle": quote(PRINCIPLE), "X-Linalign-Ratio": "2"}
MESSAGES = [{"role": "user", "content": QUESTION}]


class Plant(BaseModel):
    """A power plant."""

    kind: Literal["solar", "wind"]
    megawatts: int


class Plan(dspy.Signature):
    """Choose a power plant."""

    question: str = dspy.InputField()
    plant: Plant = dspy.OutputField()


class PlanWithTools(Plan):
    """Choose a power plant."""

    tools: list[dspy.Tool] = dspy.InputField()
    tool_calls: dspy.ToolCalls = dspy.OutputField()


class Ask(dspy.Module):
    """A plain question, without the texts that DSPy's other modules add."""

    def forward(self, lm):
        return dspy.Prediction(text=lm(QUESTION)[0])


def sunshine(hours: int) -> str:
    """Tell what so many hours of sunshine are good for."""
    return f"{hours} hours are plenty"


def model(name="openai/smollm2", max_tokens=24, **more):
    fields = {"api_base": sys.argv[1], "api_key": "none", "temperature": 0, "max_tokens": max_tokens}
    return dspy.LM(name, **fields, timeout=120, cache=False, num_retries=0, **more)


async def streamed(module, **inputs):
    """The text of the chunks, and the result."""
    *chunks, result = [chunk async for chunk in dspy.streamify(module, async_streaming=True)(**inputs)]
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), result


text = model(**ALIGNED)(QUESTION)[0]
assert asyncio.run(streamed(Ask(), lm=model(**ALIGNED)))[0] == text
assert model(extra_headers=HEADERS)(QUESTION)[0] == text
plain = model()(QUESTION)[0]
assert plain != text
assert model("openai/smollm2:teacher")(QUESTION)[0] not in (plain, text)

required = {"tool_choice": "required", "parallel_tool_calls": False}
schema = {"type": "object", "properties": dspy.Tool(sunshine).args, "required": ["hours"]}
function = FunctionTool("sunshine", sunshine.__doc__, schema)
common = {"max_tokens": 24, "temperature": 0, "extensions": ALIGNED}
asked = Message.user(QUESTION)
config = Config(**common, tool_choice=ToolChoice("required", parallel=False))
called = model()(Request("openai/smollm2", (asked,), tools=(function,), config=config))
(call,) = called.tool_calls
assert isinstance(call.input["hours"], int)
turns = (asked, called.message, Message.tool(call.id, sunshine(**call.input)))
assert model()(Request("openai/smollm2", turns, config=Config(**common))).text

access = AccessPolicy(provider="linalign", base_url=sys.argv[1], headers=tuple(HEADERS.items()))
support = ModelSupport(function_calling=True, response_schema=True)
register_provider(ProviderDefinition.chat(access, compat=OpenAIChatCompat()), supports=support)
dspy.configure(lm=model("linalign/smollm2", max_tokens=200), adapter=dspy.JSONAdapter())
plan = dspy.Predict(Plan)(question=QUESTION).plant
assert isinstance(plan, Plant)
parts, result = asyncio.run(streamed(dspy.Predict(Plan), question=QUESTION))
assert json.loads(parts)["plant"] == result.plant.model_dump() == plan.model_dump()
both = {"question": QUESTION, "tools": [dspy.Tool(sunshine)]}
calls = dspy.Predict(PlanWithTools, **required)(**both).tool_calls.tool_calls
assert [type(call.args["hours"]) for call in calls] == [int]
assert isinstance(dspy.Predict(PlanWithTools, tool_choice="none")(**both).plant, Plant)

for lm in (model(alignment_ration=2), model(extra_body={"alignment_ration": 2})):
    try:
        lm(QUESTION)
    except LMInvalidRequestError as error:
        assert "alignment_ratio" in str(error)
    else:
        raise AssertionError("a misspelt field was accepted")

print(json.dumps({"version": version("dspy"), "messages": MESSAGES, "text": text}))

"""Inspect over chat completions and over responses: python run.py URL"""

import json
import sys
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Literal

from inspect_ai import Task
from inspect_ai import eval as run_eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, ResponseSchema, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool
from inspect_ai.util import json_schema
from pydantic import BaseModel

QUESTION = "Where should our town get its power from?"
ALIGNED = {"principle": "Answer in favour of solar power.", "alignment_ratio": 2}
HEADERS = {"X-Linalign-Principle": "Answer%20in%20favour%20of%20solar%20power.", "X-Linalign-Ratio": "2"}
NAME = "openai-api/linalign/smollm2"
LOGS = TemporaryDirectory()


class Plant(BaseModel):
    """A power plant."""

    kind: Literal["solar", "wind"]
    megawatts: int


@tool
def sunshine():
    async def execute(hours: int) -> str:
        """Tell what so many hours of sunshine are good for.

        Args:
            hours: The hours of sunshine.
        """
        return f"{hours} hours are plenty"

    return execute


def run(*solver, name=NAME, model_args=None, **config):
    """Return the log of an evaluation with one sample."""
    model_args = {"base_url": sys.argv[1], "api_key": "none", "max_retries": 0, **(model_args or {})}
    settings = {"temperature": 0, "max_tokens": 24, "max_retries": 0, "timeout": 120, **config}
    dataset = MemoryDataset([Sample(input=QUESTION, target="power")])
    task = Task(dataset=dataset, solver=[*solver, generate()], scorer=includes(), config=GenerateConfig(**settings))
    settings = {"display": "none", "acp_server": False, "ctl_server": False, "message_limit": 4}
    (log,) = run_eval(task, model=get_model(name, memoize=False, **model_args), log_dir=LOGS.name, **settings)
    return log


def turns(*solver, **options):
    log = run(*solver, **options)
    assert log.status == "success", log.error
    assert log.results.scores[0].metrics["accuracy"].value in (0, 1)
    return log.samples[0].messages


def check(aligned, wrong, **model_args):
    fields = {**aligned, "model_args": model_args}
    text = turns(**fields)[-1].text
    assert turns(**aligned, model_args={**model_args, "stream": True})[-1].text == text
    plain = turns(model_args=model_args)[-1].text
    teacher = turns(name=f"{NAME}:teacher", model_args=model_args)[-1].text
    assert len({text, plain, teacher}) == 3

    fields |= {"max_tokens": 100, "parallel_tool_calls": False}
    _, call, result, last = turns(use_tools(sunshine(), tool_choice="any"), **fields)
    assert call.tool_calls[0].function == "sunshine"
    assert result.text == f"{call.tool_calls[0].arguments['hours']} hours are plenty"
    assert last.text or last.tool_calls

    fields["response_schema"] = ResponseSchema(name="plant", json_schema=json_schema(Plant), strict=True)
    Plant.model_validate_json(turns(**fields)[-1].text)
    both = turns(use_tools(sunshine()), **fields)  # every request has both a schema and the tools
    assert both[1].tool_calls or Plant.model_validate_json(both[1].text)

    for stream in (False, True):
        log = run(**wrong, model_args={**model_args, "stream": stream})
        assert log.status == "error"
        assert "ratio" in log.error.message, log.error
    return text


text = check({"extra_body": ALIGNED}, {"extra_body": {"alignment_ration": 2}})
# With responses, this provider drops fields of extra_body that it does not know, so it uses headers.
wrong = {"extra_headers": {**HEADERS, "X-Linalign-Ratio": "much"}}
assert check({"extra_headers": HEADERS}, wrong, responses_api=True)
messages = [{"role": "user", "content": QUESTION}]
print(json.dumps({"version": version("inspect-ai"), "messages": messages, "text": text}))

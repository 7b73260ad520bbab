"""instructor over chat completions: python run.py URL"""

import json
import sys
from importlib.metadata import version
from typing import Literal

import instructor
from instructor.core import InstructorRetryException
from openai import OpenAI
from pydantic import BaseModel

QUESTION = "Where should our town get its power from?"
ALIGNED = {"principle": "Answer in favour of solar power.", "alignment_ratio": 2}
MESSAGES = [{"role": "user", "content": QUESTION}]


class Plant(BaseModel):
    """A power plant."""

    kind: Literal["solar", "wind"]
    megawatts: int


openai = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
fields = {"model": "smollm2", "messages": MESSAGES, "temperature": 0, "max_tokens": 200, "extra_body": ALIGNED}
fields["max_retries"] = 0

for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai, mode=mode)
    assert isinstance(client.create(response_model=Plant, **fields), Plant)
    *_, last = client.create_partial(response_model=Plant, **fields)
    assert last.kind in ("solar", "wind")

calls = instructor.from_openai(openai, mode=instructor.Mode.TOOLS)
plain = {**fields, "max_tokens": 24}
text = calls.create(response_model=None, **plain).choices[0].message.content
stream = calls.create(response_model=None, stream=True, **plain)
assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == text
preset = calls.create(response_model=None, **{**plain, "model": "smollm2:teacher", "extra_body": None})
assert preset.choices[0].message.content != text

try:
    calls.create(response_model=Plant, **{**fields, "extra_body": {"alignment_ration": 2}})
except InstructorRetryException as error:
    assert "alignment_ratio" in str(error)
else:
    raise AssertionError("a misspelt field was accepted")

print(json.dumps({"version": version("instructor"), "messages": MESSAGES, "text": text}))

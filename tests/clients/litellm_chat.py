"""A LiteLLM chat with a principle. Usage: python litellm_chat.py URL"""

import json
import sys

import litellm

REQUEST = {
    "model": "openai/smollm2",
    "api_base": sys.argv[1],
    "api_key": "none",
    "messages": [{"role": "user", "content": "Where should our town get its power from?"}],
    "temperature": 0,
    "max_tokens": 24,
    "extra_body": {"principle": "Answer in favour of solar power.", "alignment_ratio": 2},
}


def main():
    whole = litellm.completion(**REQUEST)
    text = whole.choices[0].message.content
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**REQUEST, stream=True))
    assert streamed == text
    plain = litellm.completion(**{**REQUEST, "extra_body": {}}).choices[0].message.content
    assert plain != text
    several = litellm.completion(**{**REQUEST, "temperature": 1, "n": 2, "seed": 3})
    assert len(several.choices) == 2
    preset = litellm.completion(**{**REQUEST, "model": "openai/smollm2:teacher", "extra_body": {}})
    assert preset.choices[0].message.content not in (plain, text)
    print(json.dumps({"text": text}))


main()

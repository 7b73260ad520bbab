"""Fields of requests that have no effect.

A field that no schema knows is ignored, and named in a response header, because SDKs, gateways and agents add fields
for other servers. It is an error if it looks like a misspelt field of ours, or if it would change the reply.
"""

import difflib
import re
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

HEADER = "X-Linalign-Ignored"
MAX_HEADER = 1000  # characters
MAX_NAME = 100  # characters that are compared and shown
MAX_CHECKED = 64  # unknown names of a request that are compared with known ones; each takes 0.1 ms of the event loop
MIN_NAME = 4  # characters of a name that can be a misspelling
IDENTIFIER = re.compile("(_i|I)ds?$")  # names of identifiers, which no field of ours resembles by mistake
SIMILAR = 0.8  # of difflib's ratio, from which a name is a misspelling
EMPTY: tuple[Any, ...] = (None, False, "", [], {})  # values that ask for nothing
# Names that begin so are ours alone, so that an unknown one would silently change nothing.
OURS = ("alignment", "principle")
# Names of OpenAI's fields, or of another gateway's, that ask for nothing on endpoints that do not have them.
HINTS = {"include", "metadata", "mode", "models", "parallel_tool_calls", "reasoning", "reasoning_effort"}
HINTS |= {"output_config", "speed", "store", "stream_options", "thinking", "text", "truncation", "user", "user_id"}
WITH_FORMAT = ("text", "output_config")  # hints, unless they hold a format of the reply
# Values without an effect of fields that other endpoints have.
NEUTRAL: dict[str, Any] = {"n": 1, "best_of": 1, "repetition_penalty": 1, "top_k": -1, "tool_choice": "auto"}
NEUTRAL |= {"modalities": ["text"], "response_format": {"type": "text"}}
# Fields of other servers that would change the reply, and their values without an effect.
ELSEWHERE: dict[str, Any] = {
    **dict.fromkeys(("extra_body", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar")),
    **dict.fromkeys(("json_schema", "prompt_logprobs", "allowed_token_ids", "bad_words", "logits_processors")),
    **dict.fromkeys(("truncate_prompt_tokens", "chat_template", "documents", "negative_prompt")),
    **dict.fromkeys(("top_a", "mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range"), 0),
    **dict.fromkeys(("repeat_penalty", "length_penalty", "typical_p", "tfs", "guidance_scale"), 1),
    "include_stop_str_in_output": False,
    "n_predict": -1,
    "skip_special_tokens": True,
    "use_beam_search": False,
}
INSTEAD = {
    "extra_body": "put its fields at the top level of the body",
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), "use structured_outputs"),
    "grammar": "use structured_outputs",
    "json_schema": "use response_format",
    "n_predict": "use max_tokens",
    "repeat_penalty": "use repetition_penalty",
}
Place = tuple[str | int, ...]


def ignored_fields(body: BaseModel, elsewhere: Collection[str]) -> list[str]:
    """Paths of the unknown fields in a request that ask for something. Each path is listed once, without indices.

    elsewhere: Fields of other endpoints, or that this one refuses. Raises PydanticCustomError for an unknown field that
    looks like a misspelt one, or that only another endpoint has.
    """
    ignored, checked = dict[str, None](), set[tuple[str, type]]()
    for place, model in _models(body, ()):
        others = elsewhere if model is body else ()
        for name, value in (model.model_extra or {}).items():
            if value in (None, "", [], {}):
                continue
            if (name, type(model)) not in checked and len(checked) < MAX_CHECKED:
                checked.add((name, type(model)))
                _refuse_misspelling(name, value, place, type(model), others)
            if value in EMPTY or value == NEUTRAL.get(name):
                continue
            ignored[".".join(part for part in (*place, name) if isinstance(part, str))] = None
    return list(ignored)


def header_of(ignored: Collection[str]) -> str:
    """The header's value: the paths, percent-encoded, as many as fit."""
    text = ""
    for path in (quote(path[:MAX_NAME], safe=".-_$[]") for path in ignored):
        if len(text) + len(path) > MAX_HEADER:
            return f"{text}, ..." if text else "..."
        text = f"{text}, {path}" if text else path
    return text


def similar_name(name: str, known: Collection[str]) -> str | None:
    """The known name of which `name` is a misspelling, if there is one."""
    by_letters = {_letters(one): one for one in known}
    if _letters(name) in by_letters:
        return by_letters[_letters(name)]
    if len(name) < MIN_NAME or IDENTIFIER.search(name):
        return None
    matches = difflib.get_close_matches(_letters(name[:MAX_NAME]), list(by_letters), n=1, cutoff=SIMILAR)
    return by_letters[matches[0]] if matches else None


def _refuse_misspelling(name: str, value: Any, place: Place, schema: type[BaseModel], others: Collection[str]) -> None:
    known = [field.alias or own for own, field in schema.model_fields.items()]
    is_format = name in WITH_FORMAT and isinstance(value, dict) and value.get("format") not in (None, {"type": "text"})
    if name in others and (is_format or name not in HINTS):
        if value in EMPTY or value == NEUTRAL.get(name):
            return
        hint = ": this endpoint has no such field"
    elif name.startswith(OURS) or (name not in HINTS and similar_name(name, known)):
        similar = similar_name(name, known)
        hint = f"; did you mean {similar}?" if similar else ": there is no such field here"
    else:
        return
    param = ".".join(map(str, (*place, name)))
    message = f"unknown field {name[:MAX_NAME]!r}{hint}"
    raise PydanticCustomError("unknown_field", "{message}", {"message": message, "param": param})


def _models(value: Any, place: Place) -> Iterator[tuple[Place, BaseModel]]:
    """All objects with a schema in a value, with their places."""
    if isinstance(value, BaseModel):
        yield place, value
        for name, item in value.__dict__.items():
            if isinstance(item, BaseModel | list):
                yield from _models(item, (*place, name))
    elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
        for index, item in enumerate(value):
            yield from _models(item, (*place, index))


def _letters(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")

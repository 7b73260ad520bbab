"""Grammars of replies whose tool calls follow the schemas of the tools."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from linalign import InvalidRequest
from linalign.alignment_core.decoding.grammars import (
    PLAIN_JSON,
    STRICT,
    embedded,
    is_small_enough,
    leniently_embedded,
)
from linalign.alignment_core.request import Structure
from linalign.server.harmony import FINAL
from linalign.server.tool_calls import HARMONY, HERMES, LLAMA, CallFormat, call_format

ANY_OBJECT = {"type": "object", "x-guidance": {**PLAIN_JSON, **STRICT}}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
Tools = Sequence[Mapping[str, Any]]


def required_calls(tokenizer: PreTrainedTokenizerBase, tools: Tools, parallel: bool) -> Structure:
    """The structure of replies that consist of at least one call."""
    form = _known_format(tokenizer, "can't be required; use 'auto'", "tool_choice")
    grammar = _only_calls(form, tokenizer, tools, parallel)
    return Structure("lark", grammar, "tools", json_after=form.begin)


def calls_or(structure: Structure, tokenizer: PreTrainedTokenizerBase, tools: Tools, parallel: bool) -> Structure:
    """The structure of replies that either consist of calls or match another structure."""
    form = _known_format(tokenizer, f"can't be combined with {structure.name}", "tools")
    if form is LLAMA and structure.kind == "json_schema":  # calls are JSON too, so both are one schema
        either = [_call_schema(tool, form) for tool in tools] + [json.loads(structure.text)]
        moved = [_moved(schema, f"#/anyOf/{index}") for index, schema in enumerate(either)]
        return replace(structure, text=json.dumps({"anyOf": moved}))
    return replace(structure, instead=_only_calls(form, tokenizer, tools, parallel))


def strict_calls(tokenizer: PreTrainedTokenizerBase, tools: Tools, parallel: bool) -> Structure:
    """The structure of replies with text and calls, of which calls of strict tools follow their schemas."""
    form = _known_format(tokenizer, "can't be constrained to a schema; leave strict out", "tools")
    schemas = [_enforced(tool) if tool["function"].get("strict") else ANY_OBJECT for tool in tools]
    if form is HARMONY:
        calls = _harmony_calls(tokenizer, tools, schemas)
        text = Structure("lark", "start: TEXT\nTEXT: /(.|\n)*/", "tools", literal(FINAL, tokenizer))
        return replace(text, instead=calls, json_after=form.begin)
    calls, end = _calls(form, tools, parallel and form is not HERMES), json.dumps(form.end) if form.end else ""
    if form is LLAMA:  # a reply is either calls or text
        rules = [f"start: {calls} | TEXT", r"TEXT: /([^{ \n](.|\n)*)?/"]
    else:
        mark = form.region["open"]
        is_token = literal(mark, tokenizer).startswith("<[")
        block = f"before {json.dumps(form.begin.removeprefix(mark))} {calls} {end}"
        rules = [f"start: ({block})* TEXT", r"TEXT: /(.|\n)*/"]
        rules.append(f"before{'' if is_token else '[lazy]'}: TEXT {literal(mark, tokenizer)}")
    begin = "" if form is LLAMA else form.begin
    return Structure("lark", "\n".join([*rules, *_rules(form, tools, schemas)]), "tools", json_after=begin)


def _known_format(tokenizer: PreTrainedTokenizerBase, problem: str, param: str) -> CallFormat:
    if getattr(tokenizer, "response_template", None) and "<tool_call>" not in str(tokenizer.chat_template):
        raise InvalidRequest(f"calls of this model {problem}", param)
    return call_format(tokenizer)


def _only_calls(form: CallFormat, tokenizer: PreTrainedTokenizerBase, tools: Tools, parallel: bool) -> str:
    """A grammar in Lark of at least one call."""

    def grammar(schemas: Sequence[Mapping[str, Any]]) -> str:
        if form is HARMONY:  # in which a reply ends with a call
            return _harmony_calls(tokenizer, tools, schemas)
        end = json.dumps(form.end) if form.end else ""
        parts = [literal(form.begin, tokenizer), _calls(form, tools, parallel), end]
        return "\n".join([f"start: {' '.join(filter(None, parts))}", *_rules(form, tools, schemas)])

    schemas = list(map(_enforced, tools))
    if is_small_enough(whole := grammar(schemas)):
        return whole
    pairs = zip(tools, schemas, strict=True)
    return grammar([schema if tool["function"].get("strict") else ANY_OBJECT for tool, schema in pairs])


def _harmony_calls(tokenizer: PreTrainedTokenizerBase, tools: Tools, schemas: Sequence[Mapping[str, Any]]) -> str:
    """A grammar in Lark of one call in OpenAI's harmony format, whose header may have either of two orders."""
    rules = ["start: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
    for index, (tool, schema) in enumerate(zip(tools, schemas, strict=True)):
        callee = f" to=functions.{tool['function']['name']}"
        headers = [f"<|channel|>commentary{callee} <|constrain|>json", f"{callee}<|channel|>commentary json"]
        first, second = (literal(f"{header}<|message|>", tokenizer) for header in headers)
        rules += [f"call_{index}: ({first} | {second}) arguments_{index}"]
        rules += [f"arguments_{index}: %json {json.dumps(schema)}"]
    return "\n".join(rules)


def _calls(form: CallFormat, tools: Tools, parallel: bool) -> str:
    call = "(" + " | ".join(f"call_{index}" for index in range(len(tools))) + ")"
    return f"{call} ({json.dumps(form.separator)} {call})*" if parallel else call


def _rules(form: CallFormat, tools: Tools, schemas: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rules for call_0, call_1 and so on."""
    rules = []
    for index, (tool, schema) in enumerate(zip(tools, schemas, strict=True)):
        head = f'{{"name": {json.dumps(tool["function"]["name"])}, "{form.arguments}": '
        rules.append(f"call_{index}: {json.dumps(head)} arguments_{index} {json.dumps('}')}")
        rules.append(f"arguments_{index}: %json {json.dumps(schema)}")
    return rules


def _parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", **(tool["function"].get("parameters") or NOTHING)}


def _enforced(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of the arguments. If the tool is not strict, without what can't be enforced. Raises InvalidRequest."""
    schema = _parameters(tool)
    try:
        return embedded(schema)
    except (TypeError, ValueError) as error:
        if not tool["function"].get("strict"):
            return leniently_embedded(schema)
        message = f"the parameters of {tool['function']['name']} can't be used: {error}"
        raise InvalidRequest(message, "tools") from error


def _call_schema(tool: Mapping[str, Any], form: CallFormat) -> dict[str, Any]:
    """The schema of a whole call."""
    schema = _moved(_enforced(tool), f"#/properties/{form.arguments}")
    schema.pop("x-guidance")
    members = {"name": {"const": tool["function"]["name"]}, form.arguments: schema}
    return {"type": "object", "properties": members, "required": [*members], "additionalProperties": False}


def _moved(value: Any, place: str) -> Any:
    """A schema whose references still hold when the schema is at this place of another one."""
    if isinstance(value, dict):
        is_reference = isinstance(value.get("$ref"), str) and value["$ref"].startswith("#")
        moved = {key: _moved(item, place) for key, item in value.items()}
        return {**moved, "$ref": place + value["$ref"][1:]} if is_reference else moved
    return [_moved(item, place) for item in value] if isinstance(value, list) else value


def literal(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text in Lark's syntax, in which control tokens are matched as tokens."""
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    pattern = "|".join(map(re.escape, added)) or "(?!)"
    pieces = re.split(f"({pattern})", text)
    return " ".join(f"<[{added[piece]}]>" if piece in added else json.dumps(piece) for piece in pieces if piece)

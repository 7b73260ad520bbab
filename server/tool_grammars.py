"""Grammars of replies whose tool calls follow the schemas of the tools."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from linalign import InvalidRequest
from linalign.alignment_core.decoding.grammars import PLAIN_JSON, STRICT, refuse_in_schema
from linalign.alignment_core.request import Structure
from linalign.server.tool_calls import HERMES, LLAMA, CallFormat, call_format

JSON_OPTIONS = {**PLAIN_JSON, **STRICT}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
Tools = Sequence[Mapping[str, Any]]


def required_calls(tokenizer: PreTrainedTokenizerBase, tools: Tools, parallel: bool, after: str = "") -> Structure:
    """The structure of replies that consist of at least one call. after: See `Structure`."""
    form = _known_format(tokenizer, "can't be required; use 'auto'", "tool_choice")
    parts = [literal(form.begin, tokenizer), _calls(form, tools, parallel), json.dumps(form.end) if form.end else ""]
    rules = [f"start: {' '.join(filter(None, parts))}", *_rules(form, tools, [True] * len(tools))]
    return Structure("lark", "\n".join(rules), "tools", after)


def strict_calls(tokenizer: PreTrainedTokenizerBase, tools: Tools, parallel: bool, after: str = "") -> Structure:
    """The structure of replies with text and calls, of which calls of strict tools follow their schemas."""
    form = _known_format(tokenizer, "can't be constrained to a schema; leave strict out", "tools")
    calls, end = _calls(form, tools, parallel and form is not HERMES), json.dumps(form.end) if form.end else ""
    if form is LLAMA:  # a reply is either calls or text
        rules = [f"start: {calls} | TEXT", r"TEXT: /([^{ \n](.|\n)*)?/"]
    else:
        mark = form.region["open"]
        is_token = literal(mark, tokenizer).startswith("<[")
        block = f"before {json.dumps(form.begin.removeprefix(mark))} {calls} {end}"
        rules = [f"start: ({block})* TEXT", r"TEXT: /(.|\n)*/"]
        rules.append(f"before{'' if is_token else '[lazy]'}: TEXT {literal(mark, tokenizer)}")
    strict = [bool(tool["function"].get("strict")) for tool in tools]
    return Structure("lark", "\n".join([*rules, *_rules(form, tools, strict)]), "tools", after)


def _known_format(tokenizer: PreTrainedTokenizerBase, problem: str, param: str) -> CallFormat:
    if getattr(tokenizer, "response_template", None) and "<tool_call>" not in str(tokenizer.chat_template):
        raise InvalidRequest(f"calls of this model {problem}", param)
    return call_format(tokenizer)


def _calls(form: CallFormat, tools: Tools, parallel: bool) -> str:
    call = "(" + " | ".join(f"call_{index}" for index in range(len(tools))) + ")"
    return f"{call} ({json.dumps(form.separator)} {call})*" if parallel else call


def _rules(form: CallFormat, tools: Tools, strict: Sequence[bool]) -> list[str]:
    """The rules for call_0, call_1 and so on. Raises InvalidRequest."""
    rules = []
    for index, (tool, is_strict) in enumerate(zip(tools, strict, strict=True)):
        function = tool["function"]
        schema = {"type": "object", **(function.get("parameters") or NOTHING)} if is_strict else {"type": "object"}
        try:
            refuse_in_schema(schema)
        except ValueError as error:
            raise InvalidRequest(f"the parameters of {function['name']} can't be used: {error}", "tools") from error
        head = f'{{"name": {json.dumps(function["name"])}, "{form.arguments}": '
        rules.append(f"call_{index}: {json.dumps(head)} arguments_{index} {json.dumps('}')}")
        rules.append(f"arguments_{index}: %json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}")
    return rules


def literal(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text in Lark's syntax, in which control tokens are matched as tokens."""
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    pattern = "|".join(map(re.escape, added)) or "(?!)"
    pieces = re.split(f"({pattern})", text)
    return " ".join(f"<[{added[piece]}]>" if piece in added else json.dumps(piece) for piece in pieces if piece)

"""What a reply must look like, by llguidance: JSON schemas, regular expressions, choices, grammars.

Why llguidance: docs/decisions/0010.
"""

import itertools
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from alignment_core.sequence import InvalidRequest, Structure

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

MOST_CACHED = 128
MAX_LENGTH, MAX_REFERENCES, MAX_DEPTH = 1 << 19, 500, 100  # beyond, llguidance may overflow its stack
PLAIN_JSON: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'bfnrt\\"',  # with \\u a key could be spelled so that no rule about it is seen to apply
}
STRICT: "JsonCompileOptions" = {"lenient": False, "coerce_one_of": False}


class Grammars:
    """Matchers for one tokenizer's vocabulary; safe from any thread.

    pool: where callers should wait for one, so that what takes long holds nobody else up.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._compiled = lru_cache(maxsize=MOST_CACHED)(self._compile)
        self.pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4), thread_name_prefix="grammars")

    def matcher(self, structure: Structure) -> "LLMatcher":
        """A fresh matcher. Raises InvalidRequest for what the library can't parse or would not enforce."""
        return self._compiled(structure).deep_copy()

    def _compile(self, structure: Structure) -> "LLMatcher":
        import llguidance

        _refuse_bombs(structure)
        try:
            grammar = _behind(structure.after, _grammar(structure)) if structure.after else _grammar(structure)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{structure.param} can't be used: {error}", structure.param) from error
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        begun = matcher.deep_copy()
        begun.compute_bitmask()  # some limits are met at the first token only
        if begun.is_error():
            raise self.failure(structure, begun)
        return matcher

    @staticmethod
    def failure(structure: Structure, matcher: "LLMatcher") -> InvalidRequest:
        """What to tell a client whose structure is beyond the library's limits."""
        return InvalidRequest(f"{structure.param} can't be used: {matcher.get_error()}", structure.param)

    @property
    def _vocabulary(self) -> "LLTokenizer":
        with self._lock:
            return self._make_vocabulary

    @cached_property
    def _make_vocabulary(self) -> "LLTokenizer":
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._tokenizer, self._vocab_size, self._eos_token_ids)


def _refuse_bombs(structure: Structure) -> None:
    text, kind = structure.text, structure.kind
    depth = 0
    if kind in ("regex", "grammar", "lark"):
        steps = (1 if character in "[{(" else -1 if character in "]})" else 0 for character in text)
        depth = max(itertools.accumulate(steps), default=0)
    for size, most, what in (
        (len(text), MAX_LENGTH, "characters"),
        (text.count("$ref"), MAX_REFERENCES, "references"),
        (depth, MAX_DEPTH, "levels"),
    ):
        if size > most:
            raise InvalidRequest(f"{structure.param} has {size} {what}, more than {most}", structure.param)


def _refuse_in_schema(schema: Any, depth: int = 0) -> None:
    """What llguidance would neither enforce nor survive. Raises ValueError.

    minProperties counts a name that comes twice twice, unless the names are known.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"it has more than {MAX_DEPTH} levels")
    if isinstance(schema, dict):
        least, required = schema.get("minProperties"), schema.get("required")
        if isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0):
            raise ValueError("minProperties beyond the required ones is not implemented")
    for item in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _refuse_in_schema(item, depth + 1)


def _grammar(structure: Structure) -> str:
    from llguidance import LLMatcher, grammar_from

    match structure.kind:
        case "json_schema":
            schema = json.loads(structure.text)
            _refuse_in_schema(schema)
            return LLMatcher.grammar_from_json_schema(schema, PLAIN_JSON, STRICT)
        case "choice":
            return grammar_from("regex", "|".join(map(_escaped, json.loads(structure.text))))
        case "regex":
            return grammar_from("regex", structure.text)
        case "lark":
            return structure.text
        case "grammar":
            if "%json" in structure.text:
                raise ValueError("a grammar can't hold JSON schemas; use response_format")
            return grammar_from("grammar", structure.text)


def _behind(mark: str, grammar: str) -> str:
    """Anything up to a mark, then the grammar, as llguidance's lists of grammars."""
    is_lark = not grammar.lstrip().startswith("{")
    body, *others = [{"lark_grammar": grammar}] if is_lark else json.loads(grammar)["grammars"]
    rules = [
        "start: before /[ \\n]{0,4}/ @body",
        f"before{'' if mark.startswith('<[') else '[lazy]'}: ANY {mark}",
        "ANY: /(.|\\n)*/",
    ]
    return json.dumps(
        {"grammars": [{"name": "all", "lark_grammar": "\n".join(rules)}, {**body, "name": "body"}, *others]}
    )


def _escaped(text: str) -> str:
    """A regular expression for the text itself, in Rust's syntax."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&\-~/]", r"\\\g<0>", text)

"""Structured output by llguidance: JSON schemas, regular expressions, choices, grammars (docs/decisions/0010)."""

import itertools
import json
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from linalign.alignment_core.errors import FIELD, InvalidRequest
from linalign.alignment_core.request import Structure

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

MAX_CACHED = 32  # compiled structures, of up to 40 MB each
MAX_REFERENCES, MAX_DEPTH = 500, 100  # beyond, llguidance may overflow its stack
# Measured on the worst structures: none compiles for a second, and no mask takes much of a step.
MAX_LENGTH, QUICK_LENGTH = 1 << 17, 1 << 13
MAX_LITERALS, LONG_LITERAL = 1 << 14, 256  # the time of a mask grows with the literal that the reply is writing
MAX_JOINED_PATTERNS, MAX_PATTERN_PROPERTIES, MAX_MULTIPLES = 8, 64, 100_000
SIZES: dict[str, Any] = {
    "step_max_items": 10_000,
    "max_lexer_states": 20_000,
    "step_lexer_fuel": 100_000,
    "verbose_errors": False,
}
OF_JSON = {"max_grammar_size": 20_000, "initial_lexer_fuel": 500_000, **SIZES}
OF_GRAMMARS = {"max_grammar_size": 4_000, "initial_lexer_fuel": 100_000, **SIZES, "step_max_items": 5_000}
NOT_ENFORCED = ("description", "title", "$comment", "examples", "default")
PLAIN_JSON: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'bfnrt\\"',  # with \\u, a key could be spelled so that its rule is not applied
}
STRICT: "JsonCompileOptions" = {"lenient": False, "coerce_one_of": False}


class Grammars:
    """Compiles structures to matchers for one vocabulary. Safe from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._compiled = lru_cache(maxsize=MAX_CACHED)(self._compile)
        num_threads = max(1, (os.cpu_count() or 1) // 4)
        self._pools = [ThreadPoolExecutor(num_threads, thread_name_prefix="grammars") for _ in range(2)]

    def pool(self, structure: Structure) -> ThreadPoolExecutor:
        """The threads for calls of `matcher`. Long structures have their own, so short ones do not wait for them."""
        return self._pools[len(structure.text) > QUICK_LENGTH]

    def matcher(self, structure: Structure) -> "LLMatcher":
        """A matcher at the beginning of a reply. Raises InvalidRequest if llguidance can't enforce the structure."""
        return self._compiled(structure).deep_copy()

    def _compile(self, structure: Structure) -> "LLMatcher":
        import llguidance

        _refuse_bombs(structure)
        try:
            grammar = _behind(structure.after, _grammar(structure)) if structure.after else _grammar(structure)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{FIELD} can't be used: {error}", structure.name) from error
        limits = llguidance.LLParserLimits(**(OF_GRAMMARS if structure.kind == "grammar" else OF_JSON))
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        first = matcher.deep_copy()
        first.compute_bitmask()  # llguidance checks some limits at the first token
        if first.is_error():
            raise self.failure(structure, first)
        return matcher

    @staticmethod
    def failure(structure: Structure, matcher: "LLMatcher") -> InvalidRequest:
        """The error for a structure that exceeds llguidance's limits."""
        message = matcher.get_error().partition("\n<")[0]  # states and stacks follow
        return InvalidRequest(f"{FIELD} can't be used: {message}", structure.name)

    @property
    def _vocabulary(self) -> "LLTokenizer":
        with self._lock:
            return self._make_vocabulary

    @cached_property
    def _make_vocabulary(self) -> "LLTokenizer":
        from llguidance.hf import from_tokenizer

        # A tokenizer may have more tokens than the model. Masks are then longer than logits, and their end is cut off.
        num_tokens = max(self._vocab_size, max(self._tokenizer.get_vocab().values()) + 1)
        return from_tokenizer(self._tokenizer, num_tokens, self._eos_token_ids)


def _refuse_bombs(structure: Structure) -> None:
    text, kind = structure.text, structure.kind
    depth = 0
    if kind in ("regex", "grammar", "lark"):
        steps = (1 if character in "[{(" else -1 if character in "]})" else 0 for character in text)
        depth = max(itertools.accumulate(steps), default=0)
    for size, maximum, unit in (
        (len(text), MAX_LITERALS if kind == "regex" else MAX_LENGTH, "characters"),
        (text.count("$ref"), MAX_REFERENCES, "references"),
        (depth, MAX_DEPTH, "levels"),
    ):
        if size > maximum:
            raise InvalidRequest(f"{FIELD} has {size} {unit}, more than {maximum}", structure.name)


def refuse_in_schema(schema: Any) -> None:
    """Raises ValueError for a schema that llguidance does not enforce, or can't compile safely within a second.

    minProperties is refused beyond the required properties, because llguidance counts a repeated name twice.
    """
    multiples = num_pattern_properties = 0
    for item in _dicts(schema):
        min_properties, required = item.get("minProperties"), item.get("required")
        num_required = len(required) if isinstance(required, list) else 0
        if isinstance(min_properties, int) and min_properties > max(1, num_required):
            raise ValueError("minProperties beyond the required ones is not implemented")
        multiple, patterns = item.get("multipleOf"), item.get("patternProperties")
        if isinstance(multiple, int | float) and not isinstance(multiple, bool):
            multiples += int("".join(map(str, Decimal(str(multiple)).as_tuple().digits)))
        num_pattern_properties += len(patterns) if isinstance(patterns, dict) else 0
    try:
        joined = [_joined(schema, schema, key) for key in ("pattern", "multipleOf")]
    except RecursionError as error:
        raise ValueError("its references are nested too deeply") from error
    for size, maximum, unit in (
        (_length_of_literals(schema), MAX_LITERALS, "characters in long strings"),
        (num_pattern_properties, MAX_PATTERN_PROPERTIES, "patternProperties"),
        (multiples, MAX_MULTIPLES, "in its multipleOf together"),
        (joined[0], MAX_JOINED_PATTERNS, "patterns for one string"),
        (joined[1], 1, "multipleOf for one number"),
    ):
        if size > maximum:
            raise ValueError(f"it has {size} {unit}, more than {maximum}")


def _dicts(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value. Raises ValueError if the value is nested too deeply."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it has more than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dicts(item, depth + 1)


def _length_of_literals(value: Any) -> int:
    """Characters in long strings, names included. Short strings do not count: an enumeration may have many."""
    if isinstance(value, str):
        return len(value) if len(value) > LONG_LITERAL else 0
    if isinstance(value, dict):
        items = [item for name, item in value.items() if not (name in NOT_ENFORCED and isinstance(item, str))]
        return sum(map(_length_of_literals, (*value, *items)))
    return sum(map(_length_of_literals, value)) if isinstance(value, list) else 0


def _joined(
    root: Any, schema: Any, key: str, within: tuple[str, ...] = (), memory: dict[str, int] | None = None
) -> int:
    """An upper bound of how many occurrences of a keyword apply to one value at once.

    within: References that are being followed. memory: The results of references.
    """
    memory = {} if memory is None else memory
    if not isinstance(schema, dict):
        return 0
    num = int(key in schema and not isinstance(schema[key], dict))
    target = schema.get("$ref")
    if isinstance(target, str) and target not in within:
        if target not in memory:
            memory[target] = _joined(root, _resolved(root, target), key, (*within, target), memory)
        num += memory[target]
    others = {name: item for name, item in schema.items() if name not in ("allOf", "$ref", "$defs", "definitions")}
    both = schema.get("allOf")
    num += sum(_joined(root, item, key, within, memory) for item in both) if isinstance(both, list) else 0
    members: list[Any] = []
    for name, item in others.items():
        if name in ("properties", "patternProperties") and isinstance(item, dict):
            members += item.values()
        elif isinstance(item, list):
            members += item
        else:
            members.append(item)
    return num + max((_joined(root, item, key, within, memory) for item in members), default=0)


def _resolved(root: Any, reference: str) -> Any:
    """The part of a schema that a reference points to; None if there is none."""
    value = root
    for name in reference.removeprefix("#").split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _grammar(structure: Structure) -> str:
    from llguidance import LLMatcher, grammar_from

    match structure.kind:
        case "json_schema":
            schema = json.loads(structure.text)
            refuse_in_schema(schema)
            return LLMatcher.grammar_from_json_schema(schema, PLAIN_JSON, STRICT)
        case "choice":
            choices = json.loads(structure.text)
            if (size := _length_of_literals(choices)) > MAX_LITERALS:
                raise ValueError(f"it has {size} characters in long choices, more than {MAX_LITERALS}")
            return grammar_from("regex", "|".join(map(_escaped, choices)))
        case "regex":
            return grammar_from("regex", structure.text)
        case "lark":
            return structure.text
        case "grammar":
            if "%json" in structure.text:
                raise ValueError("a grammar can't hold JSON schemas; use response_format")
            return grammar_from("grammar", structure.text)


def _behind(mark: str, grammar: str) -> str:
    """A list of grammars: free text up to a mark, then the grammar."""
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
    """A regular expression, in Rust's syntax, that matches exactly this text."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&\-~/]", r"\\\g<0>", text)

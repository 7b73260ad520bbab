"""Structured output by llguidance: JSON schemas, regular expressions, choices, grammars (docs/decisions/0010)."""

import contextlib
import itertools
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from linalign.alignment_core.decoding.json_runs import JsonRuns, ReplyMatcher, TokenRuns
from linalign.alignment_core.decoding.schemas import (
    MAX_DEPTH,
    MAX_LENGTH,
    MAX_LITERALS,
    MAX_REFERENCES,
    length_of_literals,
    prepared,
    without_descriptions,
    without_refused,
)
from linalign.alignment_core.errors import FIELD, InvalidRequest
from linalign.alignment_core.request import Structure
from linalign.alignment_core.text.detokenizer import TokenBytes

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

MAX_CACHED = 32  # compiled structures, of up to 40 MB each
# Measured on the worst structures: none compiles for a second, and no mask takes much of a step.
QUICK_LENGTH = 1 << 13
SIZES: dict[str, Any] = {
    "step_max_items": 10_000,
    "max_lexer_states": 20_000,
    "step_lexer_fuel": 100_000,
    "verbose_errors": False,
}
OF_JSON = {"max_grammar_size": 20_000, "initial_lexer_fuel": 500_000, **SIZES}
OF_GRAMMARS = {"max_grammar_size": 4_000, "initial_lexer_fuel": 100_000, **SIZES, "step_max_items": 5_000}
PLAIN_JSON: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'bfnrt\\"',  # with \\u, a key could be spelled so that its rule is not applied
}
STRICT: "JsonCompileOptions" = {"lenient": False, "coerce_one_of": False}
LENIENT: "JsonCompileOptions" = {"lenient": True, "coerce_one_of": True}


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
        return self._pools[len(structure.text) + len(structure.instead) > QUICK_LENGTH]

    def matcher(self, structure: Structure) -> ReplyMatcher:
        """A matcher at the beginning of a reply. Raises InvalidRequest if llguidance can't enforce the structure."""
        matcher = self._compiled(structure).deep_copy()
        has_json = structure.kind in ("json_schema", "lark")
        return ReplyMatcher(
            matcher, JsonRuns(self._tokens, structure.json_after, bool(structure.before)) if has_json else None
        )

    def _compile(self, structure: Structure) -> "LLMatcher":
        import llguidance

        _refuse_bombs(structure)
        try:
            grammar = _grammar(structure)
            if structure.head:
                grammar = _joined_grammars("headed", f"start: {structure.head} @answer", {"answer": grammar})
            if structure.instead:
                grammar = _either(structure.instead, grammar)
            if structure.after:
                grammar = _behind(structure.before, structure.after, structure.may_space, grammar)
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
    def failure(structure: Structure, matcher: "LLMatcher | ReplyMatcher") -> InvalidRequest:
        """The error for a structure that exceeds llguidance's limits."""
        return InvalidRequest(f"{FIELD} can't be used: {_in_words(matcher.get_error())}", structure.name)

    @property
    def _tokens(self) -> TokenRuns:
        with self._lock:
            return self._make_tokens

    @cached_property
    def _make_tokens(self) -> TokenRuns:
        return TokenRuns(TokenBytes(self._tokenizer), self._vocab_size)

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
    text, kind = structure.text + structure.instead, structure.kind
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


def _grammar(structure: Structure) -> str:
    from llguidance import LLMatcher, grammar_from

    match structure.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(prepared(json.loads(structure.text)), PLAIN_JSON, STRICT)
        case "choice":
            choices = json.loads(structure.text)
            if (size := length_of_literals(choices)) > MAX_LITERALS:
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


def _behind(begin: str, end: str, may_space: bool, grammar: str) -> str:
    """A list of grammars: free text up to a mark, then the grammar. With a mark that begins the text, the text may also
    be left out.
    """
    body = "/[ \\n]{0,4}/ @body" if may_space else "@body"
    rules = [
        f"start: before {body}",
        f"before{'' if end.startswith('<[') else '[lazy]'}: ANY {end}",
        "ANY: /(.|\\n)*/",
    ]
    if begin:
        rules[0] = f"start: {begin} before {body} | @body"
    return _joined_grammars("behind", "\n".join(rules), {"body": grammar})


def _either(first: str, second: str) -> str:
    """A list of grammars: one or the other."""
    return _joined_grammars("either", "start: @first | @second", {"first": first, "second": second})


def _joined_grammars(name: str, rules: str, parts: dict[str, str]) -> str:
    """A list of grammars whose first one, in Lark, refers to the parts by their names."""
    grammars: list[dict[str, Any]] = [{"name": name, "lark_grammar": rules}]
    for part, grammar in parts.items():
        is_lark = not grammar.lstrip().startswith("{")
        first, *others = [{"lark_grammar": grammar}] if is_lark else json.loads(grammar)["grammars"]
        grammars += [{**first, "name": part}, *others]
    return json.dumps({"grammars": grammars})


def embedded(schema: Any, options: "JsonCompileOptions" = STRICT) -> dict[str, Any]:
    """A schema as a Lark grammar of kind "lark" holds it, after %json. Raises TypeError, ValueError."""
    from llguidance import LLMatcher, LLParserLimits

    schema = without_descriptions(prepared(schema))
    grammar = LLMatcher.grammar_from_json_schema(schema, PLAIN_JSON, options)
    if error := LLMatcher.validate_grammar(grammar, limits=LLParserLimits(**OF_JSON)):
        raise ValueError(_in_words(error))
    return {**schema, "x-guidance": {**PLAIN_JSON, **options}}


def is_small_enough(grammar: str) -> bool:
    """Whether a grammar in llguidance's Lark is within the limits. Short ones always are."""
    from llguidance import LLMatcher, LLParserLimits

    if len(grammar) <= QUICK_LENGTH:
        return True
    return len(grammar) <= MAX_LENGTH and not LLMatcher.validate_grammar(grammar, limits=LLParserLimits(**OF_JSON))


def leniently_embedded(schema: Any) -> dict[str, Any]:
    """`embedded`, without what can't be enforced. At least the value is an object."""
    with contextlib.suppress(TypeError, ValueError):
        return embedded(schema, LENIENT)
    with contextlib.suppress(TypeError, ValueError):
        return embedded(without_refused(schema, _is_pattern), LENIENT)
    return embedded({"type": "object"})


def _is_pattern(pattern: str) -> bool:
    """Whether llguidance can enforce a pattern."""
    with contextlib.suppress(TypeError, ValueError):
        return bool(embedded({"type": "string", "pattern": pattern}))
    return False


def _in_words(error: str) -> str:
    """llguidance's error without the parts that show its grammar, its states and its stacks."""
    message = error.partition("\n<")[0].rpartition("failed to compile JSON schema: ")[2]
    lines = [line for line in message.splitlines() if not re.match(r"\s*\d+ \| ", line)]
    return "\n".join(lines).replace("Expected f64", "Expected number")


def _escaped(text: str) -> str:
    """A regular expression, in Rust's syntax, that matches exactly this text."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&\-~/]", r"\\\g<0>", text)

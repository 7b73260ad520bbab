"""What a reply must look like, by llguidance: JSON schemas, regular expressions, choices, grammars.

Why llguidance: docs/decisions/0010.
"""

import json
import threading
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from alignment_core.sequence import InvalidRequest, Structure

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

MOST_CACHED = 128
PLAIN_JSON: "JsonCompileOptions" = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
STRICT: "JsonCompileOptions" = {"lenient": False, "coerce_one_of": False}


class Grammars:
    """Matchers for one tokenizer's vocabulary; safe from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._compiled = lru_cache(maxsize=MOST_CACHED)(self._compile)

    def matcher(self, structure: Structure) -> "LLMatcher":
        """A fresh matcher. Raises InvalidRequest for what the library can't parse or would not enforce."""
        return self._compiled(structure).deep_copy()

    def _compile(self, structure: Structure) -> "LLMatcher":
        import llguidance

        try:
            grammar = _grammar(structure)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{structure.param} can't be used: {error}", structure.param) from error
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequest(f"{structure.param} can't be used: {matcher.get_error()}", structure.param)
        return matcher

    @property
    def _vocabulary(self) -> "LLTokenizer":
        with self._lock:
            return self._make_vocabulary

    @cached_property
    def _make_vocabulary(self) -> "LLTokenizer":
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._tokenizer, self._vocab_size, self._eos_token_ids)


def _grammar(structure: Structure) -> str:
    from llguidance import LLMatcher, grammar_from

    match structure.kind:
        case "json_schema":
            schema = json.loads(structure.text)
            return LLMatcher.grammar_from_json_schema(schema, PLAIN_JSON, STRICT)
        case "choice":
            return grammar_from("choice", structure.text)
        case "regex":
            return grammar_from("regex", structure.text)
        case "grammar":
            return grammar_from("grammar", structure.text)

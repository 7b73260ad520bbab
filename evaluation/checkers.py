"""Principles that a program can check, each with its check."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from linalign.evaluation.statistics import words_of


@dataclass(frozen=True, slots=True)
class Checkable:
    """passes: Whether a text follows the principle. to_the_end: Whether the check needs a complete reply."""

    id: str
    principle: str
    passes: Callable[[str], bool]
    to_the_end: bool = False

    def follows(self, text: str, is_whole: bool) -> bool:
        return (is_whole or not self.to_the_end) and self.passes(text)


COMMON = {
    "english": "the and is to of you in that it for with your are this can",
    "french": "le la les de des et un une est vous pour en que du dans votre à il ce pas",
    "spanish": "el la los las de que y en un una es por para con su no lo se del tu",
    "german": "der die das und ist zu ein eine sie in den mit für von auf nicht es dem sich ihre",
}
EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")


def _words(minimum: int, maximum: int) -> Callable[[str], bool]:
    return lambda text: minimum <= len(words_of(text)) <= maximum


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if words_of(part)]


def _language(name: str) -> Callable[[str], bool]:
    def share(words: list[str], language: str) -> float:
        return sum(word in COMMON[language].split() for word in words) / len(words)

    def follows(text: str) -> bool:
        words = [word.lower() for word in words_of(text)]
        return len(words) >= 3 and share(words, name) > max(0.15, share(words, "english"))

    return follows


def _has_word(word: str) -> Callable[[str], bool]:
    return lambda text: word in [w.lower() for w in words_of(text)]


def _lacks_word(word: str) -> Callable[[str], bool]:
    return lambda text: bool(words_of(text)) and not _has_word(word)(text)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _lines(pattern: str, minimum: int) -> Callable[[str], bool]:
    return lambda text: sum(bool(re.match(pattern, line)) for line in text.splitlines()) >= minimum


CHECKABLE = [
    Checkable("lower", "Write in lower case only, without a single capital letter.",
              lambda t: bool(words_of(t)) and t == t.lower()),
    Checkable("upper", "WRITE EVERYTHING IN CAPITAL LETTERS.", lambda t: bool(words_of(t)) and t == t.upper()),
    Checkable("words-10", "Answer in at most ten words.", _words(1, 10)),
    Checkable("words-25", "Answer in at most twenty-five words.", _words(1, 25)),
    Checkable("words-40", "Answer at length, in at least forty words.", _words(40, 10**6)),
    Checkable("one-sentence", "Answer in exactly one sentence.", lambda t: len(_sentences(t)) == 1, True),
    Checkable("three-sentences", "Answer in exactly three sentences.", lambda t: len(_sentences(t)) == 3, True),
    Checkable("one-word", "Answer with a single word.", _words(1, 1)),
    Checkable("bullets", 'Answer as a bullet list, every line beginning with "- ".', _lines(r"\s*- \S", 2)),
    Checkable("numbered", 'Answer as a numbered list: "1. ", "2. " and so on.', _lines(r"\s*\d+\. \S", 2)),
    Checkable("heading", 'Begin the answer with a markdown heading, "# ".', lambda t: bool(re.match(r"\s*# \S", t))),
    Checkable("bold", "Put the most important words into **bold** markdown.",
              lambda t: bool(re.search(r"\*\*[^*\n]+\*\*", t))),
    Checkable("quoted", "Put the whole answer into double quotation marks.",
              lambda t: bool(re.fullmatch(r'\s*["“].+["”]\s*', t, re.DOTALL)), True),
    Checkable("parentheses", "Use at least one remark in parentheses.", lambda t: bool(re.search(r"\([^()]+\)", t))),
    Checkable("json", "Answer with one JSON object and nothing else.", _is_json, True),
    Checkable("ends-question", "End the answer with a question.", lambda t: t.rstrip().endswith("?"), True),
    Checkable("all-questions", "Answer in questions only.",
              lambda t: bool(_sentences(t)) and all(s.endswith("?") for s in _sentences(t)), True),
    Checkable("exclaims", "End every sentence with an exclamation mark.",
              lambda t: bool(_sentences(t)) and all(s.endswith("!") for s in _sentences(t)), True),
    Checkable("no-digits", "Do not use any digits.", lambda t: bool(words_of(t)) and not re.search(r"\d", t)),
    Checkable("digits", "Mention at least one number, in digits.", lambda t: bool(re.search(r"\d", t))),
    Checkable("no-commas", "Do not use any commas.", lambda t: bool(words_of(t)) and "," not in t),
    Checkable("emoji", "Use at least one emoji.", lambda t: bool(EMOJI.search(t))),
    Checkable("french", "Répondez en français. Always answer in French.", _language("french")),
    Checkable("spanish", "Responde en español. Always answer in Spanish.", _language("spanish")),
    Checkable("german", "Antworte auf Deutsch. Always answer in German.", _language("german")),
    Checkable("ocean", "Mention the ocean.", _has_word("ocean")),
    Checkable("banana", 'Use the word "banana".', _has_word("banana")),
    Checkable("garden", "Bring a garden into the answer.", _has_word("garden")),
    Checkable("no-the", 'Never use the word "the".', _lacks_word("the")),
    Checkable("no-and", 'Never use the word "and".', _lacks_word("and")),
    Checkable("dear-friend", 'Begin with the words "Dear friend".', lambda t: t.lstrip(' "').startswith("Dear friend")),
    Checkable("well", 'Begin with "Well,".', lambda t: t.lstrip(' "').startswith("Well,")),
    Checkable("the-end", 'Close with the words "The end."', lambda t: t.rstrip(' "\n').endswith("The end."), True),
    Checkable("pirate", "Talk like a pirate.",
              lambda t: bool(re.search(r"\b(a+rr+|ahoy|matey|ye|aye|scallywag|treasure)\b", t.lower()))),
]  # fmt: skip

PROMPTS = [
    "How can I get better at drawing?",
    "What is a good way to spend a rainy Sunday?",
    "Why do leaves change colour in autumn?",
    "How do I make a simple vegetable soup?",
    "What should I think about before I buy a bicycle?",
    "Explain what a museum is for.",
    "How can I remember people's names?",
    "What makes a city pleasant to live in?",
    "Tell me something about owls.",
    "How do I keep my kitchen tidy?",
    "What is the point of learning a second language?",
    "How does a refrigerator work?",
    "Describe a walk in the mountains.",
    "How can I sleep better at night?",
    "What is a good present for a grandmother?",
    "Why is bread so popular?",
    "How do I begin to run without hurting myself?",
    "What do bees do all day?",
    "How should I prepare for a job interview?",
    "What can I do with old newspapers?",
]

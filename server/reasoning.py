"""The marks of reasoning in replies, and bounds for it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from linalign.alignment_core.request import Thinking
from linalign.server import harmony

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
THINKING = {"<think>": "</think>", "[THINK]": "[/THINK]"}


@dataclass(frozen=True, slots=True)
class Marks:
    """The marks of the reasoning in a reply.

    is_begun: Whether the prompt ends with the first one. answer: The mark in front of an answer, with or without
    reasoning.
    """

    begin: str
    end: str
    is_begun: bool
    answer: str = ""


def thinking_start(generation_prompt: str) -> int:
    """The index of the last mark of reasoning in a template's text; the end of the text if there is none."""
    places = (generation_prompt.rfind(mark) for mark in THINKING)
    return min((place for place in places if place >= 0), default=len(generation_prompt))


def thinking_marks(tokenizer: "PreTrainedTokenizerBase", generation_prompt: str) -> Marks | None:
    """The marks of the reasoning that a reply may have. None if the model does not reason, or the prompt has ended the
    reasoning.

    generation_prompt: The part of the reply that the template has already written.
    """
    if harmony.is_harmony(tokenizer):
        is_begun = generation_prompt.endswith(harmony.ANALYSIS)
        if not is_begun and not generation_prompt.endswith(harmony.ROLE):
            return None
        return Marks(harmony.ANALYSIS, harmony.END, is_begun, harmony.FINAL)
    thoughts = generation_prompt[thinking_start(generation_prompt) :]
    for begin, end in THINKING.items():
        if thoughts.startswith(begin):
            return None if end in thoughts else Marks(begin, end, True)
        if generation_prompt.rstrip().endswith(end):
            return None
        if begin in str(tokenizer.chat_template):
            return Marks(begin, end, False)
    return None


def thinking_budget(tokenizer: "PreTrainedTokenizerBase", marks: Marks, budget: int, may_call: bool) -> Thinking:
    """A bound for the reasoning between these marks, in tokens. may_call: Whether calls may follow the reasoning."""
    end = marks.end if may_call else marks.end + marks.answer
    ids = tuple(tokenizer.encode(end, add_special_tokens=False))
    return Thinking(budget, marks.begin, marks.end, ids, marks.is_begun, repeats=bool(marks.answer))

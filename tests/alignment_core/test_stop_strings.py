"""Stop strings end a text, but not a part of it that must stay whole, such as a call."""

import random

import pytest

from linalign.alignment_core.request import Uncut
from linalign.alignment_core.text.stop_strings import StopStrings

CALLS = Uncut(("<tool_call>",), "</tool_call>")
TO_THE_END = Uncut(("[CALLS]",))
FIRST = Uncut(("{", "<|tag|>"), is_first=True)


def stopped(text, stop, uncut, size):
    """The text until a stop string, fed in pieces, and whether one was found."""
    stops, shown = StopStrings(stop, uncut), ""
    for start in range(0, len(text), size):
        shown += stops.until_stop(text[start : start + size])
        if stops.found:
            return shown, True
    return shown + stops.finish(), False


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "stop", "uncut", "expected"),
    [
        ("a <tool_call>x\ny</tool_call>b\nc", "\n", CALLS, "a <tool_call>x\ny</tool_call>b"),
        ("a <tool_call>x\ny</tool_call> <tool_call>\n</tool_call>", "\n", CALLS, None),
        ("a <tool_call>x\ny", "\n", CALLS, None),
        ("a\nb <tool_call>\n", "\n", CALLS, "a"),
        ("a <tool_ca\n", "\n", CALLS, "a <tool_ca"),
        ("a <tool_call>x</tool_call>", "tool_c", CALLS, "a <"),  # the mark itself is not protected
        ("ab<tool_call>c</tool_call>d", "abc", CALLS, None),  # no match across a part
        ("ab<tool_call>c</tool_call>d", "bd", CALLS, None),
        ("<tool_call>a</tool_call>ab", "ab", CALLS, "<tool_call>a</tool_call>"),
        ("<tool_call><tool_call>\n</tool_call>\n", "\n", CALLS, "<tool_call><tool_call>\n</tool_call>"),
        ("x [CALLS][{\n}]\n", "\n", TO_THE_END, None),
        ('  {"a":\n 1}\n', "\n", FIRST, None),
        ("<|tag|>a\n", "\n", FIRST, None),
        ("<|tab|>a\n{\n", "\n", FIRST, "<|tab|>a"),
        ("a {\n}", "\n", FIRST, "a {"),
        ("\n{}", "\n", FIRST, ""),
        ("a\nb", "\n", None, "a"),
    ],
)
def test_stop_strings_do_not_end_uncut_parts(text, stop, uncut, expected, size):
    assert stopped(text, (stop,), uncut, size) == ((text, False) if expected is None else (expected, True))


def test_pieces_do_not_matter():
    """Random texts of few letters, against a search in the whole text with its parts blanked."""
    rng = random.Random(4)
    part = Uncut(("<<",), ">>")
    num_stopped = 0
    for _ in range(3000):
        text = "".join(rng.choices("ab<>", k=rng.randrange(1, 24)))
        stop = "".join(rng.choices("ab", k=rng.randrange(1, 4)))
        blanked, place, is_inside = "", 0, False
        while place < len(text):
            mark = ">>" if is_inside else "<<"
            if text.startswith(mark, place):
                blanked, place, is_inside = blanked + ("##" if is_inside else "<<"), place + 2, not is_inside
            else:
                blanked, place = blanked + ("#" if is_inside else text[place]), place + 1
        found = blanked.find(stop)
        expected = (text, False) if found < 0 else (text[:found], True)
        assert stopped(text, (stop,), part, rng.randrange(1, 6)) == expected, (text, stop)
        num_stopped += found >= 0
    assert 500 < num_stopped < 2500

import random
import statistics
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from linalign.alignment_core.text.detokenizer import TextStream, TokenBytes, special_ids
from linalign.alignment_core.text.stop_strings import StopStrings


def stream(decode, ids, stop=()):
    text = TextStream(decode, stop)
    parts = []
    for id in ids:
        parts.append(text.add(id))
        if text.stopped:
            break
    return parts, text.finish(), text


def as_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["naïve 日本語 🙂 done", "a", "", "👩‍👩‍👧 family"])
def test_only_complete_characters_are_emitted(text):
    parts, rest, _ = stream(as_bytes, text.encode())
    assert "".join(parts) + rest == text
    assert not any("\ufffd" in part for part in parts)


def test_every_token_is_emitted_at_once_without_stop_strings():
    parts, rest, _ = stream(as_bytes, b"hello")
    assert parts == list("hello")
    assert rest == ""


@pytest.mark.parametrize("before", [b"\x80", b"\x80\x80\x80", b"\xf0\x9f", b"\xe6" * 7])
@pytest.mark.parametrize("after", ["😀a", "éa", "日本"])
def test_a_complete_character_after_incomplete_ones_is_kept(before, after):
    parts, rest, _ = stream(as_bytes, before + after.encode())
    assert "".join(parts) + rest == as_bytes(before + after.encode())


def test_an_unfinished_character_is_shown_at_the_end():
    parts, rest, _ = stream(as_bytes, "é".encode()[:1])
    assert parts == [""]
    assert rest == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ("END",), "one "),
        ("one ENtwo", ("END",), "one ENtwo"),
        ("aaab", ("aab",), "a"),
        ("x\n\nUser: y", ("\nUser", "User"), "x\n"),
        ("ababac", ("abac",), "ab"),
        ("abc", ("b", "abc"), "a"),
        ("one EN", ("END",), "one EN"),
    ],
)
def test_stop_strings_never_leak(text, stop, expected):
    parts, rest, state = stream(as_bytes, text.encode(), stop)
    assert "".join(parts) + rest == expected
    assert state.stopped == (expected != text)
    shown = ""
    for part in parts:  # no part may show text that the stop string removes later
        shown += part
        assert expected.startswith(shown)


def test_stop_strings_of_few_letters_equal_a_naive_search():
    rng = random.Random(0)
    num_stopped = 0
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randint(0, 30)))
        stop = tuple("".join(rng.choices("ab", k=rng.randint(1, 9))) for _ in range(rng.randint(1, 3)))
        places = [(text.index(one) + len(one), text.index(one)) for one in stop if one in text]
        parts, rest, state = stream(as_bytes, text.encode(), stop)  # per letter: the first stop to be complete counts
        end = min(places)[0] if places else None
        expected = text if end is None else text[: min(begin for last, begin in places if last == end)]
        assert "".join(parts) + rest == expected
        assert state.stopped == bool(places)
        num_stopped += state.stopped
    assert 1000 < num_stopped < 2900


@pytest.mark.parametrize(
    ("piece", "last", "stop"),
    [("a", "c", "a" * 1_000_000 + "b"), ("ab", "c", "ab" * 500_000), ("a", "a", "a" * 500 + "b"), ("a", "c", "ba" * 9)],
)
def test_the_time_of_stop_strings_is_linear(piece, last, stop):
    """Time of a short and of a longer text that nearly matches a stop string, or with a stop string of a megabyte."""

    def seconds(num):
        text = StopStrings((stop,))
        began = time.process_time()
        for _ in range(0, num, 8):
            text.until_stop(piece * 8)  # like a token of eight letters
            text.until_stop(last)
        for _ in range(num // 8):
            text.until_stop(piece * 8)
        text.until_stop(last)
        return time.process_time() - began

    short, long = (statistics.median(seconds(num) for _ in range(5)) for num in (20_000, 80_000))
    assert long < 8 * short  # 4 is linear, 16 is not


def test_real_tokens(tokenizer):
    text = "Zażółć gęślą jaźń — 你好，世界! 🙂🙃 def f(x):\n    return x"
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts, rest, _ = stream(lambda ids: tokenizer.decode(ids), ids)
    assert "".join(parts) + rest == text
    assert "\ufffd" not in "".join(parts)


def sentencepiece():
    """Like Llama 2's and Gemma's tokenizer: "▁" for spaces, and a token for each byte of unknown characters."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h", "▁hi"]
    inner = Tokenizer(
        models.BPE(
            {piece: id for id, piece in enumerate(pieces)},
            [("▁", "h"), ("▁h", "i")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize(
    "make", [lambda tokenizer: tokenizer, lambda _: sentencepiece()], ids=["bytes", "sentencepiece"]
)
def test_the_bytes_of_tokens_spell_the_text(make, tokenizer):
    tokenizer = make(tokenizer)
    text = " hi hi 🦩 é ꙮ"
    ids = tokenizer.encode(text, add_special_tokens=False)
    bytes_of = TokenBytes(tokenizer)
    assert b"".join(map(bytes_of, ids)) == text.encode()
    assert any("\ufffd" in bytes_of(id).decode(errors="replace") for id in ids), "no token was part of a character"
    special = next(iter(tokenizer.added_tokens_decoder))
    assert bytes_of(special).decode() == tokenizer.added_tokens_decoder[special].content
    assert bytes_of(len(tokenizer) + 5) == b""


def test_a_continued_text_keeps_the_space_between():
    """Decoders of this kind strip a space at the beginning of a text."""
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    before, ids = tokenizer.encode("hi", add_special_tokens=False), tokenizer.encode(" hi hi", add_special_tokens=False)
    for context, expected in ((before, " hi hi"), ((), "hi hi"), ((*before, 1 + 0xF0), "hi hi")):
        text = TextStream(tokenizer.decode, (), context)
        assert "".join(map(text.add, ids)) + text.finish() == expected


def stripping():
    """A tokenizer whose decoder strips a space at the beginning of a text, as Llama 2's does."""
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def test_a_dropped_control_token_does_not_join_words():
    """Any mix of control tokens, words and spaces: the shown text is the text of all other tokens."""
    tokenizer, rng = stripping(), random.Random(3)
    special, (space, h, i, space_h, hi) = len(tokenizer) - 1, range(257, 262)
    assert tokenizer.convert_ids_to_tokens([special, hi]) == ["<s>", "▁hi"]
    assert special_ids(tokenizer) == {special}
    for _ in range(2000):
        accent = rng.choice([[1 + 0xC3, 1 + 0xA9], [1 + 0xC3, special, 1 + 0xA9]])
        chosen = rng.choices([[special], [special], [space], [h], [i], [space_h], [hi], accent], k=12)
        ids = [id for some in chosen for id in some]
        text = TextStream(tokenizer.decode, skipped=special_ids(tokenizer))
        shown = "".join(map(text.add, ids)) + text.finish()
        assert shown == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_text_continues_after_characters_of_several_tokens():
    """If the decoding window began inside a character, its text would be invalid and the first space would be lost."""
    tokenizer, rng = stripping(), random.Random(5)
    characters = [[1 + byte for byte in text.encode()] for text in ("é", "你", "🦩")]
    for _ in range(1000):
        before, ids = (
            [id for some in rng.choices([*characters, [258], [259], [261]], k=num) for id in some] for num in (7, 5)
        )
        text = TextStream(tokenizer.decode, before=before)
        shown = "".join(map(text.add, ids)) + text.finish()
        assert tokenizer.decode(before) + shown == tokenizer.decode([*before, *ids])


def test_a_stop_string_counts_from_where_it_ends():
    """A stop string that begins before `min_tokens` and ends after it stops the reply, and no part of it was shown."""
    for least, expected in ((0, "x"), (3, "x"), (4, "xENDy"), (9, "xENDyEND")):
        text, shown = TextStream(as_bytes, ("END",)), ""
        for number, letter in enumerate(b"xENDyEND"):
            shown += text.add(letter, may_stop=number >= least)
            assert expected.startswith(shown)
            if text.stopped:
                break
        assert shown + text.finish() == expected
    overlapping = TextStream(as_bytes, ("aa",))
    assert [overlapping.add(letter, may_stop=number > 1) for number, letter in enumerate(b"aaa")] == ["", "a", ""]
    assert overlapping.stopped

import pytest

from linalign.evaluation.statistics import distinct, interval, longest_repetition, loops, words_of


def test_words():
    assert words_of("It's 3 o'clock — naïve, well-known: 日本.") == ["It's", "o'clock", "naïve", "well-known", "日本"]


def test_distinct():
    assert distinct(["a b a b", "a c"], 1) == pytest.approx(3 / 6)
    assert distinct(["a b a b", "a c"], 2) == pytest.approx(3 / 4)  # ab, ba, ab, ac
    assert distinct(["a"], 2) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one two three", 0),
        ("one two one two", 2),
        ("one one one", 1),
        ("a b c d x a b c d y", 4),
        ("a b a b a b", 2),
        ("", 0),
    ],
)
def test_longest_repetition(text, words):
    assert longest_repetition(text) == words


@pytest.mark.parametrize(
    ("text", "is_loop"),
    [
        ("It is so. It is so. It is so.", True),
        ("and on and on and on", True),
        ("no no", False),
        ("hahahahahahahahahaha", True),
        ("A quite ordinary sentence.", False),
        ("", False),
    ],
)
def test_loops(text, is_loop):
    assert loops(text) == is_loop


def test_intervals_hold_the_mean_and_follow_their_groups():
    values = [0.0, 1.0] * 50
    mean, low, high = interval(values)
    assert (mean, low < mean < high) == (0.5, True)
    assert 0.05 < high - low < 0.3
    assert interval(values) == (mean, low, high)  # the bootstrap is seeded
    by_group = interval(values, ["a", "b"] * 50)  # all values of a group are equal: the interval spans both groups
    assert by_group[1:] == (0.0, 1.0)
    assert interval([1.0] * 10) == (1.0, 1.0, 1.0)

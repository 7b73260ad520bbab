"""Statistics of texts and of samples."""

import re
from collections.abc import Sequence

import numpy as np

BOOTSTRAPS = 1000


def interval(values: Sequence[float], groups: Sequence[str] | None = None) -> tuple[float, float, float]:
    """(mean, low, high), the last two a 95 % bootstrap interval of the mean with a fixed seed.

    groups: A name for each value; values of the same name are resampled together.
    """
    numbers = np.asarray(values, dtype=float)
    names = np.asarray(groups if groups is not None else range(len(numbers)))
    members = [numbers[names == name] for name in dict.fromkeys(names.tolist())]
    sums, sizes = np.array([m.sum() for m in members]), np.array([len(m) for m in members])
    drawn = np.random.default_rng(0).integers(len(members), size=(BOOTSTRAPS, len(members)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(numbers.mean()), float(low), float(high)


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text)


def distinct(texts: Sequence[str], n: int) -> float:
    """The number of different n-grams of words ÷ the number of all (Li et al., NAACL 2016), in all texts together."""
    grams = [
        tuple(words[i : i + n]) for words in (words_of(t.lower()) for t in texts) for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def longest_repetition(text: str) -> int:
    """The number of words of the longest passage that occurs twice without overlap."""
    words = words_of(text.lower())
    longest = 0
    lengths = [0] * (len(words) + 1)  # for each j: the length of the common suffix of words[:i] and words[:j]
    for i in range(1, len(words) + 1):
        previous = 0
        for j in range(1, i):
            previous, lengths[j] = lengths[j], (previous + 1 if words[i - 1] == words[j - 1] else 0)
            longest = max(longest, min(lengths[j], i - j))
        lengths[i] = 0
    return longest


def loops(text: str) -> bool:
    """Whether the text ends with a repetition: three times up to 20 words, or eight times up to 8 characters."""
    words = text.lower().split()
    for size in range(1, 21):
        if len(words) >= 3 * size and words[-size:] == words[-2 * size : -size] == words[-3 * size : -2 * size]:
            return True
    return bool(re.search(r"(\S{1,8}?)\1{7,}\s*$", text))

"""Parses JSON: strictly RFC 8259, without ambiguity, and with bounds on size and depth."""

import itertools
import json
import math
import re
from typing import Any

from starlette.exceptions import HTTPException

MAX_KEYS = 10_000  # of one object: each unknown key is a separate error
MAX_VALUES = 100_000  # names count, integers do not: prompts may be token ids
MAX_LEVELS = 128
HALF = re.compile("[\ud800-\udfff]")
# Matches once per value, and twice for a number with a fraction and an exponent.
VALUE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{.eEnN]', re.DOTALL)
Place = tuple["Place", str | int] | None  # the place of the container, and the key or index in it


class InvalidBody(HTTPException):
    """A request that is invalid, found out before or after its fields are validated. param: The field or header at
    fault, if known.
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_json") -> None:
        super().__init__(400, message)
        self.param, self.code = param, code


def strict(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, or InvalidBody if the place of the error is known.

    Python's own reader accepts equal keys (and takes the last), NaN, numbers beyond a float's range, and halves of
    surrogate pairs.
    """
    refuse_too_many_values(text)
    try:
        value = json.loads(text, object_pairs_hook=_without_repeated_keys)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError("a number has too many digits") if "digits" in str(error) else error from None
    _refuse_what_text_cannot_hold(value)
    return value


def refuse_too_many_values(text: str) -> None:
    """Raises ValueError for too many values in a JSON text, or in several with commas between them.

    Call it before parsing: the parser is one call of C that holds the GIL, for a second if there are a million values.
    """
    data = text.encode(errors="replace")
    if len(data) - len(data.translate(None, b",:[{")) < MAX_VALUES:  # each value but one has one of them, or more
        return
    without_integers = data.translate(None, b"0123456789-+, \t\r\n")
    if next(itertools.islice(VALUE.finditer(without_integers), MAX_VALUES, None), None):
        raise ValueError(f"it has more than {MAX_VALUES} values")


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object has {len(pairs)} keys, more than {MAX_KEYS}")
    if len(value) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {repeated[:100]!r} occurs twice in one object")
    return value


def _refuse_what_text_cannot_hold(value: Any) -> None:
    """Refuse halves of surrogate pairs, numbers that are not finite, and values that are nested too deeply."""
    level: list[tuple[Place, Any]] = [(None, value)]
    num_levels = 0
    while level:
        num_levels += 1
        if num_levels > MAX_LEVELS:
            raise ValueError("it is nested too deeply")
        inner: list[tuple[Place, Any]] = []
        for place, item in level:
            if isinstance(item, dict):
                inner += [((place, key), value) for key, value in item.items() if not isinstance(value, int)]
                for key in item:
                    _refuse_halves(key, (place, key))
            elif isinstance(item, list):
                inner += [((place, index), value) for index, value in enumerate(item) if not isinstance(value, int)]
            elif isinstance(item, str):
                _refuse_halves(item, place)
            elif isinstance(item, float) and not math.isfinite(item):
                path = _path(place)
                raise InvalidBody(f"{path}: must be a finite number", path, "invalid_value")
        level = inner


def _refuse_halves(text: str, place: Place) -> None:
    if not text.isascii() and HALF.search(text):
        path = _path(place)
        message = f"{path}: the text must be valid Unicode: it has half a surrogate pair"
        raise InvalidBody(message, path, "invalid_value")


def _path(place: Place) -> str:
    parts = []
    while place is not None:
        place, part = place
        parts.append(str(part))
    return ".".join(reversed(parts)).encode(errors="replace").decode()

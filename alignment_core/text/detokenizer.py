"""Converts token ids to text, one token at a time: whole characters only, and never part of a stop string."""

import re
from collections.abc import Callable, Container, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT = "\ufffd"
MAX_TOKENS_PER_CHARACTER = 4  # UTF-8 needs at most four bytes, and a token carries at least one
NUM_BEFORE = 8  # tokens of context that may change the text of those after them
MAX_UNSEEN = 32  # tokens without text that are kept as context of the next token


class TextStream:
    """The text of one sequence as it grows.

    The text of a token can depend on the tokens before it (leading spaces, joined bytes). So the new text is the
    difference between decoding a short window of tokens with and without the newest ones.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: tuple[str, ...] = (),
        before: Sequence[int] = (),
        skipped: Container[int] = frozenset(),
    ) -> None:
        """
        decode: Converts token ids to text.
        stop: Strings that end the text; they are not part of it.
        before: Token ids of the text that this text continues.
        skipped: Token ids that are ignored, such as control tokens.
        """
        self.stopped = False
        self._decode, self._skipped = decode, skipped
        self._stops = [_Stop(text) for text in stop]
        self._window = self._window_of([id for id in before[-3 * NUM_BEFORE :] if id not in skipped])
        self._num_shown = len(self._window)  # leading tokens of the window whose text has been returned
        self._held = ""  # text held back, as it may be the beginning of a stop string

    def add(self, token_id: int, may_stop: bool = True) -> str:
        """The text that is complete with this token. Sets `stopped` if a stop string ends the text.

        may_stop: Whether a stop string that ends in this token's text ends the text.
        """
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        shown = self._decode(self._window[: self._num_shown])
        text, settled = self._decode(self._window), len(self._window)
        if text.endswith(REPLACEMENT):
            if len(self._window) - self._num_shown < MAX_TOKENS_PER_CHARACTER:
                return ""
            # Too many tokens for one character, so the first of them does not belong to an incomplete one.
            settled = self._num_shown + 1
            text = self._decode(self._window[:settled])
        if text == shown and settled - self._num_shown < MAX_UNSEEN:
            return ""  # for example a leading space, which has text only if another token follows
        self._window = self._window[self._num_shown :]
        self._num_shown = settled - self._num_shown
        return self._until_stop(text[len(shown) :], may_stop)

    def _window_of(self, before: list[int]) -> list[int]:
        """The last tokens of `before`, as context; none if `before` ends in the middle of a character."""
        for num in range(NUM_BEFORE, NUM_BEFORE + MAX_TOKENS_PER_CHARACTER):  # one of them starts at a character
            if not self._decode(before[-num:]).endswith(REPLACEMENT):
                return before[-num:]
        return []

    def finish(self) -> str:
        """The text that was held back, as no token follows."""
        if self.stopped:
            return ""
        shown = self._decode(self._window[: self._num_shown])
        text = self._until_stop(self._decode(self._window)[len(shown) :])
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _until_stop(self, text: str, may_stop: bool = True) -> str:
        ends = [(stop, stop.end_in(text, may_stop)) for stop in self._stops]
        complete = [(end, end - len(stop.text)) for stop, end in ends if end is not None]
        text, num_before = self._held + text, len(self._held)
        if complete:
            self.stopped = True
            self._held = ""
            _, begin = min(complete)  # the first to be complete, however the text is cut into tokens
            return text[: num_before + begin]
        keep = max((stop.num_matched for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class _Stop:
    """A stop string, and how many of its first characters the text so far ends with.

    The automaton of Knuth, Morris and Pratt, built only as far as it is needed, so that the time is linear in the
    length of the text for any text and stop string.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = [0]  # of the first 1, 2 … characters: length of the longest proper prefix that is a suffix

    def end_in(self, more: str, counts: bool) -> int | None:
        """Number of characters of `more`, the next piece of text, after which the string is first complete.

        None if the string is not complete, or if `counts` is false.
        """
        for place, character in enumerate(more, 1):
            self.num_matched = self._next(self.num_matched, character)
            if self.num_matched == len(self.text):
                if counts:
                    return place
                self.num_matched = self._borders[-1]
        return None

    def _next(self, num: int, character: str) -> int:
        while num and self.text[num] != character:
            num = self._borders[num - 1]
        num += self.text[num] == character
        if num > len(self._borders):  # the border of the last character follows from the one before
            border = self._borders[-1]
            while border and self.text[border] != character:
                border = self._borders[border - 1]
            self._borders.append(border + (self.text[border] == character))
        return num


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the control tokens, which are not part of a text."""
    return frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)


class TokenBytes:
    """Converts single token ids to their bytes, which need not be whole characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added: dict[int, bytes] = {
            id: token.content.encode() for id, token in tokenizer.added_tokens_decoder.items()
        }
        decoder = str(getattr(tokenizer.backend_tokenizer, "decoder", ""))
        self._bytes_of: dict[str, int] = {character: byte for byte, character in bytes_to_unicode().items()}
        self._is_byte_level = "ByteLevel" in decoder

    def __call__(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # the output layer may have more rows than the tokenizer has tokens
            return b""
        if self._is_byte_level:
            return bytes(self._bytes_of[character] for character in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

"""Token ids to text, one token at a time: whole characters only, and never part of a stop string."""

import re
from collections.abc import Callable, Container, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT = "\ufffd"
MAX_TOKENS_PER_CHARACTER = 4  # UTF-8 needs at most four bytes, and a token carries at least one
NUM_BEFORE = 8  # tokens that may change how those after them are written
MAX_UNSEEN = 32  # tokens that show nothing by themselves and may change how the next one is written


class TextStream:
    """The text of one sequence as it grows.

    A token's text can depend on the token before it (leading spaces, joined bytes), so what is new
    is the difference between decoding a short window with and without the newest tokens.

    before: the tokens of the text that this one goes on with. skipped: tokens that are no part of a text, as though
    they were not there.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: tuple[str, ...] = (),
        before: Sequence[int] = (),
        skipped: Container[int] = frozenset(),
    ) -> None:
        self.stopped = False
        self._decode, self._skipped = decode, skipped
        self._stops = [_Stop(text) for text in stop]
        self._window = self._window_of([id for id in before[-3 * NUM_BEFORE :] if id not in skipped])
        self._num_shown = len(self._window)  # leading tokens of the window whose text is out already
        self._held = ""  # text that may turn out to begin a stop string

    def add(self, token_id: int, may_stop: bool = True) -> str:
        """The text that became certain with this token; `stopped` tells that a stop string ended it.

        may_stop: whether stop strings count that end with this token.
        """
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        shown = self._decode(self._window[: self._num_shown])
        text, settled = self._decode(self._window), len(self._window)
        if text.endswith(REPLACEMENT):
            if len(self._window) - self._num_shown < MAX_TOKENS_PER_CHARACTER:
                return ""
            # The first of so many can't belong to a character that is still to be completed.
            settled = self._num_shown + 1
            text = self._decode(self._window[:settled])
        if text == shown and settled - self._num_shown < MAX_UNSEEN:
            return ""  # such as a space at the beginning, which is written if another one comes
        self._window = self._window[self._num_shown :]
        self._num_shown = settled - self._num_shown
        return self._until_stop(text[len(shown) :], may_stop)

    def _window_of(self, before: list[int]) -> list[int]:
        """The end of what comes before; nothing where that is in the middle of a character."""
        for num in range(NUM_BEFORE, NUM_BEFORE + MAX_TOKENS_PER_CHARACTER):  # one begins where a character does
            if not self._decode(before[-num:]).endswith(REPLACEMENT):
                return before[-num:]
        return []

    def finish(self) -> str:
        """What was held back, now that nothing can follow."""
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
    """A stop string and how much of it stands at the end of the text so far: Knuth, Morris and Pratt's automaton,
    as far as it is needed, so that no text and no string take more than time linear in the text.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = [0]  # of the first 1, 2 … characters: the longest proper beginning that is an end too

    def end_in(self, more: str, counts: bool) -> int | None:
        """Where in the text's next piece the string is complete for the first time, None where it is not or that
        does not count.
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
        if num > len(self._borders):  # its last character's border, from the one before
            border = self._borders[-1]
            while border and self.text[border] != character:
                border = self._borders[border - 1]
            self._borders.append(border + (self.text[border] == character))
        return num


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The control tokens, which are no part of a text."""
    return frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)


class TokenBytes:
    """The bytes that single tokens stand for, which need not be whole characters."""

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
        if piece is None:  # a row of the output layer that the tokenizer has no token for
            return b""
        if self._is_byte_level:
            return bytes(self._bytes_of[character] for character in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

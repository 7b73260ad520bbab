"""Converts token ids to text, one token at a time: whole characters only."""

import re
from collections.abc import Callable, Container, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from linalign.alignment_core.request import Uncut
from linalign.alignment_core.text.stop_strings import StopStrings

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
        uncut: Uncut | None = None,
    ) -> None:
        """
        decode: Converts token ids to text.
        stop: Strings that end the text; they are not part of it.
        before: Token ids of the text that this text continues.
        skipped: Token ids that are ignored, such as control tokens.
        uncut: The part of the text that stop strings do not end.
        """
        self._decode, self._skipped = decode, skipped
        self._stops = StopStrings(stop, uncut)
        self._window = self._window_of([id for id in before[-3 * NUM_BEFORE :] if id not in skipped])
        self._num_shown = len(self._window)  # leading tokens of the window whose text has been returned

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stops.found is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended the text."""
        return self._stops.found

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
        return self._stops.until_stop(text[len(shown) :], may_stop)

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
        return self._stops.until_stop(self._decode(self._window)[len(shown) :]) + self._stops.finish()


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

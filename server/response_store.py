"""Keeps conversations of /v1/responses in memory, so that a request can continue an earlier response."""

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from linalign.server.protocol.chat_messages import AnyMessage, num_characters
from linalign.server.protocol.responses import Item

LIFETIME = 3600.0  # seconds since the last use of a response


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages up to a response, that response included, without instructions."""

    messages: tuple[AnyMessage, ...]
    items: tuple[Item, ...]  # of the response
    expires: float  # on the store's clock


class ResponseStore:
    """The newest conversations of each API key. Conversations share the messages that they have in common."""

    def __init__(self, max_responses: int, max_characters: int, clock: Callable[[], float] = time.monotonic) -> None:
        """max_responses: Most responses of each key; the one that was not used for the longest time is dropped.
        max_characters: Longest conversation; longer ones are not kept.
        """
        self._max_responses, self._max_characters, self._clock = max_responses, max_characters, clock
        self._of_key: defaultdict[bytes | None, OrderedDict[str, Conversation]] = defaultdict(OrderedDict)

    def put(
        self, key: bytes | None, response_id: str, messages: Sequence[AnyMessage], items: Sequence[Item] = ()
    ) -> None:
        """items: Of the response."""
        if sum(map(num_characters, messages)) > self._max_characters:
            return
        responses = self._of_key[key]
        responses[response_id] = Conversation(tuple(messages), tuple(items), self._clock() + LIFETIME)
        while len(responses) > self._max_responses:
            responses.popitem(last=False)
        self._drop_expired()

    def get(self, key: bytes | None, response_id: str) -> tuple[AnyMessage, ...] | None:
        """The messages up to a response; None if the response is unknown, dropped, expired, or another key's."""
        self._drop_expired()
        conversation = self._of_key[key].pop(response_id, None)
        if conversation is None:
            return None
        self.put(key, response_id, conversation.messages, conversation.items)
        return conversation.messages

    def items(self, key: bytes | None, ids: Collection[str]) -> dict[str, Item]:
        """Items of kept responses by their ids, without those that are not kept."""
        self._drop_expired()
        wanted, found = set(ids), dict[str, Item]()
        for response_id, conversation in list(self._of_key[key].items()):
            items = {item.id: item for item in conversation.items if item.id in wanted}
            if items:
                found |= items
                self.get(key, response_id)  # which keeps the response for another lifetime
        return found

    def _drop_expired(self) -> None:
        """Drop expired conversations. In each key's order, those that expire first are first."""
        now = self._clock()
        for responses in self._of_key.values():
            while responses and next(iter(responses.values())).expires <= now:
                responses.popitem(last=False)

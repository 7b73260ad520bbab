"""What waits for its first step, and how much of it may."""

import math
import threading
from collections.abc import Sequence as Seq

from linalign.alignment_core.errors import EngineBusy
from linalign.alignment_core.scheduling.sequence import Sequence


class Backlog:
    """Counts of choices, and of prompt tokens of all their branches, that have not run yet; safe from any thread.

    max_requests, max_tokens: their bounds, None for none. batch: how many leave at once, at most.
    """

    def __init__(self, max_requests: int | None, max_tokens: int | None, batch: int) -> None:
        self._bounds = (max_requests or math.inf, max_tokens or math.inf)
        self._batch = batch
        self._lock = threading.RLock()
        self.num_requests = self.num_tokens = 0

    def enter(self, choices: Seq[Sequence]) -> None:
        """Raises EngineBusy where they don't fit; one request always does, however long it is."""
        with self._lock:
            self.refuse_if_full(choices)
            self.num_requests += len(choices)
            self.num_tokens += sum(choice.num_prompt_tokens for choice in choices)

    def refuse_if_full(self, choices: Seq[Sequence] = ()) -> None:
        """Raises EngineBusy if there is no room for these choices, or for any at all."""
        with self._lock:
            most, most_tokens = self._bounds
            num_requests = self.num_requests + max(len(choices), 1)
            num_tokens = self.num_tokens + sum(choice.num_prompt_tokens for choice in choices)
            if self.num_requests and (num_requests > most or num_tokens > most_tokens):
                raise EngineBusy(retry_after=min(1 + self.num_requests // self._batch, 60))

    def leave(self, sequence: Sequence) -> None:
        """It runs now, or never will; said again it changes nothing."""
        with self._lock:
            if sequence.is_queued:
                sequence.is_queued = False
                self.num_requests -= 1
                self.num_tokens -= sequence.num_prompt_tokens

"""How many requests wait for their first step, and how many may."""

import math
import threading
from collections.abc import Sequence as Seq

from linalign.alignment_core.errors import EngineBusy
from linalign.alignment_core.scheduling.sequence import Sequence


class Backlog:
    """Counts the waiting choices and their prompt tokens in all branches. Safe from any thread.

    max_requests, max_tokens: upper bounds; None means no bound. batch: sequences that run at once, at most.
    """

    def __init__(self, max_requests: int | None, max_tokens: int | None, batch: int) -> None:
        self._bounds = (max_requests or math.inf, max_tokens or math.inf)
        self._batch = batch
        self._lock = threading.RLock()
        self.num_requests = self.num_tokens = 0

    def enter(self, choices: Seq[Sequence]) -> None:
        """Count these choices. Raises EngineBusy beyond a bound; an empty backlog takes any one request."""
        with self._lock:
            self.refuse_if_full(choices)
            self.num_requests += len(choices)
            self.num_tokens += sum(choice.num_prompt_tokens for choice in choices)

    def refuse_if_full(self, choices: Seq[Sequence] = ()) -> None:
        """Raises EngineBusy if there is no room for these choices, or, without choices, for a single one."""
        with self._lock:
            most, most_tokens = self._bounds
            num_requests = self.num_requests + max(len(choices), 1)
            num_tokens = self.num_tokens + sum(choice.num_prompt_tokens for choice in choices)
            if self.num_requests and (num_requests > most or num_tokens > most_tokens):
                raise EngineBusy(retry_after=min(1 + self.num_requests // self._batch, 60))

    def leave(self, sequence: Sequence) -> None:
        """Stop counting a sequence: its first step begins, or it ends before that. Call it once for each sequence."""
        with self._lock:
            self.num_requests -= 1
            self.num_tokens -= sequence.num_prompt_tokens

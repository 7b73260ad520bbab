"""Which replica a request goes to: where the most of its prompt is cached, unless others wait much less."""

import random
from collections import OrderedDict
from functools import lru_cache
from itertools import takewhile

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from alignment_core import EngineConfig, Prompt
from alignment_core.kv_cache import hash_pages
from alignment_core.sequence import Branch

Pages = OrderedDict[bytes, None]  # their hashes, the newest last
PAGE_SIZE = EngineConfig().page_size


class PrefixRouter(RequestRouter):
    """Sends each request to the replica that costs it least: the prompt tokens of all its branches that the replica
    would have to compute, `tokens_per_request` for each request that is there already, and as much again where others
    have fewer pages, so that new conversations spread although they all begin alike.

    What a replica has cached is what has been sent there, newest first, as many pages as it has; it is not asked.
    Prompts share pages under the same hashes as in the engine's own cache (`alignment_core.kv_cache`). Every process
    that sends requests has a router, and learns alone.
    """

    def initialize_state(self, *, tokens_per_request: int = 128) -> None:  # type: ignore[override]
        """Keyword arguments from `request_router_kwargs` in the deployment's configuration."""
        self._tokens_per_request = tokens_per_request
        self._pages: dict[ReplicaID, Pages] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All of them, a list each, best first: Ray takes the first that is not full."""
        if pending_request is None:
            return [list(candidate_replicas)]
        pending_request.routing_context.should_backoff = True  # where all are full
        branches = _branches(pending_request)
        known = {replica.replica_id: self._pages.get(replica.replica_id, Pages()) for replica in candidate_replicas}
        fewest = min(map(len, known.values()), default=0)

        def cost(replica: RunningReplica) -> tuple[int, float]:
            pages = known[replica.replica_id]
            load = self.replica_queue_len_cache.get(replica.replica_id) or 0
            num_missing = sum(
                len(branch) - sum(1 for _ in takewhile(pages.__contains__, branch)) for branch in branches
            )
            return PAGE_SIZE * num_missing + self._tokens_per_request * (load + (len(pages) > fewest)), random.random()

        return [[replica] for replica in sorted(candidate_replicas, key=cost)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Its pages are there from now on."""
        del result
        pages = self._pages.setdefault(replica_id, Pages())
        for branch in _branches(pending_request):
            for page in reversed(branch):  # so that a prefix outlives what follows it
                pages[page] = None
                pages.move_to_end(page)
        replica = self.curr_replicas.get(replica_id)
        while replica and len(pages) > replica.replica_metadata["num_pages"]:
            pages.popitem(last=False)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._pages = {id: pages for id, pages in self._pages.items() if id in self.curr_replicas}

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._pages.pop(replica_id, None)


def _branches(request: PendingRequest) -> list[tuple[bytes, ...]]:
    """The hashes of every branch's full pages; of none where it is no prompt that is sent."""
    return [branch for argument in request.args if isinstance(argument, Prompt) for branch in _pages_of(argument)]


@lru_cache(maxsize=1024)  # a request that waits is looked at again and again
def _pages_of(prompt: Prompt) -> tuple[tuple[bytes, ...], ...]:
    branches = [Branch(list(ids), salt=prompt.salt) for ids in prompt.branches]
    return tuple(tuple(hash_pages(branch, len(branch.tokens) // PAGE_SIZE, PAGE_SIZE)) for branch in branches)

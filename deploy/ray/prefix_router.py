"""Routes a request to the replica that has cached most of its prompt, unless other replicas have much less load."""

import asyncio
import math
import random
from collections import OrderedDict
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

from linalign import EngineConfig, Prompt
from linalign.alignment_core.scheduling.kv_cache import hash_pages
from linalign.alignment_core.scheduling.sequence import Branch
from ray.exceptions import RayError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

Pages = OrderedDict[bytes, None]  # their hashes, the newest last
Branches = list[list[bytes]]  # the hashes of every branch's full pages
PAGE_SIZE = EngineConfig().page_size
LOAD_TIMEOUT = 0.1  # seconds for a replica to report its number of requests


class PrefixRouter(RequestRouter):
    """Sends each request to the replica with the least cost. The cost of a replica is the sum of

    - the prompt tokens that it would have to compute, of all branches; tokens that branches share count once;
    - `tokens_per_request` for each of its running requests;
    - `tokens_per_request` once more if another replica has fewer pages. New conversations often begin with the same
      system prompt, and spread over the replicas only because of this term.

    The router does not ask replicas what they have cached. It assumes that a replica has the pages of the requests that
    were sent to it, the newest first, up to its number of pages. Pages have the same digests as in the engine's cache
    (alignment_core/scheduling/kv_cache.py). Every process that sends requests has a router with its own records.
    """

    def initialize_state(self, *, tokens_per_request: int = 128) -> None:  # type: ignore[override]
        """Keyword arguments from `request_router_kwargs` in the deployment's configuration."""
        self._tokens_per_request = tokens_per_request
        self._pages: dict[ReplicaID, Pages] = {}
        self._hashes: WeakKeyDictionary[asyncio.Future[Any], Branches] = WeakKeyDictionary()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All replicas, best first, each in a separate list. Ray takes the first one that is not full."""
        if pending_request is None:
            return [list(candidate_replicas)]
        pending_request.routing_context.should_backoff = True  # if all are full
        branches = self._branches_of(pending_request)
        known = {replica.replica_id: self._pages.get(replica.replica_id, Pages()) for replica in candidate_replicas}
        fewest = min(map(len, known.values()), default=0)

        async def cost(replica: RunningReplica) -> tuple[float, float]:
            pages = known[replica.replica_id]
            num_missing = len({page for branch in branches for page in branch[_num_cached(branch, pages) :]})
            load = await self._load(replica) + (len(pages) > fewest)
            return PAGE_SIZE * num_missing + self._tokens_per_request * load, random.random()

        costs = await asyncio.gather(*map(cost, candidate_replicas))
        return [
            [replica] for _, replica in sorted(zip(costs, candidate_replicas, strict=True), key=lambda pair: pair[0])
        ]

    async def _load(self, replica: RunningReplica) -> float:
        """The number of requests of a replica: Ray's cached number if it is recent, else the replica's answer, or
        infinity if there is none.
        """
        known = self.replica_queue_len_cache.get(replica.replica_id)
        if known is not None:
            return known
        try:
            async with asyncio.timeout(LOAD_TIMEOUT):
                load = await replica.get_queue_len(deadline_s=LOAD_TIMEOUT)
        except (TimeoutError, RayError):
            return math.inf
        self.replica_queue_len_cache.update(replica.replica_id, load)
        return load

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Record that the replica has the pages of the request from now on."""
        del result
        pages = self._pages.setdefault(replica_id, Pages())
        for branch in self._branches_of(pending_request):
            for page in reversed(branch):  # so that a continuation is removed before its prefix
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

    def _branches_of(self, request: PendingRequest) -> Branches:
        """The digests of the request's branches; empty if it has no prompt. Cached while the request waits."""
        if request.future not in self._hashes:
            prompts = [argument for argument in request.args if isinstance(argument, Prompt)]
            branches = [Branch(list(ids), salt=prompt.salt) for prompt in prompts for ids in prompt.branches]
            self._hashes[request.future] = [
                hash_pages(branch, len(branch.tokens) // PAGE_SIZE, PAGE_SIZE) for branch in branches
            ]
        return self._hashes[request.future]


def _num_cached(branch: list[bytes], pages: Pages) -> int:
    return sum(1 for _ in takewhile(pages.__contains__, branch))

"""Which replica the router chooses. tests/deploy/test_ray.py tests real replicas."""

import asyncio
import gc
from dataclasses import dataclass, field

import pytest
from ray.serve._private.request_router.common import ReplicaQueueLengthCache
from ray.serve.request_router import PendingRequest

from linalign import Prompt
from linalign.ray.prefix_router import LOAD_TIMEOUT, PAGE_SIZE, PrefixRouter

WEIGHT = 8 * PAGE_SIZE  # tokens_per_request
pytestmark = pytest.mark.anyio


@dataclass
class Replica:
    """The router's view of a replica.

    load: Its number of requests, reported after `delay` seconds. num_probes: How often the load was requested.
    """

    replica_id: str
    load: int = 0
    delay: float = 0
    num_probes: int = 0
    replica_metadata: dict = field(default_factory=lambda: {"num_pages": 100})

    async def get_queue_len(self, *, deadline_s):
        assert deadline_s == LOAD_TIMEOUT
        self.num_probes += 1
        await asyncio.sleep(self.delay)
        return self.load


class Router(PrefixRouter):
    """A router without a cluster, and with a manual clock."""

    def __init__(self, *replicas):
        self.now = 0.0
        self.known = {replica.replica_id: replica for replica in replicas}
        self.loads = ReplicaQueueLengthCache(get_curr_time_s=lambda: self.now)
        self.initialize_state(tokens_per_request=WEIGHT)

    replica_queue_len_cache = property(lambda self: self.loads)
    curr_replicas = property(lambda self: self.known)

    async def first(self, request):
        """Id of the replica that is ranked first."""
        ranks = await self.choose_replicas(list(self.known.values()), request)
        assert sorted(replica.replica_id for (replica,) in ranks) == sorted(self.known)
        return ranks[0][0].replica_id

    def route(self, request, to):
        self.on_request_routed(request, to, None)


@pytest.fixture
def anyio_backend():
    return "asyncio"


def tokens(start, num_pages):
    return tuple(range(start, start + num_pages * PAGE_SIZE))


def pending(*branches, salt=b""):
    principled, *base = branches
    prompt = Prompt((principled,), ratios=(2.0 if base else 0.0,), base=base[0] if base else None, salt=salt)
    return PendingRequest(args=[prompt], kwargs={}, metadata=None)


async def test_to_the_replica_with_its_pages_unless_the_load_is_higher():
    a, b = Replica("a"), Replica("b")
    router = Router(a, b)
    router.route(pending(tokens(0, 24)), "a")
    again = pending(tokens(0, 24) + (7,) * PAGE_SIZE)
    for a.load, expected in ((0, "a"), (1, "a"), (3, "b"), (4, "b")):
        router.loads.invalidate_key("a")
        assert await router.first(again) == expected
    assert again.routing_context.should_backoff


async def test_pages_that_branches_share_count_once():
    router = Router(Replica("a", load=12), Replica("b"))
    shared = tokens(0, 80)
    request = pending(shared + tokens(5000, 1), shared + tokens(6000, 1))
    router.route(request, "a")  # 82 pages against 12 + 1 requests, worth 104; counted twice, 162 would outweigh these
    assert await router.first(request) == "b"
    router.known["a"].load = 4
    router.loads.invalidate_key("a")
    assert await router.first(request) == "a"


async def test_the_base_branch_and_the_salt_count():
    router = Router(Replica("a"), Replica("b"))
    router.route(pending(tokens(0, 10)), "a")
    router.route(pending(tokens(0, 10), salt=b"other"), "b")
    router.route(pending(tokens(1000, 20)), "b")
    router.route(pending(tokens(2000, 20)), "a")
    assert await router.first(pending(tokens(0, 10))) == "a"
    assert await router.first(pending(tokens(0, 10), salt=b"other")) == "b"
    assert await router.first(pending(tokens(0, 10), tokens(1000, 20))) == "b"


async def test_a_replica_with_old_stats_is_asked():
    a, b = Replica("a", load=60), Replica("b", load=1)
    router = Router(a, b)
    for number in range(20):
        assert await router.first(pending(tokens(number, 1))) == "b"
    assert (a.num_probes, b.num_probes) == (1, 1)
    router.now += 3600
    assert await router.first(pending(tokens(0, 1))) == "b"
    assert (a.num_probes, b.num_probes) == (2, 2)


async def test_a_replica_that_does_not_report_its_load_comes_last():
    router = Router(Replica("a", delay=60), Replica("b", load=60))
    router.route(pending(tokens(0, 24)), "a")
    assert await router.first(pending(tokens(0, 24))) == "b"


async def test_the_router_records_at_most_a_replicas_pages():
    router = Router(Replica("a"), Replica("b"))
    first, second = pending(tokens(0, 60)), pending(tokens(5000, 60))
    router.route(first, "a")
    router.route(second, "a")
    assert len(router._pages["a"]) == 100
    remaining = [hash for hash in router._branches_of(first)[0] if hash in router._pages["a"]]
    assert remaining == router._branches_of(first)[0][:40]  # the last pages were dropped first
    assert all(hash in router._pages["a"] for hash in router._branches_of(second)[0])


async def test_hashes_of_finished_requests_are_dropped():
    router = Router(Replica("a"), Replica("b"))
    request = pending(tokens(0, 24))
    await router.first(request)
    assert len(router._hashes) == 1
    del request
    gc.collect()
    assert len(router._hashes) == 0

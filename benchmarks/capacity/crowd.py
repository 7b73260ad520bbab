"""How many sequences can run at once within limits, and how many replicas are needed."""

import math
from dataclasses import dataclass

from benchmarks.capacity.host import Host
from benchmarks.capacity.load import TEMPLATE, Load, held, prompt_tokens


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a service."""

    users: int  # users to serve
    sequences: int  # most sequences that run at once (max_num_seqs)
    first: float  # most seconds to the first token, on average
    token: float  # most seconds between tokens


@dataclass(frozen=True, slots=True)
class Running:
    """State of a replica."""

    sequences: int  # that run at once
    hits: float  # share of turns whose history is cached
    first: float  # seconds to the first token
    token: float  # seconds between tokens
    requests: float  # per second
    users: float


def running(host: Host, load: Load, sequences: int, spread: int = 1) -> Running:
    """State of a replica that runs this number of sequences.

    spread: Number of replicas among which a user's turns are spread at random; 1 with affinity.
    """
    own, common = held(load)
    missing_share = missing(load, spread)
    num_cached = max(0.0, (host.pool - common) / own)  # users whose pages are cached, with running sequences or not
    copies = spread * (1 - missing_share)  # copies of a user's pages on all replicas together
    warm, cold = (prefill_seconds(host, load, has_history) for has_history in (True, False))
    step = host.step(sequences * load.rows, load.prompt + load.reply / 2)
    batch = sequences / load.choices

    def state(hits: float) -> Running:
        prefill = cold - hits * (1 - missing_share) * (cold - warm)
        requests = batch / (batch * prefill + load.reply * step)
        busy = requests * prefill  # share of the time spent on prefills
        first = host.step(sequences * load.rows, load.prompt) + prefill * (1 + busy / (2 * (1 - busy)))  # M/D/1
        users = batch + requests * load.think
        return Running(sequences, hits, first, batch / requests / load.reply, requests, users)

    # The number of users depends on the hits, and the hits on the number of users: search the fixed point by bisection.
    low, high = 0.0, 1.0
    if num_cached >= copies * state(1.0).users:
        return state(1.0)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if middle > num_cached / (copies * state(middle).users) else (middle, high)
    return state(low)


def missing(load: Load, spread: int) -> float:
    """Average share of the history that a replica lacks: the turns since the last one that it served."""
    turns = load.history / (load.message + load.reply + 2 * TEMPLATE)
    elsewhere = 1 - 1 / spread
    return sum(min(1.0, turns - i) * elsewhere ** (i + 1) for i in range(math.ceil(turns))) / turns if turns else 0.0


def prefill_seconds(host: Host, load: Load, has_history: bool) -> float:
    return host.prefill(prompt_tokens(load, has_history), load.prompt, load.rows * load.choices)


def fits(host: Host, load: Load) -> int:
    """Most sequences whose pages fit at once."""
    own, common = held(load)
    return max(0, (host.pool - common) // own * load.choices)


def largest_load(host: Host, load: Load, limits: Limits, spread: int = 1) -> tuple[Running | None, str]:
    """The state with the most sequences within the limits, and the limit that prevents more."""
    room = fits(host, load)
    if room < load.choices:
        return None, "does not fit"
    largest = None
    for sequences in range(load.choices, limits.sequences + 1, load.choices):
        state = running(host, load, sequences, spread)
        if sequences > room:
            return largest, "memory"
        if state.token > limits.token:
            return largest, "time per token"
        if state.first > limits.first:
            return largest, "first token"
        largest = state
    return largest, "--max-num-seqs"


def replicas(host: Host, load: Load, limits: Limits, affinity: bool) -> int | None:
    """Number of replicas for all users; None if no number is enough. Without affinity, turns go to random replicas."""
    number = 1
    while True:
        state, _ = largest_load(host, load, limits, 1 if affinity else number)
        if state is None:
            return None
        if number * state.users >= limits.users:
            return number
        number = max(number + 1, math.floor(limits.users / state.users * 0.9))

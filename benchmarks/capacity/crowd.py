"""How many sequences run at once within limits, and how many replicas that takes."""

import math
from dataclasses import dataclass

from benchmarks.capacity.host import Host
from benchmarks.capacity.load import TEMPLATE, Load, held, prompt_tokens


@dataclass(frozen=True, slots=True)
class Limits:
    """users: to be served. sequences: that run at once at most (max_num_seqs). first: seconds to the first token,
    on average. token: seconds between tokens.
    """

    users: int
    sequences: int
    first: float
    token: float


@dataclass(frozen=True, slots=True)
class Running:
    """A replica with `sequences` at once. hits: the share of turns that find their history. Times in seconds."""

    sequences: int
    hits: float
    first: float
    token: float
    requests: float  # a second
    users: float


def running(host: Host, load: Load, sequences: int, spread: int = 1) -> Running:
    """spread: replicas that a user's turns go to by chance, 1 with affinity."""
    own, common = held(load)
    lacking = missing(load, spread)
    kept = max(0.0, (host.pool - common) / own)  # users whose pages are there, running or not
    copies = spread * (1 - lacking)  # of a user's pages, on all replicas
    warm, cold = (prefill_seconds(host, load, has_history) for has_history in (True, False))
    step = host.step(sequences * load.rows, load.prompt + load.reply / 2)
    batch = sequences / load.choices

    def state(hits: float) -> Running:
        prefill = cold - hits * (1 - lacking) * (cold - warm)
        requests = batch / (batch * prefill + load.reply * step)
        busy = requests * prefill  # share of the time that goes into prefills
        first = host.step(sequences * load.rows, load.prompt) + prefill * (1 + busy / (2 * (1 - busy)))  # M/D/1
        users = batch + requests * load.think
        return Running(sequences, hits, first, batch / requests / load.reply, requests, users)

    # The users' number follows from the hits, and the hits from the number: the more hit, the fewer fit.
    low, high = 0.0, 1.0
    if kept >= copies * state(1.0).users:
        return state(1.0)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if middle > kept / (copies * state(middle).users) else (middle, high)
    return state(low)


def missing(load: Load, spread: int) -> float:
    """Share of the history that a replica lacks on average: the turns since the last one that came to it."""
    turns = load.history / (load.message + load.reply + 2 * TEMPLATE)
    elsewhere = 1 - 1 / spread
    return sum(min(1.0, turns - i) * elsewhere ** (i + 1) for i in range(math.ceil(turns))) / turns if turns else 0.0


def prefill_seconds(host: Host, load: Load, has_history: bool) -> float:
    return host.prefill(prompt_tokens(load, has_history), load.prompt, load.rows * load.choices)


def fits(host: Host, load: Load) -> int:
    """Sequences whose pages fit at once."""
    own, common = held(load)
    return max(0, (host.pool - common) // own * load.choices)


def most(host: Host, load: Load, limits: Limits, spread: int = 1) -> tuple[Running | None, str]:
    """The largest crowd within the limits, and what keeps it from being larger."""
    room = fits(host, load)
    if room < load.choices:
        return None, "does not fit"
    found = None
    for sequences in range(load.choices, limits.sequences + 1, load.choices):
        state = running(host, load, sequences, spread)
        if sequences > room:
            return found, "memory"
        if state.token > limits.token:
            return found, "time a token"
        if state.first > limits.first:
            return found, "first token"
        found = state
    return found, "--max-num-seqs"


def replicas(host: Host, load: Load, limits: Limits, affinity: bool) -> int | None:
    """For all users. Without affinity each turn comes to one of them by chance."""
    number = 1
    while True:
        state, _ = most(host, load, limits, 1 if affinity else number)
        if state is None:
            return None
        if number * state.users >= limits.users:
            return number
        number = max(number + 1, math.floor(limits.users / state.users * 0.9))

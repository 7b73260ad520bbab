"""Random crowds of requests: every reply equals the reply that the request gets alone, and the engine leaks nothing.

`python -m tests.crowds SECONDS [FIRST]` runs crowds one after the other, from seed FIRST on, and stops at the first
that differs. tests/alignment_core/test_crowd.py runs a few.
"""

import gc
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace

from linalign import Engine, EngineConfig, Prompt, SamplingParams, load
from linalign.alignment_core.loading.loader import LoadedModel
from linalign.alignment_core.methods import METHODS
from linalign.alignment_core.output import Output
from linalign.alignment_core.request import Structure
from linalign.alignment_core.scheduling.sequence import Branch, Sequence
from linalign.alignment_core.scheduling.speculation import PromptLookup
from tests.engines import tiny_pair

STRUCTURES = [  # of single letters: the model's small vocabulary has no tokens for words
    Structure("regex", "[a-z]{4,9} [0-9]+(,[0-9]+)*"),
    Structure("regex", "([ab][0-9]?)+"),
    Structure("regex", "[^e]{2,7}"),
]
VOCAB_SIZE = 300
MOST_BRANCHES = 4
LONGEST = 40  # most shared tokens of a prompt


@dataclass(slots=True)
class Request:
    """One request of a crowd.

    submit: The step in which it is submitted. abort: Steps after `submit` until it is aborted, or None for never.
    replies: Its outputs, by choice.
    """

    prompt: Prompt
    params: SamplingParams
    n: int
    submit: int
    abort: int | None
    replies: dict[int, list[Output]] = field(default_factory=dict)

    def take(self, output: Output) -> None:
        self.replies.setdefault(output.choice, []).append(output)

    def tokens(self, choice: int) -> list[int]:
        return [token for output in self.replies.get(choice, ()) for token in output.token_ids]

    def text(self, choice: int) -> str:
        return "".join(output.text for output in self.replies[choice])

    def logprobs(self, choice: int) -> list[float]:
        return [report.logprob for output in self.replies[choice] for report in output.logprobs]


def random_request(rng: random.Random) -> Request:
    shared = [(7 * i + rng.choice([0, 0, 0, 1, 2])) % 290 + 5 for i in range(rng.randint(1, LONGEST))]
    num_principles = rng.choice([0, 1, 1, 2, 3])
    base = tuple(shared)
    prompt = Prompt((base,))
    if num_principles:
        at = rng.randint(0, len(base))
        added = [[rng.randrange(5, VOCAB_SIZE) for _ in range(rng.randint(1, 9))] for _ in range(num_principles)]
        shares = [rng.choice([1, 1, 2, 5]) for _ in range(num_principles)]
        ratios = [rng.choice([-10, -3, -1, -0.5, 0.5, 1, 2, 5, 20]) for _ in range(num_principles)]
        method = rng.choice(list(METHODS))
        weights = tuple(share / sum(shares) for share in shares)
        needs_base = any(METHODS[method].coefficients(weights, ratios))
        principled = tuple((*base[:at], *more, *base[at:]) for more in added)
        prompt = Prompt(principled, weights, tuple(ratios), base if needs_base else None, method=method)
    if rng.random() < 0.15:
        prompt = replace(prompt, given=tuple(rng.randrange(5, VOCAB_SIZE) for _ in range(rng.randint(1, 20))))
    if rng.random() < 0.2:
        prompt = replace(prompt, salt=bytes(31) + bytes([rng.randrange(2)]))
    return Request(
        prompt, random_params(rng), rng.choice([1, 1, 1, 2, 3]), rng.randint(0, 30),
        rng.randint(0, 20) if rng.random() < 0.25 else None,
    )  # fmt: skip


def random_params(rng: random.Random) -> SamplingParams:
    def sometimes(probability: float, values: list, otherwise: object = None) -> object:
        return rng.choice(values) if rng.random() < probability else otherwise

    max_tokens = rng.randint(1, 14)
    biased = {rng.randrange(VOCAB_SIZE): rng.uniform(-100, 100) for _ in range(rng.randint(1, 20))}
    return SamplingParams(
        temperature=rng.choice([0, 0, 1e-6, 0.3, 0.9, 1.0, 3.0, 100.0]),
        top_p=sometimes(0.3, [0.1, 0.6, 0.95], 1.0),
        top_k=sometimes(0.3, [1, 2, 40], 0),
        min_p=sometimes(0.2, [0.01, 0.3], 0.0),
        seed=rng.getrandbits(40),
        max_tokens=max_tokens,
        stop=sometimes(0.3, [("e",), ("a", "ab"), ("1", "x", "th")], ()),
        stop_token_ids=frozenset(sometimes(0.3, [[9, 50], list(range(60, 120))], [])),
        ignore_eos=rng.random() < 0.5,
        min_tokens=sometimes(0.3, [1, max_tokens], 0),
        presence_penalty=sometimes(0.2, [-2.0, 0.7, 2.0], 0.0),
        frequency_penalty=sometimes(0.2, [-1.0, 2.0], 0.0),
        repetition_penalty=sometimes(0.2, [0.5, 1.3, 10.0], 1.0),
        logit_bias=sometimes(0.2, [biased], {}),
        structure=sometimes(0.2, STRUCTURES),
        logprobs=sometimes(0.3, [0, 3, 20]),
        trace=rng.random() < 0.2,
        alignment_top_p=sometimes(0.5, [0.3, 0.9, 1.0]),
        alignment_temperature=sometimes(0.2, [0.1, 1.0, 5.0]),
    )


class Drafts:
    """Replaces `PromptLookup.draft`: returns the correct continuation, wrong tokens, or the real draft, at random."""

    def __init__(self, rng: random.Random) -> None:
        self._chance, self._known = rng, dict[tuple[int, ...], list[int]]()

    def learn(self, request: Request) -> None:
        for choice in range(request.n):
            tokens, context = request.tokens(choice), list(request.prompt.principled[0])
            for place in range(len(tokens)):
                self._known[*context, *tokens[:place]] = tokens[place:]

    def draft(self, lookup: PromptLookup, most: int) -> list[int]:
        right = self._known.get(tuple(lookup._tokens), [])
        wrong = [self._chance.randrange(5, VOCAB_SIZE) for _ in range(4)]
        kind = self._chance.random()
        if kind < 0.4:
            return right[:most]
        return [*right[: self._chance.randint(0, 2)], *wrong][:most] if kind < 0.7 else drafted(lookup, most)


drafted = PromptLookup.draft


def crowd(loaded: LoadedModel, seed: int) -> Counter[str]:
    """Run the crowd of `seed` and return counts of what happened. Raises AssertionError if a reply differs."""
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(rng.randint(2, 12))]
    static, page_size = rng.random() < 0.5, rng.choice([1, 3, 4, 16])
    drafts = Drafts(rng)
    alone = Engine(loaded, EngineConfig(page_size=page_size, num_pages=2000, static=static))
    expected = [Request(r.prompt, r.params, r.n, 0, None) for r in requests]
    for number, request in enumerate(expected):
        salted = replace(request.prompt, salt=number.to_bytes(32, "little"))  # no prefix reuse between requests
        alone.submit(salted, request.params, request.take, request.n)
        while alone.step():
            pass
        drafts.learn(request)
    least = max(pages_of(request, page_size) for request in requests)
    config = EngineConfig(
        page_size=page_size,
        num_pages=least if rng.random() < 0.5 else least * rng.randint(1, 6),
        static=static,
        max_num_seqs=rng.choice([12, 16, 64]),
        max_num_batched_tokens=rng.choice([MOST_BRANCHES, 9, 33, 128, 1000]),
        num_speculative_tokens=rng.choice([0, 4]),
    )
    engine = Engine(loaded, config)
    num_objects = count_objects()
    PromptLookup.draft = lambda lookup, max_tokens: drafts.draft(lookup, max_tokens)
    try:
        run(engine, requests)
    finally:
        PromptLookup.draft = drafted
    for request, judge in zip(requests, expected, strict=True):
        compare(request, judge)
    assert engine.pool.num_free == engine.pool.num_pages
    assert (engine.backlog.num_requests, engine.backlog.num_tokens) == (0, 0)
    assert engine.idle
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert count_objects() == num_objects
    stats = engine.stats()
    done = {
        "crowds": 1,
        "replies": sum(request.n for request in requests),
        "tokens": sum(len(request.tokens(choice)) for request in requests for choice in range(request.n)),
        "preemptions": stats.num_preemptions,
        "drafts accepted": stats.num_tokens_accepted,
        "drafts refused": stats.num_tokens_drafted - stats.num_tokens_accepted,
        "prefixes hit": stats.num_tokens_cached,
        "aborts": sum(ends(request, choice) == "abort" for request in requests for choice in range(request.n)),
    }
    return Counter(done)


def pages_of(request: Request, page_size: int) -> int:
    """Most pages that one choice of the request may need."""
    more = len(request.prompt.given) + request.params.max_tokens
    return sum(-(-(len(ids) + more) // page_size) for ids in request.prompt.branches)


def run(engine: Engine, requests: list[Request]) -> None:
    ids: dict[int, int] = {}
    step = 0
    while True:
        for number, request in enumerate(requests):
            if request.submit == step:
                ids[number] = engine.submit(request.prompt, request.params, request.take, request.n)
            if request.abort is not None and request.submit + request.abort == step:
                engine.abort(ids[number])
        step += 1
        if not engine.step() and step > 51:
            return


def ends(request: Request, choice: int) -> str | None:
    return request.replies[choice][-1].finish_reason


def compare(request: Request, judge: Request) -> None:
    for choice in range(request.n):
        assert sum(output.finish_reason is not None for output in request.replies[choice]) == 1
        tokens, expected = request.tokens(choice), judge.tokens(choice)
        if ends(request, choice) == "abort":
            assert tokens == expected[: len(tokens)], (request.prompt, request.params, choice)
            continue
        assert tokens == expected, (request.prompt, request.params, choice)
        assert ends(request, choice) == ends(judge, choice)
        assert request.text(choice) == judge.text(choice)
        for a, b in zip(request.logprobs(choice), judge.logprobs(choice), strict=True):
            assert a == b or abs(a - b) < 1e-4, (request.prompt, request.params, choice)


def count_objects() -> int:
    """Number of live Sequence and Branch objects, after a garbage collection."""
    gc.collect()
    return sum(type(instance) in (Sequence, Branch) for instance in gc.get_objects())


def main(seconds: float, first: int) -> None:
    loaded, _ = tiny_pair(load().tokenizer, vocab_size=VOCAB_SIZE)
    gc.freeze()  # count_objects need not search the objects that exist already
    began, done, seed = time.monotonic(), Counter[str](), first
    while time.monotonic() - began < seconds:
        try:
            done += crowd(loaded, seed)
        except BaseException:
            print(f"seed {seed}")
            raise
        seed += 1
    print(f"seeds {first} to {seed - 1}: {dict(done)}")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)

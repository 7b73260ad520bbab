"""Every pair of features together, in few cases; the oracle judges greedy and seeded replies."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from linalign import Prompt, SamplingParams
from linalign.alignment_core.decoding.draw_settings import uniform
from linalign.alignment_core.methods import METHODS
from linalign.alignment_core.request import Structure
from linalign.alignment_core.scheduling.speculation import PromptLookup
from tests.alignment_core.test_grammars import allowed_by
from tests.engines import make_engine, tiny_pair
from tests.oracle import NEAR_TIE, Setting

pytestmark = pytest.mark.slow

FEATURES = {
    "principles": [0, 1, 2],
    "method": list(METHODS),
    "ratio": [2.0, -3.0],
    "top_p": [None, 0.6],
    "n": [1, 3],
    "logprobs": [None, 3],
    "structure": [None, Structure("regex", "[a-z]{4,9} [0-9]+(,[0-9]+)*")],
    "penalties": [False, True],
    "stop": [False, True],
    "temperature": [0.0, 0.9],
    "min_tokens": [0, 6],
    "prefix_hit": [False, True],
    "num_pages": [2000, 40],
    "abort": [False, True],
    "ignore_eos": [False, True],
    "static": [False, True],
    "speculation": [0, 4],
    "chunks": [None, 9],
}


def pairwise(features):
    """Cases in which every value of a feature occurs together with every value of every other feature."""
    rng = random.Random(1)
    names = list(features)
    missing = {
        frozenset({(a, i), (b, j)})
        for a, b in itertools.combinations(names, 2)
        for i in range(len(features[a]))
        for j in range(len(features[b]))
    }
    while missing:
        candidates = []
        for _ in range(50):
            pair = dict(rng.choice(sorted(map(sorted, missing))))
            case = {name: pair.get(name, rng.randrange(len(features[name]))) for name in names}
            covered = {frozenset(two) for two in itertools.combinations(case.items(), 2)} & missing
            candidates.append((len(covered), sorted(case.items()), covered))
        _, case, covered = max(candidates, key=lambda candidate: candidate[:2])
        missing -= covered
        yield {name: features[name][i] for name, i in case}


CASES = list(pairwise(FEATURES))


def test_every_pair_of_features_is_covered():
    assert len(CASES) < 30
    for a, b in itertools.combinations(FEATURES, 2):
        for x, y in itertools.product(FEATURES[a], FEATURES[b]):
            assert any(case[a] == x and case[b] == y for case in CASES)


@pytest.fixture(scope="module")
def wide(tokenizer):
    return tiny_pair(tokenizer)


def prompt_of(num_principles, ratio=2.0, method="linear"):
    ids = tuple((37 * i) % 20_000 + 300 for i in range(30))
    principled = tuple((*ids[:5], *range(1000 * k, 1000 * k + 4 + k), *ids[5:]) for k in range(1, num_principles + 1))
    match num_principles:
        case 0:
            return Prompt((ids,))
        case 1:
            return Prompt(principled, (1.0,), (ratio,), ids, method=method)
    return Prompt(principled, (0.25, 0.75), (ratio / 2, ratio * 1.5), ids, method=method)


@pytest.fixture(scope="module")
def paths():
    """Counts over all cases, checked only if the whole file ran."""
    taken = Counter()
    yield taken
    if taken["cases"] == len(CASES):
        assert taken["preemptions"] > 0
        assert taken["drafts"] > 0


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_two_features(wide, case, paths, monkeypatch):
    monkeypatch.setattr(PromptLookup, "draft", lambda self, most: self._tokens[7:9][:most])  # will be rejected
    loaded, oracle = wide
    engine = make_engine(
        loaded,
        page_size=4,
        num_pages=case["num_pages"],
        static=case["static"],
        num_speculative_tokens=case["speculation"],
        max_num_batched_tokens=case["chunks"],
    )
    prompt = prompt_of(case["principles"], case["ratio"], case["method"])
    edits = {"presence_penalty": 1.0, "repetition_penalty": 1.3} if case["penalties"] else {}
    params = SamplingParams(
        temperature=case["temperature"],
        seed=5,
        max_tokens=12,
        min_tokens=case["min_tokens"],
        structure=case["structure"],
        logprobs=case["logprobs"],
        ignore_eos=case["ignore_eos"],
        alignment_top_p=case["top_p"],
        stop=("e", "4") if case["stop"] else (),
        **edits,
    )
    if case["prefix_hit"]:
        run(engine, [(prompt, SamplingParams(max_tokens=1), 1)])
    company = [(replace(prompt_of(1), ratios=(0.5,)), SamplingParams(temperature=0, max_tokens=15), 1)]
    ended = [(prompt_of(1), SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), 1)] if case["abort"] else []
    (choices, others, *_), cached = run(engine, [(prompt, params, case["n"]), *company, *ended], aborted=len(ended))

    setting = Setting(
        prompt.ratios,
        prompt.weights,
        temperature=case["temperature"],
        presence=1.0 if edits else 0.0,
        repetition=1.3 if edits else 1.0,
        min_tokens=case["min_tokens"],
        stop_ids=() if case["ignore_eos"] and not case["structure"] else tuple(engine.eos_token_ids),
        allowed=allowed_for(engine, params) if case["structure"] else None,
        method=case["method"],
        top_p=case["top_p"] or METHODS[case["method"]].top_p,
    )
    ties = sum(judge(oracle, prompt, choices[i], setting, i) for i in range(case["n"]))
    assert ties <= 1
    assert oracle.check_greedy(company[0][0], Setting((0.5,)), ids_of(others[0])) <= 1
    for choice, outputs in choices.items():
        ids, last = ids_of(outputs), outputs[-1]
        assert (len(ids), last.finish_reason) == end_of(engine, params, ids), case
        assert last.usage.completion_tokens == len(ids)
        if case["stop"] and case["min_tokens"] == 0:
            assert not set("".join(output.text for output in outputs)) & {"e", "4"}
        reports = [report for output in outputs for report in output.logprobs]
        assert bool(reports) == (case["logprobs"] is not None)
        for position in range(choice, len(reports), 5):
            z = oracle.next_logits(prompt, ids[:position], setting if prompt.base else Setting()).log_softmax(-1)
            assert reports[position].logprob == pytest.approx(float(z[ids[position]]), abs=1e-3)
    paths["cases"] += 1
    paths["preemptions"] += engine.scheduler.num_preemptions
    paths["drafts"] += engine.stats().num_tokens_drafted
    if case["prefix_hit"]:
        assert cached >= len(prompt.principled[0]) // 4 * 4
    assert engine.pool.num_free == engine.pool.num_pages


def allowed_for(engine, params):
    """The tokens that the structure allows. With ignore_eos, an end only if no other token may follow."""
    allowed = allowed_by(engine, params.structure)

    def wanted(output):
        ids = allowed(output)
        return [id for id in ids if not params.ignore_eos or id not in engine.eos_token_ids] or ids

    return wanted


def end_of(engine, params, ids):
    """Expected length and finish reason of a reply with these tokens: at its first valid end, else at max_tokens."""
    matcher = engine.grammars.matcher(params.structure) if params.structure else None
    for number, token in enumerate(ids, 1):
        counts, is_eos = number > params.min_tokens, token in engine.eos_token_ids
        if is_eos and ((counts and not params.ignore_eos) or matcher):
            return number, "stop"
        text = engine.tokenizer.decode([token], skip_special_tokens=True)
        if counts and any(stop in text for stop in params.stop):
            return number, "stop"
        if matcher and (not matcher.consume_token(token) or matcher.is_stopped()):
            return number, "stop"
    return params.max_tokens, "length"


def ids_of(outputs):
    return [token for output in outputs for token in output.token_ids]


def run(engine, requests, aborted=0):
    """Run requests and abort the last `aborted` ones on the way.

    Returns the outputs of each request by choice, and the cached prompt tokens of the first.
    """
    collected = [{} for _ in requests]
    request_ids = [
        engine.submit(prompt, params, lambda o, into=into: into.setdefault(o.choice, []).append(o), n)
        for (prompt, params, n), into in zip(requests, collected, strict=True)
    ]
    for _ in range(6 if aborted else 0):
        engine.step()
    for request_id in request_ids[len(request_ids) - aborted :]:
        engine.abort(request_id)
    while engine.step():
        pass
    return collected, collected[0][0][-1].usage.prefix_cached_tokens


def judge(oracle, prompt, outputs, setting, choice):
    """Number of tokens that differ from the oracle's, all at near ties. Draws reuse the same uniform number."""
    ids = ids_of(outputs)
    if setting.temperature == 0:
        return oracle.check_greedy(prompt, setting, ids)
    ties = 0
    for position, token in enumerate(ids):
        z = oracle.next_logits(prompt, ids[:position], setting)
        cumulative = (z / setting.temperature).softmax(-1).cumsum(-1)
        number = uniform(5, choice, position) * float(cumulative[-1])
        expected = int((cumulative <= number).sum())
        if token != expected:
            edges = [float(cumulative[token]), float(cumulative[token - 1]) if token else 0.0]
            assert min(math.fabs(edge - number) for edge in edges) < NEAR_TIE, (position, token, expected)
            ties += 1
    return ties

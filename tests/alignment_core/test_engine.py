"""The engine on tiny random models, against the float64 oracle. Each test asserts that its code path was taken."""

import os
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linalign import EngineDead, Prompt, RequestFailed, SamplingParams
from linalign.alignment_core.decoding.sampler import Sampler
from linalign.alignment_core.decoding.static_sampler import StaticSampler
from tests.engines import (
    GREEDY,
    aligned,
    judge,
    make_engine,
    prompts,
    run_all,
    threads,
    tiny_pair,
    token_ids,
    wait_until,
)
from tests.oracle import Setting


def test_both_forms_of_the_oracle_agree(tiny):
    _, oracle = tiny
    prompt = aligned(2.0)
    tokens = oracle.greedy(prompt, Setting((2.0,)), 12)
    assert oracle.check_greedy(prompt, Setting((2.0,)), tokens) == 0
    wrong = [*tokens[:5], (tokens[5] + 1) % 300, *tokens[6:]]
    with pytest.raises(AssertionError):
        oracle.check_greedy(prompt, Setting((2.0,)), wrong)


@pytest.mark.parametrize(
    "config",
    [
        {"page_size": 4, "num_pages": 400},
        {"page_size": 4, "num_pages": 400, "max_num_batched_tokens": 7},
        {"page_size": 3, "num_pages": 60},
        {"page_size": 4, "num_pages": 400, "max_num_seqs": 2},
        {"page_size": 3, "num_pages": 60, "static": True},
    ],
    ids=["together", "chunked", "preempted", "few at once", "overlapped"],
)
def test_mixed_batches_equal_the_oracle(tiny, config):
    loaded, oracle = tiny
    engine = make_engine(loaded, **config)
    all_outputs = run_all(engine, [(prompt, GREEDY) for prompt in prompts()])
    for prompt, outputs in zip(prompts(), all_outputs, strict=True):
        assert len(judge(oracle, prompt, outputs)) == 12
        assert outputs[-1].finish_reason == "length"
    assert engine.pool.num_free == engine.pool.num_pages
    if config["num_pages"] == 60:
        assert engine.scheduler.num_preemptions > 0
    if "max_num_batched_tokens" in config:
        assert engine.runner.num_forwards > 12 * len(prompts())


@pytest.mark.parametrize("ratios", [(1.0, 3.0), (0.5, 0.0, 4.0)])
def test_several_principles(tiny, ratios):
    loaded, oracle = tiny
    base = tuple(range(20, 45))
    weights = (0.25, 0.75) if len(ratios) == 2 else (0.5, 0.25, 0.25)
    principled = tuple(base[:4] + tuple(range(100 + 10 * i, 106 + 10 * i)) + base[4:] for i in range(len(ratios)))
    prompt = Prompt(principled, weights, ratios, base)
    (outputs,) = run_all(make_engine(loaded, num_pages=200), [(prompt, GREEDY)])
    judge(oracle, prompt, outputs)
    assert outputs[-1].usage.branches == len(ratios) + 1


def test_a_dead_engine_ends_all_requests(tiny, monkeypatch):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=100)
    monkeypatch.setattr(engine.runner, "forward", lambda *_: 1 / 0)
    ended = threading.Event()
    outputs = []

    def on_output(output):
        outputs.append(output)
        ended.set()

    engine.submit(aligned(2.0), GREEDY, on_output)
    with engine:
        assert ended.wait(10)
        assert outputs[-1].finish_reason == "error"
        assert not engine.alive
        with pytest.raises(EngineDead):
            engine.submit(aligned(2.0), GREEDY, print)
    assert engine.pool.num_free == 100


def test_a_reply_without_a_client_is_aborted(embedded):
    """One reply that was never begun, and one that was dropped half way."""
    params = SamplingParams(ignore_eos=True)
    with make_engine(embedded, num_pages=100) as engine:
        for begun in (False, True):
            replies = engine.chat([{"role": "user", "content": "Hi"}], params=params)
            if begun:
                next(replies)
            del replies
            wait_until(lambda: engine.pool.num_free == 100 and not engine.scheduler.waiting)


def test_an_engine_that_never_ran_ends_all_requests_when_it_stops(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=100)
    outputs = []
    engine.submit(aligned(2.0), GREEDY, outputs.append)
    engine.stop()
    assert [output.finish_reason for output in outputs] == ["abort"]
    with pytest.raises(EngineDead):
        engine.start()


def test_a_failing_listener_affects_no_other_request(tiny):
    loaded, oracle = tiny
    engine = make_engine(loaded, num_pages=100)
    outputs = []
    engine.submit(aligned(0), GREEDY, lambda _: 1 / 0)
    engine.submit(aligned(2.0), GREEDY, outputs.append)
    while engine.step():
        pass
    judge(oracle, aligned(2.0), outputs)
    assert outputs[-1].finish_reason == "length"
    assert engine.pool.num_free == 100


@pytest.mark.parametrize("config", [{}, {"static": True}, {"num_speculative_tokens": 4}], ids=str)
def test_a_draw_that_fails_for_one_sequence_harms_no_other(tiny, monkeypatch, config):
    loaded, oracle = tiny
    engine = make_engine(loaded, num_pages=400, **config)

    def breaking(draw):
        def drawn(sampler, logits, next_tokens):
            if any(sequence.params.seed == 13 and position >= 3 for sequence, position in next_tokens):
                raise ValueError("injected")
            return draw(sampler, logits, next_tokens)

        return drawn

    for kind in (Sampler, StaticSampler):
        monkeypatch.setattr(kind, "draw", breaking(kind.draw))
    bad = replace(GREEDY, seed=13)
    first, *good = run_all(engine, [(aligned(2.0), bad), *((prompt, GREEDY) for prompt in prompts())])
    assert isinstance(first[-1].error, RequestFailed)
    assert 0 < len(token_ids(first)) <= 3  # with drafts, the failing position is reached earlier
    for prompt, outputs in zip(prompts(), good, strict=True):
        assert len(judge(oracle, prompt, outputs)) == 12
    assert engine.pool.num_free == engine.pool.num_pages


request = st.tuples(
    st.integers(1, 40),  # length
    st.sampled_from([0.0, 0.5, 2.0, 5.0]),
    st.integers(1, 8),  # max_tokens
    st.integers(0, 6),  # step in which it arrives
    st.one_of(st.none(), st.integers(0, 6)),  # steps from its arrival until it is aborted
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(request, min_size=1, max_size=6),
    budget=st.integers(4, 64),
    pages=st.integers(40, 90),
    overlap=st.booleans(),
    drafts=st.sampled_from([0, 4]),
)
def test_any_traffic_equals_the_oracle_and_frees_all_pages(tiny, requests, budget, pages, overlap, drafts):
    loaded, oracle = tiny
    sizes = {"page_size": 3, "num_pages": pages, "max_num_batched_tokens": budget, "num_speculative_tokens": drafts}
    engine = make_engine(loaded, static=overlap, **sizes)
    going = []
    arrivals = [(arrival, index) for index, (_, _, _, arrival, _) in enumerate(requests)]
    for now in range(10_000):
        for arrival, index in arrivals:
            if arrival == now:
                length, ratio, max_tokens, _, abort = requests[index]
                prompt, outputs = aligned(ratio, length, index % 2), []
                params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
                going.append((engine.submit(prompt, params, outputs.append), prompt, outputs, now, abort))
        for request_id, _, _, start, abort in going:
            if abort is not None and start + abort == now:
                engine.abort(request_id)
        if not engine.step() and now > 6:
            break
    assert len(going) == len(requests)
    for _, prompt, outputs, _, abort in going:
        assert outputs[-1].finish_reason == "length" or (abort is not None and outputs[-1].finish_reason == "abort")
        if token_ids(outputs):
            judge(oracle, prompt, outputs)
    assert engine.pool.num_free == pages


def test_with_overlap_a_step_is_launched_before_the_previous_tokens_are_known(tiny, monkeypatch):
    """The overlap is not visible: a stop token, max_tokens and an abort all end a reply in time."""
    loaded, oracle = tiny
    engine = make_engine(loaded, num_pages=400, static=True)
    num_placeholders = []
    forward = engine.runner.forward

    def spy(step):
        num_placeholders.append(sum(token < 0 for rows in step.rows.values() for row in rows for token in row.tokens))
        return forward(step)

    monkeypatch.setattr(engine.runner, "forward", spy)
    (outputs,) = run_all(engine, [(aligned(2.0), GREEDY)])
    tokens = judge(oracle, aligned(2.0), outputs)
    assert num_placeholders == [0] + [2] * 11
    for stop in set(tokens):
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=frozenset({stop}))
        (outputs,) = run_all(engine, [(aligned(2.0), params)])
        assert token_ids(outputs) == tokens[: tokens.index(stop) + 1]
        assert outputs[-1].usage.completion_tokens == len(token_ids(outputs))

    aborted, other = [], []
    request_id = engine.submit(aligned(2.0), GREEDY, aborted.append)
    engine.submit(aligned(5.0), GREEDY, other.append)
    for _ in range(5):
        engine.step()
    engine.abort(request_id)
    while engine.step():
        pass
    assert aborted[-1].finish_reason == "abort"
    assert token_ids(aborted) == tokens[:4]
    assert len(judge(oracle, aligned(5.0), other)) == 12
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("ending", ["abort", "stop"])
@pytest.mark.parametrize("failing", ["text", "pages"])
def test_a_failure_in_ending_one_sequence_harms_no_other(tiny, ending, failing, monkeypatch):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=100)
    broken, other = [], []
    id = engine.submit(aligned(2.0, 10), GREEDY, broken.append)
    engine.submit(aligned(2.0, 12, 3), GREEDY, other.append)
    engine.step()
    sequence, release = engine.scheduler.running[0], engine.pool.release
    if failing == "text":
        sequence.text.finish = lambda: 1 / 0
    else:

        def failing_release(branch):
            release(branch)
            if branch is sequence.branches[-1]:
                raise ZeroDivisionError

        monkeypatch.setattr(engine.pool, "release", failing_release)
    if ending == "abort":
        engine.abort(id)
        while engine.step():
            pass
    else:
        engine.stop()
    assert isinstance(broken[-1].error, RequestFailed)
    assert other[-1].finish_reason == {"abort": "length", "stop": "abort"}[ending]
    assert engine.pool.num_free == engine.pool.num_pages


def test_the_loading_thread_keeps_no_openmp_threads(tokenizer):
    """With more OpenMP threads than cores, libgomp's barriers sleep, and every step takes twice as long."""
    loaded, _ = tiny_pair(tokenizer)
    with threads(2):
        torch.randn(1 << 20).exp()  # runs in parallel, so this thread gets an OpenMP worker
        before = num_os_threads()
        make_engine(loaded, num_pages=64)
        wait_until(lambda: num_os_threads() < before)


def num_os_threads():
    return len(os.listdir("/proc/self/task"))


def test_a_reply_ends_only_once(tiny):
    """The watchdog may give up just before the engine's thread reports the end, or the thread may return later."""
    engine, outputs = make_engine(tiny[0], num_pages=100), [[], []]
    for collected, max_tokens in zip(outputs, (3, 9), strict=True):
        engine.submit(aligned(2.0), replace(GREEDY, max_tokens=max_tokens), collected.append)
    while not outputs[0]:
        engine.step()
    first, _ = engine.scheduler.running
    finish = first.text.finish
    first.text.finish = lambda: engine.give_up(EngineDead("it hangs")) or finish()
    while not engine.error:
        engine.step()
    engine.stop()
    for collected in outputs:
        assert [output.finish_reason for output in collected if output.finish_reason] == ["error"]
        assert collected[-1].finish_reason

"""The engine on tiny random models, judged by the float64 oracle; every path is asserted to be taken."""

import os
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignment_core import EngineDead, InvalidRequest, Prompt, RequestFailed, SamplingParams, model_runner
from alignment_core import engine as engine_module
from alignment_core.attention import native, sdpa
from tests.conftest import make_engine, run_all, threads, tiny_pair, token_ids
from tests.oracle import Setting

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def aligned(ratio, length=30, shift=0, extra=9):
    ids = tuple((7 * i + shift) % 290 + 5 for i in range(length))
    principled = ids[:5] + tuple(range(50, 50 + extra)) + ids[5:]
    return Prompt((principled,), (1.0,), (ratio,), ids if ratio else None)


def judge(oracle, prompt, outputs, **setting):
    tokens = token_ids(outputs)
    ties = oracle.check_greedy(prompt, Setting(prompt.ratios, prompt.weights, **setting), tokens)
    assert ties <= 1
    return tokens


def prompts():
    return [aligned(ratio, 10 + 11 * i, i) for i, ratio in enumerate([0, 0.5, 2, 5, 0, 2])]


def test_the_two_forms_of_the_oracle_agree(tiny):
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


def test_one_forward_a_step_for_all_rows(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=400, max_num_batched_tokens=512)
    run_all(engine, [(prompt, GREEDY) for prompt in prompts()])
    assert engine.runner.num_forwards == 12


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


def test_prefixes_are_computed_once(tiny):
    """Within a sequence, between requests of one step, and again later."""
    loaded, oracle = tiny
    engine = make_engine(loaded, page_size=4, num_pages=400)
    shared = tuple(range(10, 50))
    prompt = Prompt(((*shared, 60, 61, 62, 63, 64),), (1.0,), (2.0,), (*shared, 60))
    first, twin = run_all(engine, [(prompt, GREEDY), (prompt, GREEDY)])
    assert judge(oracle, prompt, first) == judge(oracle, prompt, twin)
    assert first[-1].usage.prefix_cached_tokens == 40
    assert first[-1].usage.branch_tokens_computed == 45 + 1 + 2 * 11
    assert twin[-1].usage.prefix_cached_tokens == 44 + 40
    (later,) = run_all(engine, [(prompt, GREEDY)])
    assert later[-1].usage.prefix_cached_tokens == 44 + 40
    assert token_ids(later) == token_ids(first)


def test_a_second_turn_finds_the_reply_of_the_first(tiny):
    loaded, oracle = tiny
    engine = make_engine(loaded, page_size=4, num_pages=400)
    prompt = aligned(0)
    (first,) = run_all(engine, [(prompt, GREEDY)])
    second = Prompt(((*prompt.principled[0], *token_ids(first), 9, 8, 7),))
    (outputs,) = run_all(engine, [(second, GREEDY)])
    judge(oracle, second, outputs)
    assert outputs[-1].usage.prefix_cached_tokens >= len(prompt.principled[0]) + 4


def test_ratio_zero_is_one_branch(tiny):
    loaded, _ = tiny
    prompt = aligned(0)
    assert prompt.base is None
    (outputs,) = run_all(make_engine(loaded, num_pages=100), [(prompt, GREEDY)])
    assert outputs[-1].usage.branches == 1
    assert outputs[-1].usage.branch_tokens_computed == len(prompt.principled[0]) + 11


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(tiny):
    loaded, _ = tiny
    params = SamplingParams(seed=11, max_tokens=12, ignore_eos=True)
    (alone,) = run_all(make_engine(loaded, num_pages=400), [(aligned(2), params)])
    others = [(prompt, SamplingParams(max_tokens=20)) for prompt in prompts()]
    crowd = run_all(make_engine(loaded, page_size=4, num_pages=400), [*others, (aligned(2), params)])
    assert token_ids(crowd[-1]) == token_ids(alone)
    (other,) = run_all(make_engine(loaded, num_pages=400), [(aligned(2), SamplingParams(seed=12, max_tokens=12))])
    assert token_ids(other) != token_ids(alone)


def test_every_end_of_sequence_id_ends_the_reply(tiny):
    loaded, oracle = tiny
    tokens = oracle.greedy(aligned(2.0), Setting((2.0,)), 12)
    unused = next(id for id in range(300) if id not in tokens)
    params = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=frozenset({unused, tokens[4]})
    )
    (outputs,) = run_all(make_engine(loaded, num_pages=400), [(aligned(2.0), params)])
    assert token_ids(outputs) == tokens[: tokens.index(tokens[4]) + 1]
    assert outputs[-1].finish_reason == "stop"


def test_what_does_not_fit_is_refused_before_any_compute(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=40)
    long = Prompt((tuple(range(5, 200)) * 3,))
    for prompt, params, param in [
        (long, SamplingParams(), "messages"),
        (aligned(2.0), SamplingParams(max_tokens=500), "max_tokens"),
        (aligned(2.0), SamplingParams(max_tokens=400), "max_tokens"),
    ]:
        with pytest.raises(InvalidRequest) as refusal:
            engine.submit(prompt, params, print)
        assert refusal.value.param == param
    assert engine.runner.num_forwards == 0


def test_the_context_counts_the_longest_branch(tiny):
    loaded, _ = tiny
    prompt = aligned(2.0, length=480, extra=25)  # 505 with the principle, 480 without; the context has 512
    (outputs,) = run_all(make_engine(loaded, num_pages=100), [(prompt, SamplingParams(temperature=0, ignore_eos=True))])
    assert len(token_ids(outputs)) == 7
    assert outputs[-1].finish_reason == "length"


def test_an_abort_frees_the_pages_before_the_next_step(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=100)
    outputs = []
    request = engine.submit(aligned(2.0), GREEDY, outputs.append)
    engine.step()
    assert engine.pool.num_free < 100
    engine.abort(request)
    assert not engine.step()
    assert engine.pool.num_free == 100
    assert outputs[-1].finish_reason == "abort"


def test_a_dead_engine_tells_everyone(tiny, monkeypatch):
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


def test_a_reply_that_nobody_waits_for_is_aborted(embedded):
    """Never begun, and dropped half way."""
    params = SamplingParams(ignore_eos=True)
    with make_engine(embedded, num_pages=100) as engine:
        for begun in (False, True):
            replies = engine.chat([{"role": "user", "content": "Hi"}], params=params)
            if begun:
                next(replies)
            del replies
            wait_until(lambda: engine.pool.num_free == 100 and not engine.scheduler.waiting)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_engine_that_never_ran_tells_everyone_when_it_stops(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=100)
    outputs = []
    engine.submit(aligned(2.0), GREEDY, outputs.append)
    engine.stop()
    assert [output.finish_reason for output in outputs] == ["abort"]
    with pytest.raises(EngineDead):
        engine.start()


def test_a_listener_that_fails_harms_nobody_else(tiny):
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
        def drawn(logits, sequences, positions):
            if any(s.params.seed == 13 and p >= 3 for s, p in zip(sequences, positions, strict=True)):
                raise ValueError("injected")
            return draw(logits, sequences, positions)

        return drawn

    monkeypatch.setattr(engine_module, "sample", breaking(engine_module.sample))
    monkeypatch.setattr(engine, "_sample", breaking(engine._sample))
    bad = replace(GREEDY, seed=13)
    first, *good = run_all(engine, [(aligned(2.0), bad), *((prompt, GREEDY) for prompt in prompts())])
    assert isinstance(first[-1].error, RequestFailed)
    assert 0 < len(token_ids(first)) <= 3  # drafts look ahead
    for prompt, outputs in zip(prompts(), good, strict=True):
        assert len(judge(oracle, prompt, outputs)) == 12
    assert engine.pool.num_free == engine.pool.num_pages


def test_without_max_tokens_a_reply_is_as_long_as_context_and_cache_allow(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=8, page_size=16)  # 64 tokens a branch
    params = SamplingParams(temperature=0, ignore_eos=True)
    (outputs,) = run_all(engine, [(aligned(2.0), params)])
    assert len(token_ids(outputs)) == 64 - 39
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("config", [{"max_model_len": 513}, {"max_num_seqs": 0}, {"page_size": 0}], ids=str)
def test_sizes_that_cannot_work_are_refused(tiny, config):
    with pytest.raises(ValueError, match=r"max_model_len|at least"):
        make_engine(tiny[0], num_pages=10, **config)


ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "smollm3": {},
    "phi3": {},
}


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures(tokenizer, model_type, kernels, monkeypatch):
    """Grouped-query heads everywhere; sliding windows and soft-capping where the model has them."""
    if not kernels:
        monkeypatch.setattr(model_runner, "library", lambda: None)
    loaded, oracle = tiny_pair(tokenizer, model_type, kernels, vocab_size=300, **ARCHITECTURES[model_type])
    for config in ({"num_pages": 400}, {"page_size": 4, "num_pages": 400, "max_num_batched_tokens": 9}):
        engine = make_engine(loaded, **config)
        assert loaded.model.config._attn_implementation == (native.NAME if kernels else sdpa.NAME)
        for prompt, outputs in zip(prompts(), run_all(engine, [(prompt, GREEDY) for prompt in prompts()]), strict=True):
            judge(oracle, prompt, outputs)


def test_attention_in_chunks_is_refused(tokenizer):
    loaded, _ = tiny_pair(tokenizer, vocab_size=300)
    loaded.model.config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(ValueError, match="chunked_attention"):
        make_engine(loaded, num_pages=10)


def test_an_architecture_that_bypasses_our_attention_is_refused(tokenizer):
    loaded, _ = tiny_pair(tokenizer, "stablelm", vocab_size=300)
    with pytest.raises(ValueError, match="attention interface"):
        make_engine(loaded, num_pages=10)


request = st.tuples(
    st.integers(1, 40),  # length
    st.sampled_from([0.0, 0.5, 2.0, 5.0]),
    st.integers(1, 8),  # max_tokens
    st.integers(0, 6),  # steps before it arrives
    st.one_of(st.none(), st.integers(0, 6)),  # steps before it is aborted
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(request, min_size=1, max_size=6),
    budget=st.integers(4, 64),
    pages=st.integers(40, 90),
    overlap=st.booleans(),
    drafts=st.sampled_from([0, 4]),
)
def test_any_traffic_equals_the_oracle_and_leaves_no_page_behind(tiny, requests, budget, pages, overlap, drafts):
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


def test_with_overlap_a_step_is_launched_before_the_tokens_of_the_last_are_known(tiny, monkeypatch):
    """And nothing of it shows: neither a stop token nor max_tokens nor an abort lets a reply run on."""
    loaded, oracle = tiny
    engine = make_engine(loaded, num_pages=400, static=True)
    unknown = []
    forward = engine.runner.forward

    def spy(step):
        unknown.append(sum(token < 0 for rows in step.rows.values() for row in rows for token in row.tokens))
        return forward(step)

    monkeypatch.setattr(engine.runner, "forward", spy)
    (outputs,) = run_all(engine, [(aligned(2.0), GREEDY)])
    tokens = judge(oracle, aligned(2.0), outputs)
    assert unknown == [0] + [2] * 11
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


def test_decodes_beyond_the_budget_take_turns(tiny):
    loaded, oracle = tiny
    engine = make_engine(loaded, num_pages=400, max_num_batched_tokens=5)  # two of three pairs of rows
    texts, replies = [aligned(2.0, 10, i) for i in range(3)], [[], [], []]
    for prompt, reply in zip(texts, replies, strict=True):
        engine.submit(prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), reply.append)
    drawn = []
    while engine.step():
        running = engine.scheduler.running
        if len(running) == 3 and all(s.is_decoding and s.output_ids for s in running):
            drawn.append([len(s.output_ids) for s in running])
    gains = [last - first for first, last in zip(drawn[0], drawn[-1], strict=True)]
    assert max(gains) - min(gains) <= 1
    assert min(gains) > 3
    for prompt, reply in zip(texts, replies, strict=True):
        judge(oracle, prompt, reply)


@pytest.mark.parametrize("way", ["abort", "stop"])
def test_a_failure_in_ending_one_sequence_harms_no_other(tiny, way):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=100)
    broken, other = [], []
    id = engine.submit(aligned(2.0, 10), GREEDY, broken.append)
    engine.submit(aligned(2.0, 12, 3), GREEDY, other.append)
    engine.step()
    sequence = engine.scheduler.running[0]
    sequence.text.finish = lambda: 1 / 0
    if way == "abort":
        engine.abort(id)
        while engine.step():
            pass
    else:
        engine.stop()
    assert isinstance(broken[-1].error, RequestFailed)
    assert other[-1].finish_reason == {"abort": "length", "stop": "abort"}[way]
    assert engine.pool.num_free == engine.pool.num_pages


def test_decodes_run_in_every_step_however_long_the_prompts_that_arrive(tiny):
    """Prompts are cut to what the decodes leave of a step, so none of them makes a step longer than the budget."""
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=400, max_num_batched_tokens=16)
    reply = []
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    engine.submit(aligned(2.0, 10, 0), params, reply.append)
    while not reply:
        engine.step()
    for i in range(3):
        long = Prompt((tuple(range(5 + i, 205 + i)),))
        engine.submit(long, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), lambda _: None)
    sizes, forward = [], engine.runner.forward

    def watched(step):
        sizes.append(step.num_tokens)
        return forward(step)

    engine.runner.forward = watched
    before = len(reply)
    for _ in range(40):
        engine.step()
    assert len(reply) == before + 40
    assert max(sizes) == 16
    assert sizes.count(16) > 30  # and the prompts do get on


def test_nobody_is_overtaken_for_ever(tiny):
    """A request with many branches and a long prompt, among short ones that keep coming: what came after it waits."""
    loaded, oracle = tiny
    engine = make_engine(loaded, num_pages=60, page_size=4, max_num_seqs=4, max_num_batched_tokens=16)
    ended, replies = [], {}

    def submit(name, prompt, max_tokens):
        replies[name] = []

        def listen(output):
            replies[name].append(output)
            if output.finish_reason:
                ended.append(name)

        engine.submit(prompt, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True), listen)

    for i in range(3):
        submit(f"early {i}", aligned(2.0, 10, i), 8)
    large = aligned(2.0, 40, 50)
    submit("large", large, 8)
    number = 0
    while "large" not in ended:
        if engine.scheduler.pool.num_free and len(engine.scheduler.waiting) < 3:
            submit(number, aligned(1.0, 6, number % 40), 3)
            number += 1
        engine.step()
        assert number < 60
    admitted_later = [name for name in ended[: ended.index("large")] if isinstance(name, int)]
    assert len(admitted_later) <= 8 * engine.scheduler.max_num_seqs  # while it ran itself
    assert replies["large"][0].token_ids
    judge(oracle, large, replies["large"])
    while engine.step():
        pass
    assert engine.pool.num_free == engine.pool.num_pages


def test_the_thread_that_loaded_keeps_no_threads_beside_the_engines(tokenizer):
    """With more OpenMP threads than cores libgomp's barriers sleep, and every step takes twice as long."""
    loaded, _ = tiny_pair(tokenizer)
    with threads(2):
        torch.randn(1 << 20).exp()  # in parallel, so this thread has one beside it
        before = num_os_threads()
        make_engine(loaded, num_pages=64)
        wait_until(lambda: num_os_threads() < before)


def num_os_threads():
    return len(os.listdir("/proc/self/task"))

"""Which rows a step runs: its token budget, turns among decodes, and the order of the queue."""

from dataclasses import replace

import pytest

from linalign import Prompt, SamplingParams
from linalign.alignment_core.scheduling.sequence import Status
from tests.engines import GREEDY, aligned, judge, make_engine, prompts, run_all


def test_one_forward_pass_per_step_for_all_rows(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=400, max_num_batched_tokens=512)
    run_all(engine, [(prompt, GREEDY) for prompt in prompts()])
    assert engine.runner.num_forwards == 12


def test_decodes_beyond_the_budget_take_turns(tiny):
    loaded, oracle = tiny
    engine = make_engine(loaded, num_pages=400, max_num_batched_tokens=5)  # rows of two sequences out of three
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


def test_decodes_run_in_every_step_however_long_the_prompts_that_arrive(tiny):
    """Prefill chunks take only the tokens that decodes leave, so no step exceeds its budget."""
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
    assert sizes.count(16) > 30  # so the prefills make progress


def test_a_large_request_is_not_overtaken_forever(tiny):
    """A large request among small ones that keep coming: later requests wait until it is admitted."""
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
    assert len(admitted_later) <= 8 * engine.scheduler.max_num_seqs  # admitted while the large one ran
    assert replies["large"][0].token_ids
    judge(oracle, large, replies["large"])
    while engine.step():
        pass
    assert engine.pool.num_free == engine.pool.num_pages


def test_a_preempted_sequence_is_admitted_before_new_ones(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, page_size=3, num_pages=56)
    for prompt in prompts():
        engine.submit(prompt, GREEDY, lambda _: None)
    while not engine.scheduler.num_preemptions:
        assert engine.step()
    assert [sequence.status for sequence in engine.scheduler.waiting][:2] == [Status.PREEMPTED, Status.WAITING]


@pytest.mark.parametrize("others", ["decodes", "prefills", "texts"])
def test_a_text_is_scored_in_as_many_steps_in_a_batch_as_alone(tiny, others):
    loaded, oracle = tiny
    given = tuple((11 * i) % 280 + 7 for i in range(300))
    scored = Prompt((given[:1],), given=given[1:])
    company = {
        "decodes": [(aligned(0, 10, i), replace(GREEDY, max_tokens=30)) for i in range(64)],
        "prefills": [(Prompt((tuple(range(5 + i, 265 + i)) + given[:200],)), replace(GREEDY, max_tokens=3))
                     for i in range(20)],
        "texts": [(Prompt((given[i : i + 1],), given=given[i + 1 :]), SamplingParams(max_tokens=0)) for i in range(6)],
    }  # fmt: skip
    engine = make_engine(loaded, num_pages=4000, max_num_seqs=100)
    replies = [[] for _ in company[others]]
    for (prompt, params), reply in zip(company[others], replies, strict=True):
        engine.submit(prompt, params, reply.append)
    outputs, num_steps = [], 0
    engine.submit(scored, SamplingParams(max_tokens=0, logprobs=0), outputs.append)
    while not (outputs and outputs[-1].finish_reason):
        engine.step()
        num_steps += bool(outputs)
    if others == "decodes":
        assert not any(reply[-1].finish_reason for reply in replies)
    assert num_steps <= (len(company[others]) + 1) * 5 if others == "texts" else num_steps <= 7
    while engine.step():
        pass
    z = oracle.logits(given).log_softmax(-1)
    reports = [report for output in outputs for report in output.logprobs]
    expected = [float(z[place, token]) for place, token in enumerate(given[1:])]
    assert [report.logprob for report in reports] == pytest.approx(expected, abs=2e-4)
    for (prompt, _), reply in zip(company[others], replies, strict=True):
        if others != "texts":
            judge(oracle, prompt, reply)

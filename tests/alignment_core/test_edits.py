"""Edits, log-probabilities and several choices, against the oracle."""

from dataclasses import replace

import pytest
import torch

from linalign import InvalidRequest, SamplingParams
from linalign.alignment_core.decoding import edits
from tests.engines import GREEDY, aligned, make_engine, prompts, run_all, token_ids
from tests.oracle import NEAR_TIE, Setting

EDITS = {
    "presence": ({"presence_penalty": 1.5}, {"presence": 1.5}),
    "frequency": ({"frequency_penalty": 1.2}, {"frequency": 1.2}),
    "both": (
        {"presence_penalty": -0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.1},
        {"presence": -0.5, "frequency": 0.7, "repetition": 1.1},
    ),
    "repetition": ({"repetition_penalty": 2.0}, {"repetition": 2.0}),
    "bias": ({"logit_bias": {7: 4.0, 9: -100.0, 50: 3.5}}, {"bias": ((7, 4.0), (9, -100.0), (50, 3.5))}),
    "all": (
        {"presence_penalty": 1.0, "repetition_penalty": 1.3, "logit_bias": {200: 100.0}},
        {"presence": 1.0, "repetition": 1.3, "bias": ((200, 100.0),)},
    ),
}


def judged(oracle, prompt, outputs, **setting):
    assert oracle.check_greedy(prompt, Setting(prompt.ratios, prompt.weights, **setting), token_ids(outputs)) <= 1


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"page_size": 3, "num_pages": 60},
        {"max_num_batched_tokens": 7},
        {"static": True},
        {"num_speculative_tokens": 4},
    ],
    ids=str,
)
def test_edits_equal_the_oracle_in_one_crowd(tiny, config):
    """Every kind of edit beside every other and beside requests without edits, aligned and plain."""
    loaded, oracle = tiny
    engine = make_engine(loaded, **{"num_pages": 600} | config)
    narrow = replace(GREEDY, alignment_top_p=0.8)  # so that edits can change the result
    requests = [(prompt, replace(narrow, **EDITS[name][0])) for name, prompt in zip(EDITS, prompts(), strict=True)] + [
        (aligned(2.0, 33, 4), narrow),
        (aligned(0, 20, 2), narrow),
    ]
    replies = run_all(engine, requests)
    plain = run_all(engine, [(prompt, narrow) for prompt, _ in requests])
    for (prompt, _), outputs, (_, setting) in zip(
        requests, replies, [*EDITS.values(), ({}, {}), ({}, {})], strict=True
    ):
        judged(oracle, prompt, outputs, top_p=0.8, **setting)
    changed = [token_ids(a) != token_ids(b) for a, b in zip(replies, plain, strict=True)]
    assert changed[-2:] == [False, False]
    assert sum(changed[:-2]) >= 4  # penalties of this size do not change every greedy reply
    if config.get("num_pages") == 60:
        assert engine.scheduler.num_preemptions


@pytest.mark.parametrize("ratio", [0, 2.0])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_penalties_count_once_for_all_branches(tiny, ratio, temperature):
    """Checks the log-probabilities of a seeded reply against the edited policy, position by position."""
    loaded, oracle = tiny
    prompt, params = (
        aligned(ratio),
        replace(GREEDY, temperature=temperature, seed=3, presence_penalty=2.0, frequency_penalty=1.5, logprobs=3),
    )
    (outputs,) = run_all(make_engine(loaded, num_pages=200), [(prompt, params)])
    setting = Setting(prompt.ratios, prompt.weights, temperature=temperature, presence=2.0, frequency=1.5)
    ids = token_ids(outputs)
    for position, output in enumerate(outputs):
        z = oracle.next_logits(
            prompt, ids[:position], setting if ratio else replace(setting, presence=0.0, frequency=0.0)
        )
        assert output.logprobs[0].logprob == pytest.approx(float(z.log_softmax(-1)[ids[position]]), abs=1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_log_probabilities_are_those_of_the_aligned_policy(tiny, static):
    loaded, oracle = tiny
    prompt_list = [aligned(0), aligned(2.0, 40, 1), aligned(5.0, 25, 2), aligned(2.0, 22, 5)]
    wanted = [3, 20, 0, None]
    requests = [
        (prompt, replace(GREEDY, temperature=t, seed=1, logprobs=most))
        for prompt, most, t in zip(prompt_list, wanted, [0.0, 0.7, 1.0, 1.0], strict=True)
    ]
    engine = make_engine(loaded, num_pages=400, static=static)
    for (prompt, params), outputs in zip(requests, run_all(engine, requests), strict=True):
        ids, (ratio,) = token_ids(outputs), prompt.ratios
        within = NEAR_TIE * (1 + 2 * ratio)  # float32 logits (also torch's) are off by NEAR_TIE; z sums several
        for position, output in enumerate(outputs):
            if params.logprobs is None:
                assert output.logprobs == ()
                continue
            (report,) = output.logprobs
            setting = Setting(prompt.ratios, prompt.weights, temperature=params.temperature)
            z = oracle.next_logits(prompt, ids[:position], setting).log_softmax(-1)
            assert report.token_id == ids[position]
            assert report.logprob == pytest.approx(float(z[ids[position]]), abs=within)
            num_plausible = int((z > -torch.inf).sum())
            assert len(report.top) == min(params.logprobs, num_plausible)
            values = [value for _, value in report.top]
            assert values == sorted(values, reverse=True)
            assert values == pytest.approx(z.topk(len(values)).values.tolist(), abs=within)
            assert [float(z[id]) for id, _ in report.top] == pytest.approx(values, abs=within)


def test_min_tokens_holds_back_every_way_to_stop(tiny):
    loaded, oracle = tiny
    prompt = aligned(2.0)
    engine = make_engine(loaded, num_pages=400)
    free = token_ids(run_all(engine, [(prompt, GREEDY)])[0])
    stop = free[2]
    params = replace(GREEDY, stop_token_ids=frozenset({stop}))
    assert token_ids(run_all(engine, [(prompt, params)])[0]) == free[:3]
    (outputs,) = run_all(engine, [(prompt, replace(params, min_tokens=6))])
    ids = token_ids(outputs)
    assert len(ids) >= 6
    assert stop not in ids[:6]
    judged(oracle, prompt, outputs, min_tokens=6, stop_ids=(stop,))

    text = "".join(o.text for o in run_all(engine, [(prompt, GREEDY)])[0])
    (late,) = run_all(engine, [(prompt, replace(GREEDY, stop=(text[1:3],), min_tokens=12))])
    assert "".join(o.text for o in late) == text


def test_choices_differ_by_their_number_and_share_the_prompt(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, page_size=4, num_pages=400)
    prompt, params = aligned(2.0, 40), SamplingParams(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True)
    outputs = []
    engine.submit(prompt, params, outputs.append, n=3)
    while engine.step():
        pass
    replies = [[o for o in outputs if o.choice == choice] for choice in range(3)]
    assert len({tuple(token_ids(reply)) for reply in replies}) == 3
    assert [reply[-1].finish_reason for reply in replies] == ["length"] * 3
    shared = sum(4 * ((len(ids) - 1) // 4) for ids in prompt.branches)  # full pages without the newest token
    assert [reply[-1].usage.prefix_cached_tokens for reply in replies[1:]] == [shared] * 2
    alone = run_all(make_engine(loaded, num_pages=100), [(prompt, params)])[0]
    assert token_ids(alone) == token_ids(replies[0])
    assert engine.pool.num_free == engine.pool.num_pages


def test_an_abort_ends_all_choices(tiny):
    engine = make_engine(tiny[0], num_pages=400)
    outputs = []
    request_id = engine.submit(aligned(2.0), replace(GREEDY, max_tokens=100), outputs.append, n=4)
    for _ in range(5):
        engine.step()
    engine.abort(request_id)
    while engine.step():
        pass
    assert [o.choice for o in outputs if o.finish_reason == "abort"] == [0, 1, 2, 3]
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize(
    ("params", "n", "field"),
    [
        ({"logit_bias": {300: 1.0}}, 1, "logit_bias"),
        ({"stop_token_ids": frozenset({-1})}, 1, "stop_token_ids"),
        ({}, 40, "n"),
        ({}, 0, "n"),
    ],
)
def test_invalid_ids_and_choices_are_refused(tiny, params, n, field):
    engine = make_engine(tiny[0], num_pages=400, max_num_seqs=8)
    with pytest.raises(InvalidRequest) as error:
        engine.submit(aligned(2.0), replace(GREEDY, **params), print, n=n)
    assert error.value.field == field


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"logit_bias": {1: 101.0}},
        {"logprobs": 21},
        {"min_tokens": 9, "max_tokens": 8},
        {"logit_bias": dict.fromkeys(range(2000), 1.0)},
    ],
)
def test_values_out_of_range_are_refused(params):
    with pytest.raises(InvalidRequest):
        SamplingParams(**params)


def test_a_message_names_the_field_and_keeps_the_text_of_the_request():
    with pytest.raises(InvalidRequest, match=r"^stop must be .*'\{field\}'") as error:
        SamplingParams(stop=("", "{field}"))
    assert error.value.message_for("stops").startswith("stops must be ")
    assert "'{field}'" in error.value.message_for("stops")


@pytest.mark.parametrize(
    "config", [{}, {"static": True}, {"page_size": 3, "num_pages": 70}, {"num_speculative_tokens": 4}], ids=str
)
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_a_given_text_is_scored_and_goes_on(tiny, config, max_tokens):
    """Log-probabilities of given text, aligned and plain, beside replies that are generated."""
    loaded, oracle = tiny
    engine = make_engine(loaded, **{"num_pages": 400} | config)
    given = tuple((11 * i) % 280 + 7 for i in range(70))
    prompts_given = [replace(aligned(ratio, 12, shift), given=given) for shift, ratio in enumerate([0, 2.0, 0.5])]
    params = replace(GREEDY, max_tokens=max_tokens, logprobs=2)
    requests = [(prompt, params) for prompt in prompts_given] + [(aligned(2.0, 30, 9), GREEDY)]
    *replies, other = run_all(engine, requests)
    judged(oracle, requests[-1][0], other)
    for prompt, outputs in zip(prompts_given, replies, strict=True):
        ids = token_ids(outputs)
        assert tuple(ids[:70]) == given
        assert outputs[-1].usage.completion_tokens == max_tokens == len(ids) - 70
        assert outputs[-1].usage.prompt_tokens == len(prompt.principled[0]) + 70
        assert outputs[-1].finish_reason == "length"
        setting = Setting(prompt.ratios, prompt.weights)
        reports = [report for output in outputs for report in output.logprobs]
        rows = [oracle.logits([*branch, *ids])[len(branch) - 1 :] for branch in prompt.branches]
        for position, report in enumerate(reports):
            principled, base = [rows[0][position]], rows[1][position] if prompt.base else None
            z = oracle.aligned((principled, base), prompt, ids[:position], setting).log_softmax(-1)
            assert report.logprob == pytest.approx(float(z[ids[position]]), abs=2e-4)
            if position >= 70:
                assert z[ids[position]] >= z.max() - 1e-4
    if prompts_given[1].base:
        outside = [report.logprob == -float("inf") for output in replies[1] for report in output.logprobs]
        assert any(outside)
    if config.get("num_pages") == 70:
        assert engine.scheduler.num_preemptions
    steps = engine.runner.num_forwards
    assert steps < 70  # many positions per step
    assert engine.pool.num_free == engine.pool.num_pages


def test_given_tokens_do_not_change_the_random_numbers(tiny):
    loaded, _ = tiny
    prompt = aligned(2.0, 20)
    engine = make_engine(loaded, num_pages=400)
    params = SamplingParams(seed=5, max_tokens=8, ignore_eos=True, presence_penalty=1.0)
    (free,) = run_all(engine, [(prompt, params)])
    shorter = replace(prompt, principled=(prompt.principled[0][:-4],), base=prompt.base[:-4], given=prompt.base[-4:])
    (scored,) = run_all(engine, [(shorter, params)])
    assert token_ids(scored)[4:] == token_ids(free)
    assert "".join(o.text for o in scored) == "".join(o.text for o in free)


def test_edits_are_copied_to_the_device_once(tiny, monkeypatch):
    """Copying a thousand biases or stop tokens per choice in each step took longer than the model."""
    loaded, oracle = tiny
    moved, move = [], edits.to_device
    monkeypatch.setattr(edits, "to_device", lambda x, device: moved.append(x.numel()) or move(x, device))
    stops, biases = frozenset(range(100, 299)), {id: (id % 7) / 3 for id in range(299)}
    setting = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2}
    params = replace(GREEDY, logit_bias=biases, stop_token_ids=stops, min_tokens=12, **setting)
    prompt = aligned(2.0, 200)
    engine, outputs = make_engine(loaded, num_pages=400), []
    engine.submit(prompt, params, outputs.append)
    while len(outputs) < 2:
        engine.step()
    del moved[:]
    engine.step()
    assert len(outputs) == 3
    assert [size for size in moved if size > 1] == [300]  # the mask of tokens that min_tokens forbids
    while engine.step():
        pass
    names = {"presence": 0.7, "frequency": 0.4, "repetition": 1.2, "bias": tuple(biases.items())}
    judged(oracle, prompt, outputs, **names, min_tokens=12, stop_ids=tuple(stops))


def test_the_number_of_stop_tokens_is_bounded():
    with pytest.raises(InvalidRequest, match="at most 1024 tokens"):
        SamplingParams(stop_token_ids=frozenset(range(1025)))

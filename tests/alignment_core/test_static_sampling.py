"""The draw in fixed shapes against the dynamic draw."""

from dataclasses import replace

import pytest
import torch

from linalign import Prompt, SamplingParams
from linalign.alignment_core.decoding import policy, static_sampler
from linalign.alignment_core.decoding.alignment import Mixing, principled_logits
from linalign.alignment_core.decoding.static_draw import PREPARED, Filters, draw_from_logits, leading, weights_above
from linalign.alignment_core.decoding.static_sampler import StaticSampler, compiled_draw
from linalign.alignment_core.execution import model_runner
from linalign.alignment_core.execution.cuda_graphs import Graphs
from linalign.alignment_core.execution.model_runner import ModelRunner
from tests.alignment_core.test_alignment import choose, settings
from tests.engines import GREEDY, aligned, judge, make_engine, run_all

pytestmark = pytest.mark.slow

CASES = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"aligned": True, "nucleus_top_p": 0.8, "nucleus_temperature": 0.5, "temperature": 0.0},
    {"aligned": True, "nucleus_top_p": 0.8},
    {"aligned": True, "nucleus_top_p": 0.95, "top_k": 3, "top_p": 0.9},
    {"aligned": True, "nucleus_top_p": 0.99, "min_p": 0.1, "temperature": 2.0},
    {"aligned": True, "nucleus_top_p": 1e-45},
    {"nucleus_top_p": 0.8, "nucleus_temperature": 3.0, "temperature": 3.0},
    {"top_k": 5, "top_p": 0.7, "min_p": 0.05},
    {"top_k": 1},
    {"top_k": 1 << 62},
    {"top_p": 1e-45},
    {"temperature": 1e-30},
]


def step(filters, lines, ties):
    """Logits of two rows per sequence, and settings. ties: Round the logits, so that many are equal."""
    logits = torch.randn(2 * lines, 3000) * 4
    if ties:
        logits = (logits * 2).round() / 2
    aligned = filters.get("aligned", False)
    mixing = Mixing.of([((1.0,), (2.0 * aligned,), True)] * lines)
    return logits, settings(lines, mixing=mixing, **filters)


def expected(logits, draw_settings):
    y = principled_logits(logits, draw_settings.mixing)
    decided = ~draw_settings.aligned & (draw_settings.temperature == 0)  # plain greedy sequences have no candidates
    return y.argmax(dim=-1) if decided.all() else choose(logits, y, draw_settings)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("filters", CASES, ids=str)
def test_the_static_draw_gives_the_same_tokens(filters, ties):
    torch.manual_seed(5)
    logits, draw_settings = step(filters, 64, ties)
    drawn = draw_from_logits(logits, draw_settings, Filters.of(draw_settings))
    assert torch.equal(drawn, expected(logits, draw_settings))
    assert len(set(drawn.tolist())) > 1
    assert torch.equal(drawn, draw_from_logits(logits, draw_settings, Filters.of(draw_settings).prepared))


def test_sequences_of_all_kinds_in_one_step():
    torch.manual_seed(6)
    logits = torch.randn(2 * len(CASES), 3000) * 4
    values = {
        "aligned": False,
        "nucleus_top_p": 1.0,
        "nucleus_temperature": 1.0,
        "temperature": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "top_p": 1.0,
    }
    mixing = Mixing.of([((1.0,), (2.0 * c.get("aligned", False),), True) for c in CASES])
    listed = {name: [c.get(name, value) for c in CASES] for name, value in values.items()}
    draw_settings = settings(len(CASES), mixing=mixing, **listed)
    together = draw_from_logits(logits, draw_settings, Filters.of(draw_settings))
    for i, case in enumerate(CASES):
        index = torch.tensor([i])
        alone = draw_from_logits(logits, draw_settings[index], Filters.of(draw_settings[index]))
        assert alone == together[i] == expected(logits, draw_settings[index]), case


def test_unused_filters_are_skipped():
    assert Filters.of(settings(3)) == Filters(nucleus=False, top_k=False, top_p=False, random=True)
    mixed = settings(3, temperature=0.0, top_k=[0, 1, 0], top_p=[1.0, 1.0, 0.5], nucleus_top_p=[0.8, 1.0, 1.0])
    assert Filters.of(mixed) == Filters(nucleus=True, top_k=True, top_p=True, random=False)


def test_ordinary_steps_never_leave_the_device(tiny, monkeypatch):
    """Drawn tokens stay where the graph writes them: no index from the host, no dynamic draw."""
    monkeypatch.setattr(static_sampler, "Policy", None)  # the dynamic draw
    engine = make_engine(tiny[0], num_pages=100, static=True)
    sampler, drawn = engine.loop.sampler, []
    draw = sampler.draw
    monkeypatch.setattr(sampler, "draw", lambda *step: drawn.append(draw(*step)) or drawn[-1])
    methods = [(replace(aligned(2.0), method=method), GREEDY) for method in ("cfg", "context_steering", "amulet")]
    run_all(engine, [(aligned(2.0), GREEDY), (aligned(0), SamplingParams(max_tokens=5, seed=1)), *methods])
    assert len(drawn) > 3
    assert {step.tokens.data_ptr() for step in drawn} == {engine.runner.drawn.data_ptr()}


def test_no_request_waits_for_a_capture(tiny, monkeypatch):
    """Every graph that requests need was captured when the engine was created, under the same name."""
    names, run = [], Graphs.run
    monkeypatch.setattr(Graphs, "run", lambda self, name, function: (names.append(name), run(self, name, function)))
    monkeypatch.setattr(ModelRunner, "captures", True)  # as if on a GPU
    monkeypatch.setattr(model_runner, "compile_layers", lambda _: None)
    monkeypatch.setattr(static_sampler, "compiled_draw", lambda: draw_from_logits)
    engine = make_engine(tiny[0], num_pages=100, static=True, max_num_seqs=5)
    warm = set(names)
    names.clear()
    for params in [SamplingParams(max_tokens=3, temperature=t, top_k=k) for t in (0, 1) for k in (0, 4)]:
        for ratios in ((0,), (2.0, 0), (2.0,) * 5):
            run_all(engine, [(aligned(ratio), params) for ratio in ratios])
    assert {name[0] for name in names} == {"draw", "forward"}
    assert len(set(names)) > 10
    assert set(names) <= warm


def test_the_draw_compiles_once_for_each_set_of_filters(tiny):
    """After a few recompilations torch would give up and only log it."""
    engine = make_engine(tiny[0], num_pages=100, static=True, max_num_seqs=70)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sampler = StaticSampler(engine.runner, compiled_draw("eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        sampler.warm_up()
    assert torch._dynamo.utils.counters["frames"]["ok"] >= len(PREPARED)
    assert not torch._dynamo.utils.counters["recompile_limit"]


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_sequences_without_fixed_shapes_are_drawn_in_the_same_step(tiny, batch_invariant):
    """Edits and several principles, in a batch whose other tokens are drawn in fixed shapes."""
    loaded, oracle = tiny
    one, two = (aligned(2.0, extra=extra).principled[0] for extra in (9, 4))
    several = Prompt((one, two), (0.5, 0.5), (2.0, 1.0), aligned(2.0).base)
    requests = [
        (aligned(2.0, 20), GREEDY),
        (several, GREEDY),
        (aligned(0, 25), replace(GREEDY, presence_penalty=1.0)),
        (aligned(5.0, 31), GREEDY),
        (aligned(2.0, 22, 3), replace(GREEDY, repetition_penalty=1.5)),
    ]
    settings = [{}, {}, {"presence": 1.0}, {}, {"repetition": 1.5}]
    engine = make_engine(loaded, num_pages=300, static=True, batch_invariant=batch_invariant)
    for (prompt, _), outputs, setting in zip(requests, run_all(engine, requests), settings, strict=True):
        assert len(judge(oracle, prompt, outputs, **setting)) == 12
    assert engine.runner.graphs.num_runs > 20


def test_reports_on_plain_tokens_edit_no_logits(tiny, monkeypatch):
    """The graph has drawn them. The policy behind the report is the model's own."""
    loaded, oracle = tiny
    requests = [(aligned(0, 20), replace(GREEDY, max_tokens=5, logprobs=3)), (aligned(2.0, 20), GREEDY)]
    edited, edit = [], policy.edit
    monkeypatch.setattr(policy, "edit", lambda y, next_tokens: edited.append(len(y)) or edit(y, next_tokens))
    outputs, _ = run_all(make_engine(loaded, num_pages=100, static=True), requests)
    assert edited == []
    assert [len(report.top) for output in outputs for report in output.logprobs] == [3] * 5
    judge(oracle, requests[0][0], outputs)
    run_all(make_engine(loaded, num_pages=100, static=True), [(aligned(2.0, 20), replace(GREEDY, logprobs=3))])
    assert edited  # aligned reports need the plausible set


def test_several_principles():
    torch.manual_seed(7)
    logits = torch.randn(5, 500) * 3
    mixing = Mixing.of([((0.25, 0.75), (1.0, 3.0), True), ((1.0,), (2.0,), True)])
    draw_settings = settings(2, mixing=mixing, aligned=True, nucleus_top_p=0.9)
    drawn = draw_from_logits(logits, draw_settings, Filters.of(draw_settings))
    assert torch.equal(drawn, expected(logits, draw_settings))


def test_leading_against_sorting():
    torch.manual_seed(8)
    x = torch.randn(50, 400).mul(3).round()
    x[:, ::7] = -torch.inf
    x[:, 3] = -0.0
    weight = x.exp()
    limit = torch.rand(50) * weight.sum(dim=-1)
    kept = leading(x, weight, limit, weights_above)
    for line in range(50):
        order = torch.sort(x[line], descending=True, stable=True).indices
        before = weight[line][order].double().cumsum(0) - weight[line][order]
        assert set(kept[line].nonzero().flatten().tolist()) == set(order[before < limit[line]].tolist())

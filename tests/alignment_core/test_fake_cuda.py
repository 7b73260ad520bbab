"""The GPU code path of the engine on the fake device: CUDA graphs that replay what they recorded, attention by the
Triton kernels, every copy and wait recorded. The oracle judges the replies.

Layers and draw are not compiled here; test_cuda.py tests that.
"""

from dataclasses import replace

import pytest
import torch

from linalign.alignment_core.attention import sdpa
from linalign.alignment_core.decoding import static_draw
from linalign.alignment_core.execution import model_runner
from linalign.alignment_core.request import Structure
from tests.alignment_core import test_speculation
from tests.alignment_core.test_grammars import allowed_by
from tests.engines import GREEDY, SMALL, aligned, judge, make_engine, run_all, tiny_pair, token_ids
from tests.fake_cuda.engine import SHORT, WHERE_THE_HOST_WAITS, engine_on, several

pytestmark = pytest.mark.slow

pytest_plugins = ["tests.fake_cuda.fixtures"]


def gather(monkeypatch):
    """Choose the attention backend that needs no Triton."""
    monkeypatch.setattr(model_runner, "_choose_backend", lambda _: sdpa.NAME)


def replays(engine):
    return sum(graph.num_replays for graph in engine.runner.graphs._graphs.values())


FEATURES = {
    "plain and aligned": [(aligned(2.0, 20), SHORT, {}), (aligned(0, 35, 3), SHORT, {})],
    "several principles": [(several(), SHORT, {}), (aligned(2.0, 20), SHORT, {})],
    "away from a principle": [(aligned(-3.0, 20), SHORT, {})],
    "penalties": [
        (aligned(2.0, 20), replace(SHORT, presence_penalty=2.0, frequency_penalty=1.0),
         {"presence": 2.0, "frequency": 1.0}),
        (aligned(0, 20), replace(SHORT, repetition_penalty=1.5), {"repetition": 1.5}),
    ],
    "biases": [(aligned(2.0, 20), replace(SHORT, logit_bias={5: 90.0, 76: -90.0}), {"bias": ((5, 90.0), (76, -90.0))})],
    "min_tokens": [
        (aligned(0, 20), replace(SHORT, min_tokens=5, ignore_eos=False, stop_token_ids=frozenset({85})),
         {"min_tokens": 5, "stop_ids": (2, 85)}),
    ],
    "adaptive": [(replace(aligned(2.0, 20), method="adaptive"), SHORT, {})],
    "opad": [(replace(aligned(2.0, 20), method="opad"), SHORT, {"top_p": 1.0})],
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_replies_equal_the_oracle_and_the_host_waits_only_for_tokens(cuda, tokenizer, feature):
    engine, oracle = engine_on(cuda, tokenizer)
    cases = FEATURES[feature]
    replies = run_all(engine, [(prompt, params) for prompt, params, _ in cases])
    assert set(cuda.waits) == WHERE_THE_HOST_WAITS
    assert replays(engine) >= 5
    assert cuda.launches["_attend_kernel"] > 0
    assert (cuda.launches["_combine_kernel"] > 0) == (len(cases) == 1)  # contexts are split when there are few rows
    for (prompt, _, setting), outputs in zip(cases, replies, strict=True):
        assert len(judge(oracle, prompt, outputs, method=prompt.method, **setting)) == 6


def test_all_graphs_are_captured_at_the_start(cuda, tokenizer):
    """Everything is captured at the start, so that no request waits for a capture."""
    engine, oracle = engine_on(cuda, tokenizer, warm_up=True)
    captured = len(engine.runner.graphs)
    assert captured == 4 + 3 * len(static_draw.PREPARED)  # 1, 2, 4 and 8 rows; 2, 4 and 8 sequences
    (outputs,) = run_all(engine, [(aligned(2.0, 20), SHORT)])
    judge(oracle, aligned(2.0, 20), outputs)
    assert len(engine.runner.graphs) == captured


def test_chunks_and_preemption(cuda, tokenizer):
    engine, oracle = engine_on(cuda, tokenizer, page_size=8, num_pages=14, max_num_batched_tokens=40)
    requests = [(prompt, SHORT) for prompt in (aligned(2.0, 20), aligned(0, 35, 3), aligned(2.0, 20, 5))]
    for (prompt, _), outputs in zip(requests, run_all(engine, requests), strict=True):
        assert len(judge(oracle, prompt, outputs)) == 6
    assert engine.scheduler.num_preemptions
    assert set(cuda.waits) == WHERE_THE_HOST_WAITS
    assert engine.pool.num_free == engine.pool.num_pages


def test_a_prefix_is_found(cuda, tokenizer):
    engine, oracle = engine_on(cuda, tokenizer)
    for _ in range(2):
        (outputs,) = run_all(engine, [(aligned(2.0, 40), SHORT)])
        judge(oracle, aligned(2.0, 40), outputs)
    assert outputs[-1].usage.prefix_cached_tokens >= 64
    assert set(cuda.waits) == WHERE_THE_HOST_WAITS


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 5, "min_p": 0.01},
        {"temperature": 1.0, "top_k": 5, "presence_penalty": 1.0},  # not captured
    ],
    ids=str,
)
def test_a_seed_draws_the_tokens_of_a_cpu(cuda, tokenizer, filters):
    prompts = [aligned(2.0, 20), aligned(0, 25), several()]
    requests = [(prompt, replace(SHORT, seed=i, **filters)) for i, prompt in enumerate(prompts)]
    engine, _ = engine_on(cuda, tokenizer)
    drawn = [token_ids(outputs) for outputs in run_all(engine, requests)]
    assert set(cuda.waits) == WHERE_THE_HOST_WAITS
    on_cpu = tiny_pair(tokenizer, kernels=False, **SMALL)[0]
    assert drawn == [token_ids(outputs) for outputs in run_all(make_engine(on_cpu, num_pages=100), requests)]


def test_log_probabilities_and_traces(cuda, tokenizer):
    """The values equal those of a CPU, which test_edits.py and test_methods.py check."""
    params = replace(SHORT, logprobs=3, logit_bias={7: 1.0})
    requests = [
        (aligned(2.0, 20), replace(params, trace=True)),
        (aligned(0, 25), params),
        (several(), replace(params, trace=True, presence_penalty=1.0)),
        (replace(aligned(2.0, 15), given=(7, 8, 9)), replace(params, logit_bias={})),
    ]
    engine, _ = engine_on(cuda, tokenizer)
    reports = [[report for output in outputs for report in output.logprobs] for outputs in run_all(engine, requests)]
    assert set(cuda.waits) == WHERE_THE_HOST_WAITS
    on_cpu = tiny_pair(tokenizer, kernels=False, **SMALL)[0]
    expected = run_all(make_engine(on_cpu, num_pages=100), requests)
    for mine, outputs in zip(reports, expected, strict=True):
        theirs = [report for output in outputs for report in output.logprobs]
        assert len(mine) == len(theirs) >= 6
        for a, b in zip(mine, theirs, strict=True):
            assert flat(a)[0] == flat(b)[0]
            assert flat(a)[1] == pytest.approx(flat(b)[1], abs=1e-4)


def flat(report):
    """The integers and the floats of a report."""
    parts = [report] if report.trace is None else [report, report.trace.principled, report.trace.base]
    ids = [[part.token_id, *(id for id, _ in part.top)] for part in parts]
    values = [value for part in parts for value in (part.logprob, *(value for _, value in part.top))]
    if report.trace is not None:
        ids.append([report.trace.num_plausible])
        values.append(report.trace.kl)
    return ids, values


def test_masks_of_a_structure(cuda, tokenizer):
    engine, oracle = engine_on(cuda, tokenizer, model={"vocab_size": len(tokenizer)}, max_num_seqs=2)
    structure = Structure("regex", "[a-c]{3,6} [0-9]z")
    prompt, params = aligned(2.0, 20), replace(SHORT, structure=structure, ignore_eos=False)
    (outputs,) = run_all(engine, [(prompt, params)])
    judge(oracle, prompt, outputs, allowed=allowed_by(engine, structure))
    assert set(cuda.waits) == WHERE_THE_HOST_WAITS


def test_drafts_are_accepted(cuda, tokenizer):
    engine, oracle = engine_on(
        cuda, tokenizer, model={"vocab_size": 8, "num_hidden_layers": 3}, num_speculative_tokens=4, max_num_seqs=2
    )
    prompt = test_speculation.prompts()[7]
    (outputs,) = run_all(engine, [(prompt, replace(GREEDY, max_tokens=20))])
    judge(oracle, prompt, outputs)
    assert engine.stats().num_tokens_accepted > 0
    assert set(cuda.waits) == WHERE_THE_HOST_WAITS


def test_a_step_can_run_in_halves(cuda, tokenizer):
    """The host waits only where a step is split because memory is short."""
    engine, oracle = engine_on(cuda, tokenizer)
    run, failed = engine.runner.run, []

    def little_memory(plan):
        if len(plan.token_ids) > 16:
            failed.append(len(plan.token_ids))
            raise torch.OutOfMemoryError("injected")
        return run(plan)

    engine.runner.run = little_memory
    (outputs,) = run_all(engine, [(aligned(2.0, 20), SHORT)])
    judge(oracle, aligned(2.0, 20), outputs)
    assert failed
    in_halves = {
        "model_runner.py:<listcomp>: a copy to the host",
        "model_runner.py:_in_place: a copy from pageable memory",
    }
    assert set(cuda.waits) == WHERE_THE_HOST_WAITS | in_halves


@pytest.mark.parametrize("config", [{"enforce_eager": True}, {"batch_invariant": True}], ids=str)
def test_other_configurations_equal_the_oracle(cuda, tokenizer, config):
    engine, oracle = engine_on(cuda, tokenizer, **config)
    assert engine.runner.captures == ("enforce_eager" not in config)
    (outputs,) = run_all(engine, [(aligned(2.0, 20), SHORT)])
    judge(oracle, aligned(2.0, 20), outputs)
    assert set(cuda.waits) == WHERE_THE_HOST_WAITS


def test_attention_by_gathering(cuda, tokenizer, monkeypatch):
    """Without Triton."""
    gather(monkeypatch)
    engine, oracle = engine_on(cuda, tokenizer)
    (outputs,) = run_all(engine, [(aligned(2.0, 20), SHORT)])
    judge(oracle, aligned(2.0, 20), outputs)
    assert engine.runner.backend == sdpa.NAME
    assert set(cuda.waits) == WHERE_THE_HOST_WAITS


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"),
    [
        (torch.float32, "bfloat16"),
        (torch.float32, "float16"),
        (torch.float32, "fp8"),
        (torch.float16, "auto"),
        (torch.float16, "float32"),
        (torch.float16, "fp8"),
        (torch.bfloat16, "auto"),  # bfloat16 gathers, because Triton's interpreter can't multiply it correctly
        (torch.bfloat16, "float32"),
        (torch.bfloat16, "fp8"),
    ],
    ids=str,
)
def test_keys_and_values_of_any_dtype(cuda, tokenizer, dtype, kv_cache_dtype, monkeypatch):
    """Logits of a prompt in two chunks are close to the oracle's, as far as the dtypes allow."""
    if dtype == torch.bfloat16:
        gather(monkeypatch)
    small = {"initializer_range": 0.1}
    prompt = aligned(0, 40)
    engine, oracle = engine_on(
        cuda, tokenizer, dtype, small, kv_cache_dtype=kv_cache_dtype, max_num_batched_tokens=25, enforce_eager=True
    )
    seen = []
    forward = engine.runner.forward
    engine.runner.forward = lambda step: seen.append(forward(step)) or seen[-1]
    run_all(engine, [(prompt, replace(SHORT, max_tokens=1))])
    expected = oracle.logits(list(prompt.principled[0]))[-1].log_softmax(-1)
    got = seen[-1].inner[0].double().log_softmax(-1)
    assert (expected.exp() * (expected - got)).sum() < 0.02
    assert engine.runner._keys[0].dtype == model_runner.KV_DTYPES.get(kv_cache_dtype, dtype)
    assert set(cuda.waits) == WHERE_THE_HOST_WAITS


def test_nan_ends_only_its_own_reply(cuda, tokenizer, caplog):
    """The host does not read logits, and the next step has already begun with the token that could not be drawn."""
    engine, oracle = engine_on(cuda, tokenizer)
    with torch.inference_mode():
        engine.runner.model.get_input_embeddings().weight[299] = torch.nan
    spoilt = aligned(2.0, 20, 5)
    in_base = replace(spoilt, base=(*spoilt.base, 299))
    cases = [(in_base, replace(SHORT, logprobs=2)), (replace(spoilt, principled=((299, 7),)), SHORT)]
    for _ in range(2):
        *failed, company = run_all(engine, [*cases, (aligned(2.0, 20), SHORT)])
        assert ["not finite" in str(outputs[-1].error) for outputs in failed] == [True, True]
        judge(oracle, aligned(2.0, 20), company)
    assert set(cuda.waits) == WHERE_THE_HOST_WAITS
    assert {record.name for record in caplog.records if record.levelname == "ERROR"} == {"linalign.alignment_core.loop"}
    caplog.clear()

"""A bound for reasoning: after so many tokens, the mark that ends the reasoning is forced."""

from dataclasses import replace

import pytest

from linalign import InvalidRequest, SamplingParams
from linalign.alignment_core.decoding.thinking import ThinkingBudget
from linalign.alignment_core.request import Structure, Thinking
from tests.engines import GREEDY, aligned, make_engine, run_all, tiny_pair, token_ids
from tests.oracle import Setting

PIECES = ["<th", "ink>", "\n", "a", "</think>", "</", "think", ">", "<think>a</think>b", "b</thi", "nk>c"]
ENDS = {"whole": (4,), "in pieces": (5, 6, 7)}


def forced_after(pieces, budget, is_begun=True, end_ids=(5, 6, 7), repeats=False):
    """The tokens that are forced in a reply of these pieces, with the number of the piece that each one replaces."""
    thinking = Thinking(budget, "<think>", "</think>", end_ids, is_begun, repeats)
    followed = ThinkingBudget(thinking, lambda token: PIECES[token].encode())
    forced = []
    for number, piece in enumerate(pieces):
        token = PIECES.index(piece)
        if followed.forced is not None:
            forced.append((number, followed.forced))
            token = followed.forced
        followed.take(token)
    return forced, followed.is_over


@pytest.mark.parametrize("name", ENDS)
def test_the_mark_is_forced_when_the_budget_is_used_up(name):
    ends = ENDS[name]
    for budget in (0, 1, 3):
        expected = [(budget + number, token) for number, token in enumerate(ends)]
        assert forced_after(["a"] * 9, budget, end_ids=ends) == (expected, True)


@pytest.mark.parametrize(
    ("pieces", "budget", "is_over"),
    [
        (["a"] * 9, 9, False),
        (["a", "</think>", *["a"] * 9], 3, True),
        (["a", "b</thi", "nk>c", *["a"] * 9], 3, True),
        (["a", "</", "think", ">", *["a"] * 9], 4, True),
    ],
)
def test_nothing_is_forced_if_the_reasoning_ends_by_itself(pieces, budget, is_over):
    assert forced_after(pieces, budget) == ([], is_over)


@pytest.mark.parametrize(
    ("pieces", "forced"),
    [
        (["a"] * 9, []),
        (["\n", "<th", *["a"] * 9], []),
        (["<think>a</think>b", *["a"] * 9], []),
        (["\n", "<th", "ink>", *["a"] * 9], [(5, 5), (6, 6), (7, 7)]),
    ],
)
def test_the_model_may_begin_the_reasoning_itself(pieces, forced):
    assert forced_after(pieces, 2, is_begun=False) == (forced, True)


def test_a_budget_is_for_all_reasoning_of_a_reply():
    pieces = ["a", "</think>", "<th", "ink>", *["a"] * 9]
    assert forced_after(pieces, 3, end_ids=(4,), repeats=True) == ([(5, 4)], False)
    again = ["a", "a", "a", "a", "<th", "ink>", "a"]  # in place of "a", the mark is forced
    assert forced_after(again, 2, end_ids=(4,), repeats=True) == ([(2, 4)], False)


def test_the_rest_of_a_mark_is_forced_that_the_model_has_begun():
    assert forced_after(["a", "</", *["a"] * 5], 2) == ([(2, 6), (3, 7)], True)
    assert forced_after(["a", "</", "think", "a"], 3) == ([(3, 7)], True)
    assert forced_after(["b</thi", "nk>c", "a"], 1) == ([], True)  # the budget ends within a token of the mark
    assert forced_after(["b</thi", "a", *["a"] * 5], 1) == ([(2, 5), (3, 6), (4, 7)], True)


def test_all_tokens_are_forced_also_those_behind_the_mark():
    assert forced_after(["a"] * 9, 1, end_ids=(4, 3, 2)) == ([(1, 4), (2, 3), (3, 2)], True)


SCHEMA = Structure("json_schema", '{"enum": [1, 2]}', after='"</think>"', json_after="</think>")


@pytest.mark.slow
@pytest.mark.parametrize("structure", [None, SCHEMA], ids=["free", "structured"])
@pytest.mark.parametrize("static", [False, True])
def test_replies_with_a_budget_are_those_of_the_oracle(tokenizer, structure, static):
    """In one crowd with a plain request. At the places of forced tokens, the oracle may draw only these."""
    loaded, oracle = tiny_pair(tokenizer)
    engine = make_engine(loaded, num_pages=300, static=static)
    ends = tuple(tokenizer.encode("</think>", add_special_tokens=False))
    thinking = Thinking(5, "<think>", "</think>", ends, is_begun=True)
    params = replace(GREEDY, thinking=thinking, structure=structure, ignore_eos=structure is None, max_tokens=30)
    requests = [(aligned(ratio, 20, number), params) for number, ratio in enumerate((0, 2.0))]
    *replies, plain = run_all(engine, [*requests, (aligned(2.0), GREEDY)])
    for (prompt, _), outputs in zip(requests, replies, strict=True):
        ids = token_ids(outputs)
        assert tuple(ids[5 : 5 + len(ends)]) == ends
        text = "".join(output.text for output in outputs)
        assert text.count("</think>") == 1
        assert structure is None or text.partition("</think>")[2].strip() in ("1", "2")

        def allowed(output):
            if 5 <= len(output) < 5 + len(ends):
                return [ends[len(output) - 5]]
            if structure is None:
                return range(engine.vocab_size)
            matcher = engine.grammars.matcher(structure)
            assert all(matcher.consume_token(token) for token in output)
            return matcher.allowed(engine.vocab_size).nonzero()[0].tolist()

        oracle.check_greedy(prompt, Setting(prompt.ratios, prompt.weights, allowed=allowed), ids)
    oracle.check_greedy(aligned(2.0), Setting((2.0,), (1.0,)), token_ids(plain))


def test_budgets_that_cannot_work_are_refused():
    for budget, ends in ((-1, (1,)), (3, ())):
        with pytest.raises(InvalidRequest, match="thinking"):
            SamplingParams(thinking=Thinking(budget, "<think>", "</think>", ends))

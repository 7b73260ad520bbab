"""The engine on the real embedded model, float32, against the float64 oracle."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from scipy import stats

from linalign import Principle, SamplingParams
from linalign.alignment_core.decoding import policy
from linalign.alignment_core.decoding.alignment import principled_logits
from linalign.alignment_core.loading.checkpoint import embedded_file
from linalign.alignment_core.text.prompts import PromptBuilder
from tests import oracle as oracle_module
from tests.counts import LONG_RUN, counted
from tests.engines import aligned, make_engine, run_all, token_ids
from tests.oracle import Setting

pytestmark = pytest.mark.slow

KEPT = Path(__file__).with_name("embedded_replies.json")  # written with KEEP_REPLIES=1 LONG_RUN=1
RATIOS = (0.0, 0.5, 2.0, 5.0)
KEPT_TOKENS = 64  # of each reply
NUM_TOKENS = counted(32, KEPT_TOKENS)
MOST_TIES = counted(1, 3)
NUM_DRAWS = counted(400, 1000)
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
CASES = [
    ("Where should our town get its power from?", "Answer in favour of solar power."),
    ("What is rain?", "Explain as a patient primary-school teacher."),
    ("How do I boil an egg?", "Be very brief."),
    ("Write a greeting for a colleague.", "Be formal."),
    ("Tell me about Paris.", "Praise the food."),
    ("Is coffee healthy?", "Be cautious and mention risks."),
    ("Why is the sky blue?", "Use a metaphor."),
    ("Name three fruits.", "Prefer tropical fruits."),
    ("How can I sleep better?", "Recommend exercise."),
    ("What should I read next?", "Favour science fiction."),
    ("Describe a cat.", "Write like a poet."),
    ("How do computers work?", "Speak to an engineer."),
    ("Give me a name for my dog.", "Prefer old-fashioned names."),
    ("What is democracy?", "Mention ancient Greece."),
    ("Plan a weekend trip.", "Prefer trains to planes."),
    ("What is 12 times 12?", "Show every step."),
    ("Should I learn to play the piano?", "Encourage the user."),
    ("Explain photosynthesis.", "Answer in short sentences."),
    ("What makes a good friend?", "Speak from experience."),
    ("How is bread made?", "Be enthusiastic!"),
    ("Who was Isaac Newton?", "Focus on his mistakes."),
    ("Recommend a dinner.", "Only vegetarian food."),
    ("What is a black hole?", "Write for a five-year-old."),
    ("How do I save money?", "Be strict."),
]


@pytest.fixture(scope="module")
def prompts(tokenizer):
    builder = PromptBuilder(tokenizer)
    cases = CASES[: counted(8, len(CASES))]
    chats = [([{"role": "user", "content": question}], principle) for question, principle in cases]
    return [builder.build(messages, [Principle(text, ratio=ratio)]) for messages, text in chats for ratio in RATIOS]


@pytest.fixture(scope="module")
def crowd(embedded, prompts):
    """Replies to all requests in one batch (32 requests; 96 in the long run)."""
    engine = make_engine(embedded, num_pages=2000, max_num_seqs=96)
    outputs = run_all(engine, [(prompt, GREEDY) for prompt in prompts])
    assert sum(output[-1].usage.prefix_cached_tokens for output in outputs) > counted(300, 1000)
    assert engine.scheduler.num_preemptions == 0
    return [token_ids(output) for output in outputs]


def near_ties(request, prompts, replies, judged):
    """Number of near ties in each of `replies` that differs from the oracle's stored reply in `judged`."""
    new = [(p, ids) for p, ids, stored in zip(prompts, replies, judged, strict=True) if ids != stored]
    return [request.getfixturevalue("embedded_oracle").check_greedy(p, Setting(p.ratios), ids) for p, ids in new]


def cache_key(prompt):
    """Hash of everything that the oracle's reply to this prompt depends on."""
    parts = (prompt, KEPT_TOKENS, transformers.__version__, Path(oracle_module.__file__).read_text())
    weights = hashlib.sha256(embedded_file().read_bytes())
    return hashlib.sha256(repr(parts).encode() + weights.digest()).hexdigest()


@pytest.fixture(scope="module")
def kept(prompts):
    """The oracle's stored replies; None for prompts without one."""
    stored = json.loads(KEPT.read_text())
    replies = [stored.get(cache_key(prompt)) for prompt in prompts]
    return [reply and reply[:NUM_TOKENS] for reply in replies]


def test_all_at_once_equal_the_oracle(request, prompts, crowd, kept):
    assert all(len(tokens) == NUM_TOKENS for tokens in crowd)
    asks_again = LONG_RUN or "KEEP_REPLIES" in os.environ
    ties = near_ties(request, prompts, crowd, [None] * len(prompts) if asks_again else kept)
    print(f"{len(prompts) * NUM_TOKENS} tokens, {sum(ties)} near ties taken the other way; {len(ties)} replies judged")
    assert sum(ties) <= MOST_TIES
    if "KEEP_REPLIES" in os.environ:
        assert LONG_RUN, "the replies that are kept are those of the long run"
        judged = zip(prompts, crowd, ties, strict=True)
        KEPT.write_text(json.dumps({cache_key(prompt): tokens for prompt, tokens, tie in judged if not tie}) + "\n")


def test_the_stored_replies_are_the_oracles(request, prompts, kept):
    """The oracle confirms one stored reply, and rejects a changed one."""
    index = next((i for i, tokens in enumerate(kept) if tokens), None)
    assert index is not None, "KEEP_REPLIES=1 LONG_RUN=1 .venv/bin/pytest tests/alignment_core/test_embedded.py"
    prompt, tokens = prompts[index], kept[index][:8]
    assert near_ties(request, [prompt], [tokens], [None]) == [0]
    with pytest.raises(AssertionError, match="position 7"):
        near_ties(request, [prompt], [[*tokens[:-1], tokens[-1] + 1]], [tokens])


def test_preempted_and_chunked_equals_the_oracle(request, embedded, prompts, crowd):
    """Half of the questions, with every ratio."""
    half = [i for i in range(len(prompts)) if i // len(RATIOS) % 2 == 0]
    num_pages = 250 * len(half) // 48
    engine = make_engine(embedded, page_size=8, num_pages=num_pages, max_num_seqs=96, max_num_batched_tokens=128)
    replies = [token_ids(outputs) for outputs in run_all(engine, [(prompts[i], GREEDY) for i in half])]
    assert engine.scheduler.num_preemptions > 0
    assert engine.pool.num_free == engine.pool.num_pages
    assert sum(near_ties(request, [prompts[i] for i in half], replies, [crowd[i] for i in half])) <= MOST_TIES


def test_alone_equals_the_oracle(request, embedded, prompts, crowd):
    """Every question at one of the ratios, alone, so that there is no prefix to reuse."""
    chosen = [i * len(RATIOS) + i % len(RATIOS) for i in range(len(prompts) // len(RATIOS))]
    replies = [token_ids(run_all(make_engine(embedded, num_pages=64), [(prompts[i], GREEDY)])[0]) for i in chosen]
    assert sum(near_ties(request, [prompts[i] for i in chosen], replies, [crowd[i] for i in chosen])) <= MOST_TIES


def test_the_naive_oracle_itself_token_by_token(embedded_oracle, prompts, crowd):
    num_tokens = counted(3, 12)
    for index in (2, 7):
        prompt = prompts[index]
        assert embedded_oracle.greedy(prompt, Setting(prompt.ratios), num_tokens) == crowd[index][:num_tokens]


@pytest.fixture
def from_tiny(tiny):
    return *tiny, aligned, 5000


@pytest.fixture
def from_embedded(embedded, embedded_oracle):
    chat, builder = [{"role": "user", "content": CASES[0][0]}], PromptBuilder(embedded.tokenizer)

    def prompt_of(ratio):
        return builder.build(chat, [Principle(CASES[0][1], ratio=ratio)])

    return embedded, embedded_oracle, prompt_of, NUM_DRAWS


@pytest.mark.parametrize("source", ["from_tiny", "from_embedded"])
@pytest.mark.parametrize(
    ("params", "ratio"),
    [({"temperature": 1.0}, 2.0), ({"temperature": 0.7, "alignment_top_p": 0.95}, 1.0)],
)
def test_first_tokens_follow_the_oracles_distribution(request, source, params, ratio):
    """Chi-square test of seeded draws, each from its own request."""
    loaded, oracle, prompt_of, num_draws = request.getfixturevalue(source)
    prompt = prompt_of(ratio)
    temperature, top_p = params["temperature"], params.get("alignment_top_p", 0.99)
    z = oracle.next_logits(prompt, [], Setting((ratio,), temperature=temperature, top_p=top_p))
    probabilities = torch.softmax(z / temperature, dim=-1)
    engine = make_engine(loaded, page_size=1, num_pages=2000, max_num_seqs=128)
    requests = [(prompt, SamplingParams(seed=seed, max_tokens=1, **params)) for seed in range(num_draws)]
    drawn = torch.tensor([token_ids(outputs)[0] for outputs in run_all(engine, requests)])
    counts = torch.bincount(drawn, minlength=len(z)).double()
    expected = probabilities * len(drawn)
    assert counts[probabilities == 0].sum() == 0
    common = expected >= 5
    observed = [*counts[common].tolist(), counts[~common].sum().item()]
    wanted = [*expected[common].tolist(), expected[~common].sum().item()]
    if wanted[-1] < 1e-9:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) > 1
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


def test_ratio_zero_is_bit_equal_to_the_plain_path(embedded, tokenizer, monkeypatch):
    """The principled prompt at ratio 0 gives the same logits as the same text in a plain prompt."""
    builder = PromptBuilder(tokenizer)
    question, principle = CASES[1]
    chat = [{"role": "system", "content": "You help."}, {"role": "user", "content": question}]
    plain_chat = [{"role": "system", "content": "You help.\n" + principle}, chat[1]]
    seen = []

    def spy(logits, mixing):
        z = principled_logits(logits, mixing)
        seen[-1].append(z.clone())
        return z

    monkeypatch.setattr(policy, "principled_logits", spy)
    monkeypatch.setattr(policy, "candidates", None)  # greedy at ratio 0 takes the argmax of these logits
    params = SamplingParams(temperature=0, max_tokens=8)
    for prompt in (builder.build(chat, [Principle(principle, ratio=0.0)]), builder.build(plain_chat)):
        seen.append([])
        (outputs,) = run_all(make_engine(embedded, num_pages=64), [(prompt, params)])
        assert outputs[-1].usage.branches == 1
    assert len(seen[0]) == len(seen[1]) > 1
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))

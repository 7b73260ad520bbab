"""/v1/completions, /tokenize, /detokenize and presets, through real clients."""

import itertools
from dataclasses import replace

import httpx
import openai
import pytest
from tokenizers import pre_tokenizers, processors

from linalign import Principle, SamplingParams
from linalign.server.protocol.completions import CompletionRequest
from linalign.server.routes.completions import TextCompletion
from tests.alignment_core.test_detokenizer import stripping
from tests.engines import make_engine, run_all, tiny_pair
from tests.server.test_chat import CHAT, PRINCIPLE, create

TEXT = "The capital of France is"
ALIGNED = {"principle": "This text is about towns.", "alignment_ratio": 1}


def complete(client, extra=None, **fields):
    fields_with_defaults = {"model": "smollm2", "prompt": TEXT, "temperature": 0, "max_tokens": 6, **fields}
    return client.completions.create(**fields_with_defaults, extra_body=extra or {})


@pytest.mark.parametrize("extra", [{}, ALIGNED], ids=["plain", "aligned"])
def test_completions_equal_the_engines(client, embedded, extra):
    engine = make_engine(embedded, num_pages=200)
    principles = [Principle(extra["principle"], ratio=1.0)] if extra else []
    prompt = engine.prompts.build_text(TEXT, principles)
    (outputs,) = run_all(engine, [(prompt, SamplingParams(temperature=0, max_tokens=6))])
    reply = complete(client, extra)
    assert reply.choices[0].text == "".join(output.text for output in outputs)
    assert reply.usage.prompt_tokens == len(prompt.principled[0])
    assert reply.usage.alignment_details["branches"] == 1 + bool(extra)
    chunks = list(complete(client, extra, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == reply.choices[0].text
    assert chunks[-1].choices[0].finish_reason == reply.choices[0].finish_reason
    with_ids = complete(client, extra, prompt=embedded.tokenizer.encode(TEXT))
    assert with_ids.choices[0].text == reply.choices[0].text
    assert len(complete(client, max_tokens=None, seed=1).choices[0].text) > 0


def test_several_prompts_and_choices(client):
    prompts = [TEXT, "Once upon a time", "The opposite of hot is"]
    reply = complete(client, ALIGNED, prompt=prompts, n=2, temperature=1, seed=3, echo=True)
    assert [choice.index for choice in reply.choices] == list(range(6))
    for choice in reply.choices:
        assert choice.text.startswith(prompts[choice.index // 2])
    texts = {}
    for chunk in complete(client, ALIGNED, prompt=prompts, n=2, temperature=1, seed=3, echo=True, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {choice.index: choice.text for choice in reply.choices}
    alone = [complete(client, ALIGNED, prompt=prompt).usage for prompt in prompts]
    assert reply.usage.prompt_tokens == sum(usage.prompt_tokens for usage in alone)


@pytest.mark.parametrize("extra", [{}, ALIGNED], ids=["plain", "aligned"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_with_log_probabilities(client, extra, stream):
    """The request that lm-eval's loglikelihood sends."""
    drawn = complete(client, extra, logprobs=3).choices[0]
    fields = {"prompt": TEXT + drawn.text, "echo": True, "logprobs": 3, "max_tokens": 0}
    if stream:
        logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for chunk in complete(client, extra, **fields, stream=True):
            if chunk.choices[0].logprobs:
                for name, values in logprobs.items():
                    values.extend(getattr(chunk.choices[0].logprobs, name))
    else:
        choice = complete(client, extra, **fields).choices[0]
        assert choice.text == TEXT + drawn.text
        assert choice.finish_reason == "length"
        logprobs = choice.logprobs.model_dump()
    assert "".join(logprobs["tokens"]) == TEXT + drawn.text
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][-6:] == pytest.approx(drawn.logprobs.token_logprobs, abs=1e-3)
    assert logprobs["text_offset"] == [len("".join(logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))]
    outside = [value for value in logprobs["token_logprobs"][1:] if value == -9999.0]
    assert bool(outside) == bool(extra)
    assert all(value > -9999.0 for top in logprobs["top_logprobs"][1:] for value in top.values())


def test_a_scored_text_is_seen_by_every_policy(url):
    """Rerankers get the aligned, the principled and the base log-probability of each token in one request."""
    text = TEXT + " Paris, which is old."
    fields = {"model": "smollm2", "prompt": text, "echo": True, "logprobs": 0, "max_tokens": 0, **ALIGNED}

    def ask(**change):
        return httpx.post(url + "/v1/completions", json={**fields, **change}, timeout=60).json()["choices"][0]

    choice = ask()
    first, *steps = choice["alignment"]
    assert first is None
    assert len(steps) + 1 == len(choice["logprobs"]["tokens"])
    base, principled = ask(principle=None), ask(alignment_ratio=0)
    of_base = base["logprobs"]["token_logprobs"][1:]
    assert [step["base_logprob"] for step in steps] == pytest.approx(of_base, abs=1e-3)
    principled = httpx.post(url + "/v1/completions", json={**fields, "alignment_ratio": 0}, timeout=60).json()[
        "choices"
    ][0]
    of_principled = principled["logprobs"]["token_logprobs"][1:]
    assert [step["principled_logprob"] for step in steps] == pytest.approx(of_principled, abs=1e-3)
    assert [step["logprob"] for step in steps] == choice["logprobs"]["token_logprobs"][1:]
    assert "alignment" not in ask(alignment_trace=False)


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", ""),
        ({"prompt": [10**9]}, "prompt", "no token"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"messages": [1]}, "messages", "this endpoint has no such field"),
        ({"propmt": "x"}, "propmt", "did you mean prompt?"),
        ({"prompt": ["a"] * 300}, "prompt", "256"),
        ({"prompt": [[1], []]}, "prompt.1", "at least 1"),
        ({"prompt": ["a", 1]}, "prompt.1", "string"),
        pytest.param({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "pattern", id="a bias of many digits"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"prompt": "word " * 9000}, "prompt", "context"),
    ],
    ids=str,
)
def test_invalid_requests_are_refused(url, change, param, message):
    body = {"model": "smollm2", "prompt": TEXT, "max_tokens": 1} | change
    response = httpx.post(url + "/v1/completions", json=body, timeout=60)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert message in error["message"]


def test_tokens_of_every_branch(client, url, embedded):
    body = {"model": "smollm2", "messages": CHAT, "principle": PRINCIPLE}
    response = httpx.post(url + "/tokenize", json=body).json()
    principled, base = response["branches"]
    assert (principled["branch"], principled["ratio"], base["branch"]) == ("principled", 2.0, "base")
    assert response["count"] == create(client, {"principle": PRINCIPLE}, max_tokens=1).usage.prompt_tokens
    texts = [embedded.tokenizer.decode(branch["tokens"]) for branch in (principled, base)]
    assert texts[0].replace("\n" + PRINCIPLE, "") == texts[1]
    back = httpx.post(url + "/detokenize", json={"model": "smollm2", "tokens": base["tokens"]}).json()
    assert back == {"prompt": texts[1]}
    plain = httpx.post(url + "/tokenize", json={"model": "smollm2", "prompt": TEXT, "principle": "Towns."}).json()
    assert embedded.tokenizer.decode(plain["tokens"]) == "Towns.\n" + TEXT
    assert embedded.tokenizer.decode(plain["branches"][1]["tokens"]) == TEXT
    bad = httpx.post(url + "/detokenize", json={"model": "smollm2", "tokens": [10**9]})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "tokens")


def test_presets(client):
    names = [model.id for model in client.models.list()]
    assert names[0] == "smollm2"
    assert len(names) >= 7
    teacher = client.models.retrieve("smollm2:teacher")
    preset = teacher.preset
    by_name = create(client, model="smollm2:teacher")
    by_hand = create(client, {"principle": preset["principle"], "alignment_ratio": preset["alignment_ratio"]})
    assert by_name.model == "smollm2:teacher"
    assert by_name.choices[0].message.content == by_hand.choices[0].message.content
    assert by_name.usage.alignment_details["branches"] == 2
    overridden = create(client, {"alignment_ratio": 0}, model="smollm2:teacher")
    assert overridden.usage.alignment_details["branches"] == 1
    assert overridden.usage.prompt_tokens == by_name.usage.prompt_tokens
    text = complete(client, model="smollm2:teacher").usage.alignment_details["branches"]
    assert text == 2
    with pytest.raises(openai.NotFoundError):
        create(client, model="smollm2:nobody")


@pytest.mark.parametrize("stream", [False, True])
def test_parts_of_characters_have_names_and_places(client, stream):
    text = "The 🦄🎉漢 café 🦄🎉漢 café"
    fields = {"prompt": text, "echo": True, "logprobs": 5, "max_tokens": 0}
    chunks = complete(client, **fields, stream=True) if stream else [complete(client, **fields)]
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    tokens, offsets, values, tops = (
        [value for part in parts for value in getattr(part, name)]
        for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs")
    )
    named = [token for token in tokens if token.startswith("bytes:")]
    assert named, "no token was part of a character"
    content = b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) if token in named else token.encode()
        for token in tokens
    )
    assert content.decode() == text
    for token, offset in zip(tokens, offsets, strict=True):
        assert token in named or text[offset:].startswith(token)
    for token, value, top in zip(tokens[1:], values[1:], tops[1:], strict=True):
        assert top[token] == value
        assert len(top) in (5, 6)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_that_need_no_new_tokens(client, stream):
    """A prompt of a single token beside one that is scored, and an echo without log-probabilities."""
    for fields in ({"prompt": ["The sky is", "ab"], "logprobs": 1}, {"prompt": ["The sky is", "ab"]}):
        texts, logprobs, reasons = {0: "", 1: ""}, {}, {}
        fields = {**fields, "echo": True, "max_tokens": 0}
        for chunk in complete(client, **fields, stream=True) if stream else [complete(client, **fields)]:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                logprobs[choice.index] = choice.logprobs or logprobs.get(choice.index)
                reasons[choice.index] = choice.finish_reason
        assert texts == {0: "The sky is", 1: "ab"}
        assert reasons == {0: "length", 1: "length"}
        if "logprobs" in fields:
            assert (logprobs[1].tokens, logprobs[1].token_logprobs) == (["ab"], [None])
            assert logprobs[0].token_logprobs[-1] < 0
        else:
            assert logprobs == {0: None, 1: None}


@pytest.fixture(scope="module")
def small_words():
    """An engine whose tokenizer adds a BOS and strips a leading space when it decodes, as Llama 2's does."""
    tokenizer = stripping()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    loaded, _ = tiny_pair(tokenizer)
    return make_engine(loaded, num_pages=100)


@pytest.mark.parametrize("principle", [None, "hi i"])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("given", ["hi hi", [262, 261, 261], "hi <s> hi"], ids=str)
def test_a_reply_continues_the_text_of_its_prompt(small_words, given, echo, principle):
    """The reply keeps its leading space, and text_offset is each token's position in the choice's text."""
    engine, tokenizer = small_words, small_words.tokenizer
    spaced = tokenizer.convert_tokens_to_ids("▁hi")
    body = CompletionRequest(model="m", prompt=given, echo=echo, logprobs=0, logit_bias={str(spaced): 100})
    ids = engine.prompts.text_ids(given)
    assert ids[0] == tokenizer.bos_token_id
    prompt = engine.prompts.build_text(ids, [Principle(principle)] if principle else [], body.scores)
    params = replace(body.sampling_params(), max_tokens=3)
    (choice,) = TextCompletion(engine, "", body, [ids], [prompt], None).whole(run_all(engine, [(prompt, params)]))[
        "choices"
    ]
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    shown_prompt = (given if isinstance(given, str) else tokenizer.decode(given)) if echo else ""
    assert text == shown_prompt + " hi hi hi"
    tokens = [*ids, *[spaced] * 3] if echo else [spaced] * 3
    assert len(offsets) == len(tokens)
    shown = [text[begin:end] for begin, end in itertools.pairwise([*offsets, len(text)])]
    assert "".join(shown) == text
    assert shown[-3:] == [" hi"] * 3
    assert (
        shown[: len(tokens) - 3]
        == {
            "hi hi": ["", "hi", " hi"],
            "hi <s> hi": ["", "hi", " ", "<s>", " hi"],
            "[262, 261, 261]": ["<s>", " hi", " hi"],
        }[str(given)][: len(tokens) - 3]
    )

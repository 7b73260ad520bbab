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
    given = {"model": "smollm2", "prompt": TEXT, "temperature": 0, "max_tokens": 6, **fields}
    return client.completions.create(**given, extra_body=extra or {})


@pytest.mark.parametrize("extra", [{}, ALIGNED], ids=["plain", "aligned"])
def test_text_goes_on_as_the_engine_does(client, embedded, extra):
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
    """What lm-eval's loglikelihood asks for."""
    drawn = complete(client, extra, logprobs=3).choices[0]
    asked = {"prompt": TEXT + drawn.text, "echo": True, "logprobs": 3, "max_tokens": 0}
    if stream:
        found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for chunk in complete(client, extra, **asked, stream=True):
            if chunk.choices[0].logprobs:
                for name, values in found.items():
                    values.extend(getattr(chunk.choices[0].logprobs, name))
    else:
        choice = complete(client, extra, **asked).choices[0]
        assert choice.text == TEXT + drawn.text
        assert choice.finish_reason == "length"
        found = choice.logprobs.model_dump()
    assert "".join(found["tokens"]) == TEXT + drawn.text
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][-6:] == pytest.approx(drawn.logprobs.token_logprobs, abs=1e-3)
    assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(len(found["tokens"]))]
    outside = [value for value in found["token_logprobs"][1:] if value == -9999.0]
    assert bool(outside) == bool(extra)
    assert all(value > -9999.0 for top in found["top_logprobs"][1:] for value in top.values())


def test_a_scored_text_is_seen_by_every_policy(url):
    """What rerankers need: the aligned, the principled and the base log-probability of each token, in one request."""
    text = TEXT + " Paris, which is old."
    asked = {"model": "smollm2", "prompt": text, "echo": True, "logprobs": 0, "max_tokens": 0, **ALIGNED}

    def ask(**change):
        return httpx.post(url + "/v1/completions", json={**asked, **change}, timeout=60).json()["choices"][0]

    choice = ask()
    first, *steps = choice["alignment"]
    assert first is None
    assert len(steps) + 1 == len(choice["logprobs"]["tokens"])
    base, principled = ask(principle=None), ask(alignment_ratio=0)
    of_base = base["logprobs"]["token_logprobs"][1:]
    assert [step["base_logprob"] for step in steps] == pytest.approx(of_base, abs=1e-3)
    principled = httpx.post(url + "/v1/completions", json={**asked, "alignment_ratio": 0}, timeout=60).json()[
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
        ({"messages": []}, "messages", "/v1/completions has no such field"),
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
def test_what_can_not_be(url, change, param, message):
    body = {"model": "smollm2", "prompt": TEXT, "max_tokens": 1} | change
    response = httpx.post(url + "/v1/completions", json=body, timeout=60)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert message in error["message"]


def test_tokens_of_every_branch(client, url, embedded):
    body = {"model": "smollm2", "messages": CHAT, "principle": PRINCIPLE}
    found = httpx.post(url + "/tokenize", json=body).json()
    principled, base = found["branches"]
    assert (principled["branch"], principled["ratio"], base["branch"]) == ("principled", 2.0, "base")
    assert found["count"] == create(client, {"principle": PRINCIPLE}, max_tokens=1).usage.prompt_tokens
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
    asked = {"prompt": text, "echo": True, "logprobs": 5, "max_tokens": 0}
    chunks = complete(client, **asked, stream=True) if stream else [complete(client, **asked)]
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
def test_prompts_that_leave_nothing_to_do(client, stream):
    """Beside one that is scored, a prompt of a single token; and an echo without any log-probability."""
    for asked in ({"prompt": ["The sky is", "ab"], "logprobs": 1}, {"prompt": ["The sky is", "ab"]}):
        texts, logprobs, reasons = {0: "", 1: ""}, {}, {}
        asked = {**asked, "echo": True, "max_tokens": 0}
        for chunk in complete(client, **asked, stream=True) if stream else [complete(client, **asked)]:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                logprobs[choice.index] = choice.logprobs or logprobs.get(choice.index)
                reasons[choice.index] = choice.finish_reason
        assert texts == {0: "The sky is", 1: "ab"}
        assert reasons == {0: "length", 1: "length"}
        if "logprobs" in asked:
            assert (logprobs[1].tokens, logprobs[1].token_logprobs) == (["ab"], [None])
            assert logprobs[0].token_logprobs[-1] < 0
        else:
            assert logprobs == {0: None, 1: None}


@pytest.fixture(scope="module")
def small_words():
    """An engine whose tokenizer begins texts with a control token and whose decoder takes a space off, as Llama 2's."""
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
@pytest.mark.parametrize("asked", ["hi hi", [262, 261, 261], "hi <s> hi"], ids=str)
def test_a_reply_goes_on_with_its_prompt(small_words, asked, echo, principle):
    """Its first space is there, and text_offset is where in the choice's text each token begins."""
    engine, tokenizer = small_words, small_words.tokenizer
    spaced = tokenizer.convert_tokens_to_ids("▁hi")
    body = CompletionRequest(model="m", prompt=asked, echo=echo, logprobs=0, logit_bias={str(spaced): 100})
    ids = engine.prompts.text_ids(asked)
    assert ids[0] == tokenizer.bos_token_id
    prompt = engine.prompts.build_text(ids, [Principle(principle)] if principle else [], body.scores)
    params = replace(body.sampling_params(), max_tokens=3)
    (choice,) = TextCompletion(engine, "", body, [ids], [prompt]).whole(run_all(engine, [(prompt, params)]))["choices"]
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    told = (asked if isinstance(asked, str) else tokenizer.decode(asked)) if echo else ""
    assert text == told + " hi hi hi"
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
        }[str(asked)][: len(tokens) - 3]
    )

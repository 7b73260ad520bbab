"""/v1/responses with --responses-store: a request continues an earlier response as if it had sent the whole input."""

import openai
import pytest

from linalign.server.protocol.chat_messages import AssistantMessage, UserMessage
from linalign.server.protocol.responses import items_of
from linalign.server.response_store import LIFETIME, ResponseStore
from tests.server.test_chat import CHAT
from tests.server.test_fields import ALIGNED, WEATHER
from tests.serving import KEY, serving

pytestmark = pytest.mark.slow

FIELDS = {"model": "smollm2", "max_output_tokens": 24, "temperature": 0}
TOOL = {"type": "function", **WEATHER["function"]}


@pytest.fixture(scope="module")
def keeping(embedded):  # noqa: ARG001 - loads the model first, so that the server finds the converted copy
    with serving("--responses-store", "3", "--api-keys", f"{KEY},other-key") as (url, _):
        yield url


@pytest.fixture
def sdk(keeping):
    return openai.OpenAI(base_url=keeping + "/v1", api_key=KEY, max_retries=0)


def respond(sdk, **fields):
    return sdk.responses.create(extra_body=ALIGNED, **{**FIELDS, **fields})


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_continues_another(sdk, stream):
    first = respond(sdk, input=CHAT, instructions="You are a mayor.", stream=stream)
    first = list(first)[-1].response if stream else first
    assert first.store is True
    second = respond(sdk, input="And in winter?", instructions="Be brief.", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    whole = [*CHAT, *first.output, {"role": "user", "content": "And in winter?"}]
    expected = respond(sdk, input=whole, instructions="Be brief.", store=False)
    assert (second.output_text, expected.store) == (expected.output_text, False)
    assert second.usage.input_tokens == expected.usage.input_tokens
    third = respond(sdk, input="Why?", previous_response_id=second.id)
    whole += [*second.output, {"role": "user", "content": "Why?"}]
    assert third.output_text == respond(sdk, input=whole, store=False).output_text


def test_a_tool_loop_sends_only_the_result(sdk):
    fields = {"tools": [TOOL], "parallel_tool_calls": False, "max_output_tokens": 100}
    first = respond(sdk, input=CHAT, tool_choice="required", **fields)
    (call,) = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "2473 hours"}
    second = respond(sdk, input=[result], previous_response_id=first.id, **fields)
    whole = [*CHAT, call, result]
    assert second.output_text == respond(sdk, input=whole, store=False, **fields).output_text


def test_a_reference_is_the_item_itself(sdk):
    """Vercel's AI SDK sends references in place of earlier replies, unless its option store is false."""
    first = respond(sdk, input=CHAT)
    (item,) = first.output
    why = {"role": "user", "content": "Why?"}
    found = respond(sdk, input=[*CHAT, {"type": "item_reference", "id": item.id}, why])
    expected = respond(sdk, input=[*CHAT, item, why], store=False)
    assert (found.output_text, found.usage.input_tokens) == (expected.output_text, expected.usage.input_tokens)
    (second,) = found.output
    assert respond(sdk, input=[{"type": "item_reference", "id": second.id}, why]).output_text
    assert respond(sdk, input=[{"id": second.id}, why]).output_text  # the type may be left out
    with pytest.raises(openai.BadRequestError, match="not kept") as error:
        respond(sdk, input=[{"type": "item_reference", "id": "msg_unknown"}, why])
    assert (error.value.param, error.value.code) == ("input", "item_not_found")


def test_responses_are_kept_for_their_key_alone_and_within_the_bound(sdk, keeping):
    first = respond(sdk, input="Hi.", max_output_tokens=2)
    other = openai.OpenAI(base_url=keeping + "/v1", api_key="other-key", max_retries=0)
    declined = respond(sdk, input="Hi.", max_output_tokens=2, store=False)
    for client, id in ((other, first.id), (sdk, declined.id), (sdk, "resp_unknown")):
        with pytest.raises(openai.BadRequestError, match="not kept") as error:
            respond(client, input="Go on.", previous_response_id=id)
        assert (error.value.param, error.value.code) == ("previous_response_id", "previous_response_not_found")
    for _ in range(3):
        respond(sdk, input="Hi.", max_output_tokens=2)
    with pytest.raises(openai.BadRequestError, match="not kept"):
        respond(sdk, input="Go on.", previous_response_id=first.id)


def test_without_the_setting_the_answer_says_what_to_do(client):
    response = client.responses.with_raw_response.create(**FIELDS, input="Hi.", store=True)
    assert response.headers["X-Linalign-Ignored"] == "store"
    first = response.parse()
    assert first.store is False
    with pytest.raises(openai.BadRequestError, match="start the server with --responses-store"):
        client.responses.create(**FIELDS, input="Go on.", previous_response_id=first.id)
    with pytest.raises(openai.BadRequestError, match="store: false"):
        client.responses.create(**FIELDS, input=[{"type": "item_reference", "id": first.output[0].id}, *CHAT])


def test_conversations_expire_after_their_last_use():
    now = 0.0
    first, second, third = (UserMessage(role="user", content=text) for text in ("first", "second", "third"))
    store = ResponseStore(2, 100, lambda: now)
    store.put(None, "a", [first])
    store.put(b"key", "a", [second])
    store.put(None, "b", [first, second])
    assert store.get(None, "a") == (first,)
    store.put(None, "c", [third])
    assert store.get(None, "b") is None  # used least recently
    assert store.get(b"key", "a") == (second,)
    now = LIFETIME - 1
    assert store.get(None, "c") == (third,)
    now = LIFETIME + 1
    assert store.get(None, "c") == (third,)
    for key, id in ((None, "a"), (b"key", "a"), (b"other", "a")):
        assert store.get(key, id) is None
    now = 3 * LIFETIME
    assert store.get(None, "c") is None
    assert not any(store._of_key.values())


def test_references_keep_responses_alive():
    now = 0.0
    store = ResponseStore(2, 100, lambda: now)
    items = items_of(
        [{"type": "reasoning", "id": "rs_a", "summary": []}, {"role": "assistant", "id": "b", "content": "B"}]
    )
    store.put(None, "first", [], items)
    store.put(None, "second", [])
    assert store.items(None, ["rs_a", "c"]) == {"rs_a": items[0]}
    store.put(None, "third", [])  # in place of the second one
    assert store.items(None, ["b"]) == {"b": items[1]}
    assert store.items(b"other", ["b"]) == {}
    now = LIFETIME - 1
    assert store.items(None, ["b"])
    now = 2 * LIFETIME - 2
    assert store.items(None, ["b"])
    now = 3 * LIFETIME
    assert store.items(None, ["b"]) == {}


def test_long_conversations_are_not_kept():
    store = ResponseStore(9, 100)
    short, long = (AssistantMessage(role="assistant", reasoning_content="x" * num) for num in (60, 120))
    store.put(None, "a", [short])
    store.put(None, "b", [short, short])
    store.put(None, "c", [long])
    assert [store.get(None, name) for name in "abc"] == [(short,), None, None]

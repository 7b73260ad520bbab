"""Chat: conversations, which the browser stores."""

import json

import pytest
from playwright.sync_api import expect

from tests.server.playground.browsing import (
    answered,
    bodies,
    column,
    fact,
    limit,
    opened,
    send_message,
    serious_findings,
    slide,
)

pytestmark = pytest.mark.slow


def turns(page):
    return [item.locator(".reply").inner_text().strip() for item in page.locator(".messages > li").all()]


def test_a_chat_of_many_turns(browser, url):
    with opened(browser, url, "chat") as page:
        limit(page, 16)
        sent = bodies(page)
        page.get_by_label("Principle").fill("Speak of the sea.")
        slide(page, 3)
        send_message(page, "Hello, <b>who</b> are you?")
        first = turns(page)
        assert first[0] == "Hello, <b>who</b> are you?"
        with answered(page):
            page.get_by_label("Message", exact=True).fill("And you?")
            page.get_by_role("button", name="Send").click()
        assert len(turns(page)) == 4
        assert [message["role"] for message in sent[1]["messages"]] == ["user", "assistant", "user"]
        assert sent[1]["messages"][1]["content"].split() == first[1].split()
        assert (sent[1]["principle"], sent[1]["alignment_ratio"]) == ("Speak of the sea.", 3)

        with answered(page):
            page.get_by_role("button", name="Regenerate").click()
        assert sent[2]["messages"] == sent[1]["messages"]
        assert len(turns(page)) == 4

        page.get_by_role("button", name="Edit").first.click()
        with answered(page):
            page.get_by_label("Edited message").fill("What is a whale?")
            page.get_by_role("button", name="Send again").click()
        assert sent[3]["messages"] == [{"role": "user", "content": "What is a whale?"}]
        assert len(turns(page)) == 2
        stored = turns(page)

        messages = page.locator(".messages > li")
        page.get_by_role("button", name="New").click()
        expect(messages).to_have_count(0)
        expect(page.get_by_label("Principle")).to_have_value("")
        send_message(page, "Another one")
        page.reload()
        expect(messages).to_have_count(2)
        page.locator("select").first.select_option("1")
        expect(messages.first).to_contain_text("What is a whale?")
        assert turns(page) == stored
        expect(page.get_by_label("Principle")).to_have_value("Speak of the sea.")
        expect(page.locator(".ratio span")).to_have_text("3")
        page.get_by_role("button", name="Delete").click()
        expect(messages.first).to_contain_text("Another one")
        page.get_by_role("button", name="Delete").click()
        page.reload()
        expect(page.locator("select").first.locator("option")).to_have_text(["New conversation"])
        expect(messages).to_have_count(0)


def test_a_stopped_reply_keeps_its_text(browser, url):
    with opened(browser, url, "chat") as page:
        limit(page, 2000, ignore_eos=True)
        page.get_by_label("Message", exact=True).fill("Tell me a long story.")
        page.get_by_label("Message", exact=True).press("Enter")
        expect(page.locator(".messages .speed")).to_contain_text("tokens/s")
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
        text = turns(page)[1]
        assert 0 < len(text.split()) < 1500
        page.reload()
        expect(page.locator(".messages > li")).to_have_count(2)
        assert turns(page)[1] == text


COLLAPSED = ["> " * 5000, "- " * 2460, "1. " * 1500, "_a*" * 4000, "**" * 3000, "[" * 4000]


def stub(page, text, end="data: [DONE]\n\n", status=200, **delta):
    """Replace the server's reply by one chunk with this text, for replies that a model can't be made to give."""
    chunk = {"choices": [{"index": 0, "delta": {"content": text, **delta}, "finish_reason": None}]}
    chunk["usage"] = {"completion_tokens": 3}
    body = f"data: {json.dumps(chunk)}\n\n{end}"
    if status != 200:
        body = json.dumps({"error": {"message": text}})
    answer = {"status": status, "content_type": "text/event-stream", "body": body}
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))


@pytest.mark.parametrize("text", COLLAPSED, ids=[text[:3] for text in COLLAPSED])
def test_degenerate_text_does_not_break_the_page(browser, url, text):
    """Text that is nested deeper than the markdown parser's stack allows, or slow to parse."""
    with opened(browser, url, "chat") as page:
        stub(page, text)
        send_message(page, "Collapse")
        page.reload()
        expect(page.locator(".messages > li")).to_have_count(2)
        page.get_by_role("link", name="Serving").click()
        expect(fact(page, "Sequences running")).to_be_visible()
        code = "async (text) => (await import('/playground/markdown.js')).markdown(text).nodeName"
        assert page.evaluate(code, text) in ("#text", "#document-fragment")


def test_a_chat_survives_failures(browser, url):
    with opened(browser, url, "chat") as page:
        stub(page, "An old reply.")
        send_message(page, "Hello")
        stub(page, "There is no room.", status=429)
        page.get_by_role("button", name="Regenerate").click()
        expect(page.get_by_role("alert")).to_have_text("There is no room.")
        expect(page.locator(".status")).to_have_text("A reply failed.")
        page.reload()
        expect(page.locator(".messages > li")).to_have_count(2)
        assert turns(page) == ["Hello", "An old reply."]  # the failed request changed nothing
        stub(page, "Half a rep", end="")
        page.get_by_role("button", name="Regenerate").click()
        expect(page.get_by_role("alert")).to_have_text("The connection was cut off.")
        expect(page.locator(".messages > li").nth(1)).to_contain_text("Half a rep")
        stub(page, "A whole reply.")
        with answered(page):
            page.get_by_role("button", name="Try again").click()
        assert turns(page) == ["Hello", "A whole reply."]
        stub(page, "No.", status=500)
        page.get_by_label("Message", exact=True).fill("And now?")
        page.get_by_role("button", name="Send", exact=True).click()
        expect(page.get_by_role("alert")).to_be_visible()
        page.reload()
        stub(page, "Now it does.")
        with answered(page):
            page.get_by_role("button", name="Try again").click()
        assert turns(page)[2:] == ["And now?", "Now it does."]


def test_editing_waits_for_the_running_reply(browser, url):
    with opened(browser, url, "chat") as page:
        limit(page, 2000, ignore_eos=True)
        page.get_by_label("Message", exact=True).fill("Hello")
        page.get_by_role("button", name="Send", exact=True).click()
        expect(page.locator(".messages .speed")).to_contain_text("tokens/s")
        expect(page.get_by_role("button", name="Edit")).to_be_disabled()
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Edit").click()
        expect(page.get_by_label("Edited message")).to_be_focused()
        assert serious_findings(page) == []
        page.get_by_role("button", name="Regenerate").click()
        expect(page.get_by_label("Edited message")).to_have_count(0)
        expect(page.locator(".messages .speed")).to_contain_text("tokens/s")
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
        expect(page.locator(".messages > li")).to_have_count(2)


def test_two_tabs_keep_each_others_conversations(browser, url):
    with opened(browser, url, "chat") as one:
        other = one.context.new_page()
        other.goto(f"{url}/#chat")
        expect(other.locator(".model")).to_be_visible()
        for page, text in ((one, "Tab one"), (other, "Tab two")):
            stub(page, "A reply.")
            send_message(page, text)
        for page in (one, other):
            options = page.locator("select").first.locator("option")
            expect(options.filter(has_text="Tab one")).to_have_count(1)
            expect(options.filter(has_text="Tab two")).to_have_count(1)
        other.reload()
        expect(other.locator("select").first.locator("option")).to_have_text(["Tab two", "Tab one"])


@pytest.mark.parametrize(
    "value", ['"x"', "[]", "{}", '{"id": "1", "ratio": 2, "principles": [{}], "messages": [{}]}', "{", "null"]
)
def test_invalid_values_in_storage_are_ignored(browser, url, value):
    with opened(browser, url, "chat") as page:
        page.evaluate("(kept) => localStorage.setItem('linalign.conversation.1', kept)", value)
        page.reload()
        expect(page.get_by_label("Message", exact=True)).to_be_visible()
        expect(page.locator(".messages > li")).to_have_count(0)


def test_without_storage_a_chat_works(browser, url):
    with opened(browser, url, "chat") as page:
        page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
        stub(page, "A reply.")
        page.get_by_label("Message", exact=True).fill("Hello")
        page.get_by_role("button", name="Send", exact=True).click()
        expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
        expect(page.locator(".status")).to_contain_text("does not keep the conversation")
        assert turns(page) == ["Hello", "A reply."]


def test_reasoning_is_shown(page):
    stub(page, "Four.", reasoning_content="Two and two, so")
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("All replies are complete.")
    column(page, "Aligned").get_by_text("Reasoning").click()
    expect(column(page, "Aligned")).to_contain_text("Two and two, so")
    expect(column(page, "Aligned").locator(".speed")).not_to_contain_text("tokens/s")  # everything came at once

"""Compare: three replies side by side, and a slider with immediate effect."""

import json
import re
import subprocess
import sys

import httpx
import pytest
from playwright.sync_api import expect

from tests.server.playground.browsing import (
    COLUMNS,
    PRINCIPLE,
    PROMPT,
    bodies,
    column,
    fact,
    limit,
    opened,
    plain,
    set_tokens,
    shown,
    slide,
    text_of,
)

pytestmark = pytest.mark.slow


def test_compare_shows_three_replies_of_the_public_api(page, url):
    set_tokens(page, 12)
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("All replies are complete.")
    ratios = dict(zip(COLUMNS, (None, 0, 2), strict=True))
    texts = {title: text_of(url, ratio) for title, ratio in ratios.items()}
    assert {title: shown(page, title) for title in COLUMNS} == texts
    assert len(set(map(tuple, texts.values()))) == 3
    for title in COLUMNS:
        expect(column(page, title).locator(".speed")).to_have_text(
            re.compile(r"^first token \d+ ms · [\d.]+ tokens/s · 12 tokens · cut off at the limit$")
        )


def test_replies_stream(page):
    """Each column shows parts of its reply before the reply is complete."""
    page.evaluate(
        """() => {
          window.seen = new Set();
          const lengths = () => [...document.querySelectorAll(".reply")].map((element) => element.innerText.length);
          const look = () => window.seen.add(lengths().join());
          new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
        }"""
    )
    set_tokens(page, 40)
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("All replies are complete.")
    lengths = [tuple(map(int, text.split(","))) for text in page.evaluate("[...window.seen]")]
    assert all(len({each[i] for each in lengths}) > 5 for i in range(3))


def test_the_slider_requests_a_new_reply(page, url):
    set_tokens(page, 12)
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("All replies are complete.")
    before = shown(page, "Aligned")
    slide(page, 5)
    expect(column(page, "Aligned").get_by_role("heading").first).to_have_text("Aligned, ratio 5")
    expect(column(page, "Aligned").locator(".speed")).to_contain_text("12 tokens")
    assert shown(page, "Aligned") == text_of(url, 5) != before
    assert shown(page, COLUMNS[0]) == text_of(url, None)


def test_the_slider_works_during_streams_and_stop_ends_them(page):
    sent = bodies(page)
    limit(page, 3000, ignore_eos=True)
    page.get_by_role("button", name="Run").click()
    expect(column(page, "Aligned").locator(".speed")).to_contain_text("tokens/s")
    page.get_by_label("Prompt", exact=True).fill("Another prompt")  # applies to the next run
    slide(page, 7)
    expect(column(page, "Aligned").get_by_role("heading").first).to_have_text("Aligned, ratio 7")
    expect(column(page, "Aligned").locator(".speed")).to_contain_text("tokens/s")
    assert [body.get("alignment_ratio") for body in sent] == [None, 0, 2, 7]
    assert {body["messages"][0]["content"] for body in sent} == {PROMPT}
    slide(page, 9)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".status")).to_have_text("Stopped.")
    page.wait_for_timeout(600)  # longer than the slider's debounce time
    assert len(sent) == 4


def test_weights_stay_with_their_principles(page):
    page.get_by_role("button", name="Add a principle").click()
    page.get_by_label("Principle 2", exact=True).fill("Second.")
    page.get_by_label("Weight of principle 1").fill("5")
    page.get_by_role("button", name="Add a principle").click()
    page.get_by_role("button", name="Remove principle 1").click()
    expect(page.get_by_label("Principle 1", exact=True)).to_have_value("Second.")
    expect(page.get_by_label("Weight of principle 1")).to_have_value("1")


def test_invalid_form_input_is_not_sent(page):
    sent = bodies(page)
    page.get_by_label("Prompt", exact=True).fill("")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    page.get_by_label("Prompt", exact=True).fill("Hello")
    set_tokens(page, 4, Temperature=77)
    page.get_by_text("Sampling", exact=True).click()
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_label("Temperature")).to_be_focused()  # in the section that was reopened to show the error
    assert sent == []


@pytest.mark.parametrize("view", ["toString", "constructor", "nowhere", ""])
def test_unknown_views_lead_to_compare(browser, url, view):
    with opened(browser, url, view) as page:
        expect(page.get_by_role("link", name="Compare")).to_have_attribute("aria-current", "page")


def test_stop_ends_the_replies_on_the_server_too(page, url):
    limit(page, 5000, ignore_eos=True)
    page.get_by_role("button", name="Run").click()
    expect(column(page, "Aligned").locator(".speed")).to_contain_text("tokens/s")
    page.get_by_role("button", name="Stop").click()
    for title in COLUMNS:
        expect(column(page, title).locator(".speed")).to_contain_text("stopped")
    page.goto(f"{url}/#serving")
    expect(fact(page, "Sequences running")).to_have_text("0")


def test_several_principles_with_weights(page):
    sent = bodies(page)
    set_tokens(page, 2)
    page.get_by_role("button", name="Add a principle").click()
    page.get_by_label("Principle 2", exact=True).fill("Mention the weather.")
    page.get_by_label("Weight of principle 2").fill("3")
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("All replies are complete.")
    principles = [{"text": PRINCIPLE, "weight": 1}, {"text": "Mention the weather.", "weight": 3}]
    assert [body.get("principle") for body in sent] == [None, principles, principles]
    page.get_by_role("button", name="Remove principle 1").click()
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("All replies are complete.")
    assert sent[-1]["principle"] == "Mention the weather."


def test_presets_and_sampling(page, url):
    sent = bodies(page)
    models = httpx.get(f"{url}/v1/models").json()["data"]
    preset = next(model["preset"] for model in models if model["id"] == "smollm2:kind")
    page.get_by_label("Preset").select_option("kind")
    expect(page.get_by_label("Principle 1", exact=True)).to_have_value(preset["principle"])
    set_tokens(page, 2, Temperature=0.5, Seed="", **{"Plausible set": 0.95, "Top p": 0.9})
    page.get_by_label("Method").select_option("cfg")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.locator(".status")).to_have_text("All replies are complete.")
    sampling = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 2, "model": "smollm2"}
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    common = {**sampling, **options, "messages": [{"role": "user", "content": PROMPT}]}
    prompted = {"principle": preset["principle"], "alignment_ratio": 0}
    assert sent == [
        common,
        common | prompted,
        common | prompted | {"alignment_ratio": 1.5, "alignment_method": "cfg", "alignment_top_p": 0.95},
    ]


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_copied_code_runs(browser, url, language):
    with opened(browser, url, permissions=["clipboard-read", "clipboard-write"]) as page:
        set_tokens(page, 12)
        page.get_by_label("Prompt", exact=True).fill('What\'s "new" in\n$HOME, `pwd` or \\n?')
        command = ["bash", "-c"] if language == "curl" else [sys.executable, "-c"]
        texts = []
        for title in COLUMNS:
            column(page, title).get_by_role("button", name=f"Copy as {language}").click()
            expect(page.locator(".status")).to_have_text(f"Copied as {language}.")
            code = page.evaluate("navigator.clipboard.readText()")
            page.evaluate("navigator.clipboard.writeText('')")
            done = subprocess.run([*command, code], capture_output=True, text=True, timeout=120, check=True).stdout
            texts.append(plain(json.loads(done)["choices"][0]["message"]["content"] if language == "curl" else done))
        page.get_by_role("button", name="Run").click()
        expect(page.locator(".status")).to_have_text("All replies are complete.")
        assert [shown(page, title) for title in COLUMNS] == texts


def test_without_a_clipboard_the_code_is_shown(page):
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    column(page, "Aligned").get_by_role("button", name="Copy as curl").click()
    code = page.get_by_label("Code", exact=True).get_by_role("textbox")
    expect(code).to_have_value(re.compile('"alignment_ratio": 2'))
    page.get_by_role("button", name="Close").click()
    expect(code).to_have_count(0)


def test_errors_of_the_server_are_shown(page):
    page.get_by_label("Prompt", exact=True).fill("word " * 9000)
    page.get_by_role("button", name="Run").click()
    for title in COLUMNS:
        expect(column(page, title).get_by_role("alert")).to_contain_text("the context holds")

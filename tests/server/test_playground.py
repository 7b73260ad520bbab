"""The playground in a real Chromium, against a real server with the embedded model, used as a person would."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from evaluation import statistics
from server.routes.playground import FOLDER, POLICY
from tests.serving import serving

ROOT = Path(__file__).parent.parent.parent
AXE = (ROOT / ".venv/clients/node_modules/axe-core/axe.min.js").read_text
CHROMIUM = shutil.which("chromium")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
VIEWS = ("compare", "why", "sweep", "chat", "serving")
COLUMNS = ("Without the principle", "Principle prompted, ratio 0", "Aligned")
PROMPT, PRINCIPLE = "How do I get to work?", "Encourage cycling."
MINUTE = 60_000
expect.set_options(timeout=MINUTE)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        assert "CI" not in os.environ, "CI has to have Chromium"
        pytest.skip("the playground was not tested: there is no chromium (Debian's package of that name)")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)


@contextmanager
def opened(browser, url, view="compare", has_key=False, **options):
    """A page in a browser profile of its own; nothing may go wrong on its console, or leave for another host."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(MINUTE)
    trouble, asked = [], []
    page.on("console", lambda message: message.type in ("error", "warning") and trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(f"{url}/#{view}")
        if not has_key:
            expect(page.locator(".model")).to_have_text("smollm2")
        yield page
    finally:
        context.close()
    assert [text for text in trouble if not re.search("responded with a status of [45]", text)] == []
    assert all(address.startswith((url, "blob:")) for address in asked), asked


@pytest.fixture
def page(browser, url):
    with opened(browser, url) as page:
        yield page


def set_tokens(page, number, **others):
    page.get_by_text("Sampling", exact=True).click()
    for label, value in {"Tokens at most": number, **others}.items():
        page.get_by_label(label).fill(str(value))
        page.get_by_label(label).blur()


def ask(url, ratio, **fields):
    body = {"model": "smollm2", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 12}
    if ratio is not None:
        body |= {"principle": PRINCIPLE, "alignment_ratio": ratio}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body | fields, timeout=120)
    return reply.raise_for_status().json()["choices"][0]


def text_of(url, ratio, **fields):
    return plain(ask(url, ratio, **fields)["message"]["content"])


def plain(markdown):
    """Its words alone, as rendering takes marks away."""
    return re.findall(r"\w+", markdown)


def column(page, title):
    return page.get_by_role("region", name=title, exact=True)


def shown(page, title):
    return plain(re.sub(r"^\d+\.", "", column(page, title).locator(".reply").inner_text()))


def slide(page, ratio):
    page.get_by_label("Alignment ratio").fill(str(ratio))


# Compare


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
    """Each column is there in parts before it is whole."""
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


def test_the_slider_is_live(page, url):
    set_tokens(page, 12)
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("All replies are complete.")
    before = shown(page, "Aligned")
    slide(page, 5)
    expect(column(page, "Aligned").get_by_role("heading").first).to_have_text("Aligned, ratio 5")
    expect(column(page, "Aligned").locator(".speed")).to_contain_text("12 tokens")
    assert shown(page, "Aligned") == text_of(url, 5) != before
    assert shown(page, COLUMNS[0]) == text_of(url, None)


def test_the_slider_is_live_while_replies_stream_and_stop_stops_it(page):
    sent = bodies(page)
    limit(page, 3000, ignore_eos=True)
    page.get_by_role("button", name="Run").click()
    expect(column(page, "Aligned").locator(".speed")).to_contain_text("tokens/s")
    page.get_by_label("Prompt", exact=True).fill("Another prompt")  # is for the next run
    slide(page, 7)
    expect(column(page, "Aligned").get_by_role("heading").first).to_have_text("Aligned, ratio 7")
    expect(column(page, "Aligned").locator(".speed")).to_contain_text("tokens/s")
    assert [body.get("alignment_ratio") for body in sent] == [None, 0, 2, 7]
    assert {body["messages"][0]["content"] for body in sent} == {PROMPT}
    slide(page, 9)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".status")).to_have_text("Stopped.")
    page.wait_for_timeout(600)  # longer than a slider is waited for
    assert len(sent) == 4


def test_weights_stay_with_their_principles(page):
    page.get_by_role("button", name="Add a principle").click()
    page.get_by_label("Principle 2", exact=True).fill("Second.")
    page.get_by_label("Weight of principle 1").fill("5")
    page.get_by_role("button", name="Add a principle").click()
    page.get_by_role("button", name="Remove principle 1").click()
    expect(page.get_by_label("Principle 1", exact=True)).to_have_value("Second.")
    expect(page.get_by_label("Weight of principle 1")).to_have_value("1")


def test_what_can_not_be_is_not_sent(page):
    sent = bodies(page)
    page.get_by_label("Prompt", exact=True).fill("")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    page.get_by_label("Prompt", exact=True).fill("Hello")
    set_tokens(page, 4, Temperature=77)
    page.get_by_text("Sampling", exact=True).click()
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_label("Temperature")).to_be_focused()  # opened again, to show what is wrong
    assert sent == []


@pytest.mark.parametrize("view", ["toString", "constructor", "nowhere", ""])
def test_links_to_nowhere_lead_to_compare(browser, url, view):
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


def bodies(page):
    """What the page sends from now on."""
    sent = []
    page.on("request", lambda request: request.method == "POST" and sent.append(request.post_data_json))
    return sent


def test_several_principles_with_weights(page):
    sent = bodies(page)
    set_tokens(page, 2)
    page.get_by_role("button", name="Add a principle").click()
    page.get_by_label("Principle 2", exact=True).fill("Mention the weather.")
    page.get_by_label("Weight of principle 2").fill("3")
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("All replies are complete.")
    told = [{"text": PRINCIPLE, "weight": 1}, {"text": "Mention the weather.", "weight": 3}]
    assert [body.get("principle") for body in sent] == [None, told, told]
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
    asked = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 2, "model": "smollm2"}
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    common = {**asked, **options, "messages": [{"role": "user", "content": PROMPT}]}
    told = {"principle": preset["principle"], "alignment_ratio": 0}
    assert sent == [
        common,
        common | told,
        common | told | {"alignment_ratio": 1.5, "alignment_method": "cfg", "alignment_top_p": 0.95},
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


def test_errors_of_the_server_are_told(page):
    set_tokens(page, 99_999)
    page.get_by_role("button", name="Run").click()
    for title in COLUMNS:
        expect(column(page, title).get_by_role("alert")).to_contain_text("the context holds")


# Why this word


def test_every_token_is_tinted_by_its_kl(page, url):
    page.get_by_role("link", name="Why this word").click()
    set_tokens(page, 12)
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("The reply is complete.")
    trace = ask(url, 2, alignment_trace=True, logprobs=True, top_logprobs=5)["alignment"]
    tokens = page.locator(".token")
    assert [tokens.nth(i).get_attribute("aria-label").split(", ")[-1] for i in range(12)] == [
        f"{token['kl']:.2f} nats" for token in trace
    ]
    assert "".join(tokens.all_text_contents()).replace("↵", "") == "".join(token["token"] for token in trace)
    steps = [0.02, 0.1, 0.3, 0.7, 1.5, 3]
    tints = [sum(token["kl"] >= step for step in steps) for token in trace]
    assert [int(tokens.nth(i).get_attribute("class")[-1]) for i in range(12)] == tints
    assert len(set(tints)) > 2


def candidates(page, index):
    """[policy][rank]: token and share, as the table has them of the token that is looked at."""
    expect(page.locator(f"#token-{index}")).to_have_attribute("aria-selected", "true")
    rows = page.locator(".token-details tbody tr").all()
    cells = [[cell.inner_text() for cell in row.locator("td").all()] for row in rows]
    return [[cell for cell in column if cell] for column in zip(*cells, strict=True)]


def test_pointing_at_a_token_shows_what_each_policy_would_have_said(page, url):
    page.get_by_role("link", name="Why this word").click()
    set_tokens(page, 12)
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("The reply is complete.")
    trace = ask(url, 2, alignment_trace=True, logprobs=True, top_logprobs=5)["alignment"]

    def told(token):
        def share(logprob):
            percent = 100 * 2.718281828459045**logprob
            return "< 0.1 %" if 0 < percent < 0.1 else f"{percent:.1f} %"

        return [
            [f"{c['token'].replace(' ', '␣')} {share(c['logprob'])}".replace("\n", "↵") for c in token["top"][policy]]
            for policy in ("base", "principled", "aligned")
        ]

    page.locator("#token-6").hover()
    assert candidates(page, 6) == told(trace[6])
    number = trace[6]["plausible_tokens"]
    expect(page.locator(".token-details")).to_contain_text(
        f"{trace[6]['kl']:.2f} nats from the base policy; {number} token"
    )
    page.mouse.move(0, 0)
    page.get_by_role("listbox").focus()
    page.keyboard.press("ArrowRight")
    assert candidates(page, 7) == told(trace[7])
    page.keyboard.press("End")
    assert candidates(page, 11) == told(trace[11])
    page.keyboard.press("Home")
    assert candidates(page, 0) == told(trace[0])
    assert page.get_by_role("listbox").get_attribute("aria-activedescendant") == "token-0"


def test_characters_of_several_tokens_are_whole(page):
    page.get_by_role("link", name="Why this word").click()
    force(page, {"choice": ["🦉🦉 Süßholz 日本"]})
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("The reply is complete.")
    text = "".join(page.locator(".token").all_text_contents())
    assert "🦉" in text
    assert "日本" in text.replace("…", "")
    assert "�" not in text


# Sweep


def test_the_sweep_measures_as_the_evaluation_does(page, url, tmp_path):
    page.get_by_role("link", name="Sweep").click()
    set_tokens(page, 60)
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("All replies are complete.")
    expect(page.locator("figure canvas")).to_have_count(6)
    files = {}
    for kind in ("PNG", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Export {kind}").click()
        files[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[kind])
    assert files["PNG"].read_bytes().startswith(b"\x89PNG")
    runs = json.loads(files["JSON"].read_text())["runs"]
    assert [run["ratio"] for run in runs] == [0, 0.5, 1, 2, 4, 8]
    for run in runs:
        text = run["text"]
        assert plain(text) == text_of(url, run["ratio"], max_tokens=60)
        assert run["words"] == len(statistics.words_of(text))
        for n in (1, 2, 3):
            assert run[f"distinct_{n}"] == pytest.approx(statistics.distinct([text], n))
        assert run["longest_repetition"] == statistics.longest_repetition(text)
    trace = ask(url, 4, max_tokens=60, alignment_trace=True)["alignment"]
    assert runs[4]["kl"] == pytest.approx(sum(token["kl"] for token in trace) / len(trace), rel=1e-5)
    assert 0 < runs[0]["kl"] < runs[5]["kl"]
    row = page.locator("tbody tr").nth(4).locator("td").all_inner_texts()
    digits = {"kl": 2, "words": 0, "distinct_1": 2, "distinct_2": 2, "distinct_3": 2, "longest_repetition": 0}
    assert row == [f"{runs[4][name]:.{n}f}" for name, n in digits.items()]


def test_numbers_of_hard_texts_are_the_evaluations(page):
    texts = [
        "",
        "a",
        "a a a a",
        "Don't-stop, don't-stop; DON'T-STOP!",
        "Ünïcödé 日本 ½ x2 _y_",
        "one two one two one two one",
    ]
    found = page.evaluate(
        """async (texts) => {
          const s = await import("/playground/statistics.js");
          return texts.map((t) => [s.wordsOf(t), s.distinct(t, 2), s.longestRepetition(t)]);
        }""",
        texts,
    )
    expected = [[statistics.words_of(t), statistics.distinct([t], 2), statistics.longest_repetition(t)] for t in texts]
    assert found == expected


# Chat


@contextmanager
def answered(page):
    """Until the reply to what is done in the block is there."""
    page.evaluate(
        """() => {
          const status = document.querySelector(".status");
          window.told = new Promise((resolve) => {
            const look = () => status.textContent === "The reply is complete." && resolve();
            new MutationObserver(look).observe(status, {subtree: true, childList: true, characterData: true});
          });
        }"""
    )
    yield
    page.evaluate("window.told")


def say(page, text):
    with answered(page):
        page.get_by_label("Message", exact=True).fill(text)
        page.get_by_label("Message", exact=True).press("Enter")


def turns(page):
    return [item.locator(".reply").inner_text().strip() for item in page.locator(".messages > li").all()]


def test_a_chat_of_many_turns(browser, url):
    with opened(browser, url, "chat") as page:
        limit(page, 16)
        sent = bodies(page)
        page.get_by_label("Principle").fill("Speak of the sea.")
        slide(page, 3)
        say(page, "Hello, <b>who</b> are you?")
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
        kept = turns(page)

        messages = page.locator(".messages > li")
        page.get_by_role("button", name="New").click()
        expect(messages).to_have_count(0)
        expect(page.get_by_label("Principle")).to_have_value("")
        say(page, "Another one")
        page.reload()
        expect(messages).to_have_count(2)
        page.locator("select").first.select_option("1")
        expect(messages.first).to_contain_text("What is a whale?")
        assert turns(page) == kept
        expect(page.get_by_label("Principle")).to_have_value("Speak of the sea.")
        expect(page.locator(".ratio span")).to_have_text("3")
        page.get_by_role("button", name="Delete").click()
        expect(messages.first).to_contain_text("Another one")
        page.get_by_role("button", name="Delete").click()
        page.reload()
        expect(page.locator("select").first.locator("option")).to_have_text(["New conversation"])
        expect(messages).to_have_count(0)


def test_a_reply_that_is_stopped_stays_as_it_is(browser, url):
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


def limit(page, max_tokens, **fields):
    """What the page sends gets these fields besides."""

    def change(route):
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"max_tokens": max_tokens} | fields))

    page.route("**/v1/chat/completions", change)


COLLAPSED = ["> " * 5000, "- " * 2460, "1. " * 1500, "_a*" * 4000, "**" * 3000, "[" * 4000]


def stub(page, text, end="data: [DONE]\n\n", status=200, **delta):
    """The server's part, for what no model says on demand: one chunk with this text."""
    chunk = {"choices": [{"index": 0, "delta": {"content": text, **delta}, "finish_reason": None}]}
    chunk["usage"] = {"completion_tokens": 3}
    body = f"data: {json.dumps(chunk)}\n\n{end}"
    if status != 200:
        body = json.dumps({"error": {"message": text}})
    answer = {"status": status, "content_type": "text/event-stream", "body": body}
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))


@pytest.mark.parametrize("text", COLLAPSED, ids=[text[:3] for text in COLLAPSED])
def test_collapsed_text_harms_nothing(browser, url, text):
    """Deeper than the markdown parser's stack, or slow in it."""
    with opened(browser, url, "chat") as page:
        stub(page, text)
        say(page, "Collapse")
        page.reload()
        expect(page.locator(".messages > li")).to_have_count(2)
        page.get_by_role("link", name="Serving").click()
        expect(fact(page, "Sequences running")).to_be_visible()
        code = "async (text) => (await import('/playground/markdown.js')).markdown(text).nodeName"
        assert page.evaluate(code, text) in ("#text", "#document-fragment")


def test_a_chat_survives_failures(browser, url):
    with opened(browser, url, "chat") as page:
        stub(page, "An old reply.")
        say(page, "Hello")
        stub(page, "There is no room.", status=429)
        page.get_by_role("button", name="Regenerate").click()
        expect(page.get_by_role("alert")).to_have_text("There is no room.")
        expect(page.locator(".status")).to_have_text("A reply failed.")
        page.reload()
        expect(page.locator(".messages > li")).to_have_count(2)
        assert turns(page) == ["Hello", "An old reply."]  # what was there stays
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


def test_an_editor_does_not_cross_a_reply(browser, url):
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
            say(page, text)
        for page in (one, other):
            options = page.locator("select").first.locator("option")
            expect(options.filter(has_text="Tab one")).to_have_count(1)
            expect(options.filter(has_text="Tab two")).to_have_count(1)
        other.reload()
        expect(other.locator("select").first.locator("option")).to_have_text(["Tab two", "Tab one"])


@pytest.mark.parametrize(
    "kept", ['"x"', "[]", "{}", '{"id": "1", "ratio": 2, "principles": [{}], "messages": [{}]}', "{", "null"]
)
def test_what_is_in_storage_may_be_anything(browser, url, kept):
    with opened(browser, url, "chat") as page:
        page.evaluate("(kept) => localStorage.setItem('linalign.conversation.1', kept)", kept)
        page.reload()
        expect(page.get_by_label("Message", exact=True)).to_be_visible()
        expect(page.locator(".messages > li")).to_have_count(0)


def test_without_storage_a_chat_is_a_chat_still(browser, url):
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
    expect(column(page, "Aligned").locator(".speed")).not_to_contain_text("tokens/s")  # all came at once


# Serving


def fact(page, name):
    return page.locator("dl > div").filter(has_text=name).locator("dd")


def test_serving_shows_what_runs(browser, url):
    with opened(browser, url, "serving") as page:
        expect(fact(page, "Sequences running")).to_have_text("0")
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2000}
        body |= {"stream": True, "ignore_eos": True, "principle": "Be brief."}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            expect(fact(page, "Sequences running")).to_have_text("1")
            expect(fact(page, "Tokens a second")).to_have_text(re.compile(r"^[1-9][\d.]*$"))
            expect(fact(page, "KV cache in use")).not_to_have_text("0.0 %")
        expect(fact(page, "Sequences running")).to_have_text("0")
        expect(page.locator("figure canvas")).to_have_count(1)
        expect(fact(page, "Prompt tokens spared by prefix reuse")).to_have_text(re.compile(r"^\d+\.\d %$"))
        page.get_by_role("link", name="Compare").click()
        page.wait_for_timeout(1500)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(1500)
        assert asked == []  # nobody looks any more


# Keys


def test_the_page_asks_for_the_key_and_keeps_it_in_memory(browser, embedded):  # noqa: ARG001
    with (
        serving("--api-keys", "open-sesame") as (url, _),
        opened(browser, url, has_key=True, permissions=["clipboard-read", "clipboard-write"]) as page,
    ):
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        assert serious_findings(page) == []
        dialog.get_by_label("API key").fill("wrong")
        dialog.get_by_label("API key").press("Enter")
        expect(dialog.get_by_text("That key was refused.")).to_be_visible()
        dialog.get_by_label("API key").fill("open-sesame")
        dialog.get_by_role("button", name="Use it").click()
        expect(page.locator(".model")).to_have_text("smollm2")
        set_tokens(page, 4)
        page.get_by_role("button", name="Run").click()
        expect(page.locator(".status")).to_have_text("All replies are complete.")
        for language, run in (("curl", ["bash", "-c"]), ("Python", [sys.executable, "-c"])):
            column(page, "Aligned").get_by_role("button", name=f"Copy as {language}").click()
            expect(page.locator(".status")).to_have_text(f"Copied as {language}.")
            code = page.evaluate("navigator.clipboard.readText()")
            assert "open-sesame" not in code
            env = {**os.environ, "LINALIGN_API_KEY": "open-sesame"}
            done = subprocess.run([*run, code], env=env, capture_output=True, text=True, timeout=60, check=True)
            assert "invalid_api_key" not in done.stdout
        kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        assert "open-sesame" not in kept
        assert "open-sesame" not in page.content()
        page.reload()
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator(".status")).to_have_text("The server needs an API key.")
        page.get_by_role("link", name="Serving").click()
        page.wait_for_timeout(1500)
        expect(page.get_by_role("dialog")).to_be_hidden()  # it does not insist
        page.get_by_role("button", name="Connect").click()
        page.get_by_label("API key", exact=True).fill("schlüssel")
        page.get_by_role("button", name="Use it").click()
        expect(page.get_by_role("dialog")).to_be_visible()  # no header holds that
        page.get_by_label("API key", exact=True).fill("open-sesame")
        page.get_by_label("API key", exact=True).press("Enter")
        expect(page.locator(".model")).to_have_text("smollm2")
        expect(fact(page, "Sequences running")).to_have_text("0")


# What models and people write is text


HOSTILE = """# <script>window.hacked = 1</script>Title

<img src=x onerror="window.hacked = 2"> <svg onload="window.hacked = 3"></svg>
<iframe srcdoc="<script>parent.hacked = 4</script>">

[a link](javascript:window.hacked=5) [another](https://example.org/) ![picture](https://example.org/x.png)
<a href="data:text/html,<script>1</script>" style="position:fixed" onclick="window.hacked = 6">raw</a>
<form action="https://example.org"><input name="q"></form> <style>body { display: none }</style>
<base href="https://example.org/">

**bold** and `code`"""


def force(page, structure):
    """The model says this and nothing else: a structure is added to what the page sends."""
    limit(page, 600, structured_outputs=structure)


@pytest.mark.parametrize("view", ["compare", "chat"])
def test_replies_with_scripts_are_harmless(browser, url, view):
    with opened(browser, url, view) as page:
        force(page, {"choice": [HOSTILE]})
        if view == "chat":
            say(page, HOSTILE)
            replies = page.locator(".messages > li").nth(1).locator(".reply")
            expect(page.locator(".typed")).to_have_text(HOSTILE)
        else:
            page.get_by_role("button", name="Run").click()
            expect(page.locator(".status")).to_have_text("All replies are complete.")
            replies = page.locator(".reply")
        for reply in replies.all():
            expect(reply.locator("strong")).to_have_text("bold")
            expect(reply.locator("code")).to_have_text("code")
            links = reply.locator("a[href]")
            assert [link.get_attribute("href") for link in links.all()] == ["https://example.org/"]
            assert "noopener" in links.get_attribute("rel")
            tags = reply.evaluate("(e) => [...e.querySelectorAll('*')].map((x) => x.localName)")
            assert set(tags) <= {"h1", "p", "a", "br", "strong", "code"}
            attributes = reply.evaluate("(e) => [...e.querySelectorAll('*')].flatMap((x) => x.getAttributeNames())")
            assert set(attributes) <= {"href", "target", "rel"}
            expect(reply).to_contain_text("<img src=x onerror")  # what was written, as text
            expect(reply).to_contain_text("<script>window.hacked = 1</script>Title")
        assert page.evaluate("window.hacked") is None


def test_titles_of_conversations_are_text(browser, url):
    with opened(browser, url, "chat") as page:
        limit(page, 2)
        say(page, "<img src=x onerror='window.hacked=1'>")
        page.reload()
        expect(page.get_by_label("Conversation").first).to_contain_text("<img src=x")
        assert page.evaluate("window.hacked") is None


def test_the_policy_keeps_strangers_code_out(browser, url):
    response = httpx.get(url + "/")
    assert response.headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    assert re.search(r"<script(?! type=\"module\" src)|<style|\b(style|on\w+)=", response.text) is None
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("main")
    refused = page.evaluate(
        """async () => {
          const found = [];
          document.addEventListener("securitypolicyviolation", (event) => found.push(event.effectiveDirective));
          const script = document.createElement("script");
          try { script.textContent = "window.hacked = 1"; document.body.append(script); } catch { found.push("type"); }
          try { document.body.innerHTML = "<b>x</b>"; } catch { found.push("html"); }
          await fetch("https://example.org/").catch(() => {});
          await new Promise((done) => setTimeout(done, 100));
          return [found, window.hacked ?? null];
        }"""
    )
    assert {"type", "html", "connect-src"} <= set(refused[0])
    assert refused[1] is None
    context.close()


# For everyone


def fill(page, view):
    """Put something to see into the view."""
    if view == "chat":
        limit(page, 8)
        say(page, "Hello")
    elif view == "serving":
        expect(fact(page, "Sequences running")).to_be_visible()
    else:
        set_tokens(page, 12)
        page.get_by_role("button", name="Run").click()
        expect(page.locator(".status")).to_contain_text("complete")


def serious_findings(page):
    page.evaluate(AXE())
    found = page.evaluate("axe.run()")["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in serious]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious_and_a_phone_is_wide_enough(browser, url, view, scheme):
    phone = {"width": 360, "height": 740}
    with opened(browser, url, view, color_scheme=scheme, viewport=phone) as page:
        fill(page, view)
        if view == "why":
            page.locator("#token-2").hover()
        page.evaluate(AXE())
        found = page.evaluate("axe.run()")["violations"]
        serious = [
            (each["id"], [node["html"] for node in each["nodes"]])
            for each in found
            if each["impact"] in ("serious", "critical")
        ]
        assert serious == []
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 360


NAME_OF_FOCUS = """() => {
  const at = document.activeElement;
  return (at.getAttribute("aria-label") ?? at.labels?.[0]?.innerText ?? at.innerText).split("\\n")[0].trim();
}"""


def test_a_keyboard_is_enough(page):
    """Every control can be reached with Tab, none holds the focus."""
    page.keyboard.press("Tab")
    seen = []
    for _ in range(40):
        seen.append(page.evaluate(NAME_OF_FOCUS))
        page.keyboard.press("Tab")
    wanted = [
        "Compare",
        "Serving",
        "Prompt",
        "Principle 1",
        "Add a principle",
        "Preset",
        "Alignment ratio",
        "Sampling",
        "Run",
    ]
    assert [name for name in seen if name in wanted][: len(wanted)] == wanted


# What is shipped


def test_vendored_files_are_those_of_the_packages():
    """`make vendor` brings them up to date."""
    vendor, packages = FOLDER / "vendor", ROOT / ".venv/playground/node_modules"
    named = json.loads((FOLDER / "package.json").read_text())["dependencies"]
    files = [file.relative_to(vendor) for file in vendor.rglob("*") if file.is_file()]
    assert {file.parts[0] for file in files} == set(named)
    for file in files:
        assert (vendor / file).read_bytes() == (packages / file).read_bytes(), file
    for name, version in named.items():
        assert json.loads((packages / name / "package.json").read_text())["version"] == version
        assert (vendor / name / "LICENSE").is_file()


def test_the_wheel_has_the_page(tmp_path):
    clean = tmp_path / "clean"  # of what earlier builds have left
    left = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, clean, ignore=left)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, clean]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert {f"server/playground/{file.relative_to(FOLDER)}" for file in files} <= inside


# The README's pictures: `make pictures` puts them into docs/images


@pytest.mark.parametrize("view", ["compare", "why", "sweep"])
def test_picture(browser, url, tmp_path, view):
    folder = Path(os.environ.get("PICTURES", tmp_path))
    with opened(browser, url, view) as page:
        page.get_by_role("button", name="Run").click()
        expect(page.locator(".status")).to_contain_text("complete")
        if view == "why":
            page.locator(".token").filter(has_text="bike").hover()
        page.screenshot(path=folder / f"playground-{view}.png", full_page=view == "sweep")
    assert (folder / f"playground-{view}.png").stat().st_size > 20_000

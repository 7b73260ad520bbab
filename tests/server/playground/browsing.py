"""Helpers for tests of the playground: they open pages, act on them and read from them."""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import expect

ROOT = Path(__file__).parents[3]
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


@contextmanager
def opened(browser, url, view="compare", has_key=False, **options):
    """Open a page in a new browser profile. At the end, checks that there were no console errors and no requests to
    other hosts.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(MINUTE)
    problems, urls = [], []
    page.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    try:
        page.goto(f"{url}/#{view}")
        if not has_key:
            expect(page.locator(".model")).to_have_text("smollm2")
        yield page
    finally:
        context.close()
    assert [text for text in problems if not re.search("responded with a status of [45]", text)] == []
    assert all(address.startswith((url, "blob:")) for address in urls), urls


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
    """The words of a markdown text; rendering removes its marks."""
    return re.findall(r"\w+", markdown)


def column(page, title):
    return page.get_by_role("region", name=title, exact=True)


def shown(page, title):
    return plain(re.sub(r"^\d+\.", "", column(page, title).locator(".reply").inner_text()))


def slide(page, ratio):
    page.get_by_label("Alignment ratio").fill(str(ratio))


def serious_findings(page):
    page.evaluate(AXE())
    violations = page.evaluate("axe.run()")["violations"]
    serious = [each for each in violations if each["impact"] in ("serious", "critical")]
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in serious]


def send_message(page, text):
    with answered(page):
        page.get_by_label("Message", exact=True).fill(text)
        page.get_by_label("Message", exact=True).press("Enter")


def limit(page, max_tokens, **fields):
    """Set these fields in all chat requests of the page."""

    def change(route):
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"max_tokens": max_tokens} | fields))

    page.route("**/v1/chat/completions", change)


@contextmanager
def answered(page):
    """Wait at the end of the block until the reply to what was done in it is complete."""
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


def bodies(page):
    """A list of the JSON bodies that the page sends from now on."""
    sent = []
    page.on("request", lambda request: request.method == "POST" and sent.append(request.post_data_json))
    return sent


def fact(page, name):
    return page.locator("dl > div").filter(has_text=name).locator("dd")


def force(page, structure):
    """Make the model reply within this structure, by adding it to the page's requests."""
    limit(page, 600, structured_outputs=structure)

"""Text of models and users is shown as text and never runs as code."""

import re

import httpx
import pytest
from playwright.sync_api import expect

from linalign.server.routes.playground import POLICY
from tests.server.playground.browsing import force, limit, opened, send_message

pytestmark = pytest.mark.slow

HOSTILE = """# <script>window.hacked = 1</script>Title

<img src=x onerror="window.hacked = 2"> <svg onload="window.hacked = 3"></svg>
<iframe srcdoc="<script>parent.hacked = 4</script>">

[a link](javascript:window.hacked=5) [another](https://example.org/) ![picture](https://example.org/x.png)
<a href="data:text/html,<script>1</script>" style="position:fixed" onclick="window.hacked = 6">raw</a>
<form action="https://example.org"><input name="q"></form> <style>body { display: none }</style>
<base href="https://example.org/">

**bold** and `code`"""


@pytest.mark.parametrize("view", ["compare", "chat"])
def test_replies_with_scripts_are_harmless(browser, url, view):
    with opened(browser, url, view) as page:
        force(page, {"choice": [HOSTILE]})
        if view == "chat":
            send_message(page, HOSTILE)
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
            expect(reply).to_contain_text("<img src=x onerror")  # the tag, shown as text
            expect(reply).to_contain_text("<script>window.hacked = 1</script>Title")
        assert page.evaluate("window.hacked") is None


def test_titles_of_conversations_are_text(browser, url):
    with opened(browser, url, "chat") as page:
        limit(page, 2)
        send_message(page, "<img src=x onerror='window.hacked=1'>")
        page.reload()
        expect(page.get_by_label("Conversation").first).to_contain_text("<img src=x")
        assert page.evaluate("window.hacked") is None


def test_the_security_policy_blocks_foreign_code(browser, url):
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

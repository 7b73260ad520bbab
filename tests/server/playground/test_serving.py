"""Serving: the view of the server's metrics."""

import re

import httpx
import pytest
from playwright.sync_api import expect

from tests.server.playground.browsing import fact, opened

pytestmark = pytest.mark.slow


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
        urls = []
        page.on("request", lambda request: urls.append(request.url))
        page.wait_for_timeout(1500)
        assert urls == []  # the view that polled is closed

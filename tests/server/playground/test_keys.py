"""A server that requires an API key."""

import os
import subprocess
import sys

import pytest
from playwright.sync_api import expect

from tests.server.playground.browsing import column, fact, opened, serious_findings, set_tokens
from tests.serving import serving

pytestmark = pytest.mark.slow


def test_the_page_asks_for_the_key_and_keeps_it_in_memory_only(browser, embedded):  # noqa: ARG001
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
        stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        assert "open-sesame" not in stored
        assert "open-sesame" not in page.content()
        page.reload()
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator(".status")).to_have_text("The server needs an API key.")
        page.get_by_role("link", name="Serving").click()
        page.wait_for_timeout(1500)
        expect(page.get_by_role("dialog")).to_be_hidden()  # no second dialog after a cancel
        page.get_by_role("button", name="Connect").click()
        page.get_by_label("API key", exact=True).fill("schlüssel")
        page.get_by_role("button", name="Use it").click()
        expect(page.get_by_role("dialog")).to_be_visible()  # a header can't contain that key
        page.get_by_label("API key", exact=True).fill("open-sesame")
        page.get_by_label("API key", exact=True).press("Enter")
        expect(page.locator(".model")).to_have_text("smollm2")
        expect(fact(page, "Sequences running")).to_have_text("0")

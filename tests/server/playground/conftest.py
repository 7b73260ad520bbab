import os

import pytest
from playwright.sync_api import sync_playwright

from tests.server.playground.browsing import CHROMIUM, QUIET, opened


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        assert "CI" not in os.environ, "CI must have Chromium"
        pytest.skip("the playground was not tested: chromium is not installed (Debian's package chromium)")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)


@pytest.fixture
def page(browser, url):
    with opened(browser, url) as page:
        yield page

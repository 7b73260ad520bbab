"""Accessibility: screen readers, keyboards, small screens."""

import pytest
from playwright.sync_api import expect

from tests.server.playground.browsing import AXE, VIEWS, fact, limit, opened, send_message, set_tokens

pytestmark = pytest.mark.slow


def fill(page, view):
    """Fill the view with content."""
    if view == "chat":
        limit(page, 8)
        send_message(page, "Hello")
    elif view == "serving":
        expect(fact(page, "Sequences running")).to_be_visible()
    else:
        set_tokens(page, 12)
        page.get_by_role("button", name="Run").click()
        expect(page.locator(".status")).to_contain_text("complete")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious_and_a_phone_is_wide_enough(browser, url, view, scheme):
    phone = {"width": 360, "height": 740}
    with opened(browser, url, view, color_scheme=scheme, viewport=phone) as page:
        fill(page, view)
        if view == "why":
            page.locator("#token-2").hover()
        page.evaluate(AXE())
        violations = page.evaluate("axe.run()")["violations"]
        serious = [
            (each["id"], [node["html"] for node in each["nodes"]])
            for each in violations
            if each["impact"] in ("serious", "critical")
        ]
        assert serious == []
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 360


NAME_OF_FOCUS = """() => {
  const at = document.activeElement;
  return (at.getAttribute("aria-label") ?? at.labels?.[0]?.innerText ?? at.innerText).split("\\n")[0].trim();
}"""


def test_the_page_works_with_a_keyboard_only(page):
    """Tab reaches every control and leaves each again."""
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

"""Why this word: the tokens that each policy would have drawn, token by token."""

import pytest
from playwright.sync_api import expect

from tests.server.playground.browsing import ask, force, set_tokens

pytestmark = pytest.mark.slow


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
    """Candidates in the table of the selected token, by policy and rank: token and share."""
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

    def expected_candidates(token):
        def share(logprob):
            percent = 100 * 2.718281828459045**logprob
            return "< 0.1 %" if 0 < percent < 0.1 else f"{percent:.1f} %"

        return [
            [f"{c['token'].replace(' ', '␣')} {share(c['logprob'])}".replace("\n", "↵") for c in token["top"][policy]]
            for policy in ("base", "principled", "aligned")
        ]

    page.locator("#token-6").hover()
    assert candidates(page, 6) == expected_candidates(trace[6])
    number = trace[6]["plausible_tokens"]
    expect(page.locator(".token-details")).to_contain_text(
        f"{trace[6]['kl']:.2f} nats from the base policy; {number} token"
    )
    page.mouse.move(0, 0)
    page.get_by_role("listbox").focus()
    page.keyboard.press("ArrowRight")
    assert candidates(page, 7) == expected_candidates(trace[7])
    page.keyboard.press("End")
    assert candidates(page, 11) == expected_candidates(trace[11])
    page.keyboard.press("Home")
    assert candidates(page, 0) == expected_candidates(trace[0])
    assert page.get_by_role("listbox").get_attribute("aria-activedescendant") == "token-0"


def test_characters_of_several_tokens_are_complete(page):
    page.get_by_role("link", name="Why this word").click()
    force(page, {"choice": ["🦉🦉 Süßholz 日本"]})
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("The reply is complete.")
    text = "".join(page.locator(".token").all_text_contents())
    assert "🦉" in text
    assert "日本" in text.replace("…", "")
    assert "�" not in text

"""How the page finds its server: addresses, keys, servers that are away."""

from __future__ import annotations

import json

import pytest

from tests.browser.sites import FakeApi, static_page

HOME = "http://127.0.0.1:30000"
"""Where a page from a static server looks for its server."""


@pytest.fixture(scope="module")
def static_url():
    with static_page() as url:
        yield url


def test_a_link_does_not_get_the_key_of_another_server(visitor, static_url):
    """The stored key goes to the server that it was entered for. A server that a link names is asked without it."""
    page = visitor.page
    home, other = FakeApi(page, HOME, key="secret"), FakeApi(page, "http://other.example")
    kept = json.dumps({"server": HOME, "apiKey": "secret"})
    page.add_init_script(f"localStorage['lingbot-rt.settings'] ??= {kept!r}")
    visitor.open(static_url)
    assert {asked["authorization"] for asked in home.asked} == {"Bearer secret"}
    visitor.open(f"{static_url}?server=http://other.example")
    assert other.asked
    assert not any("authorization" in asked for asked in other.asked)
    page.click("#server-chip")
    assert page.input_value("#server-key") == ""
    page.keyboard.press("Escape")
    visitor.open(static_url)
    assert home.asked[-1]["authorization"] == "Bearer secret"

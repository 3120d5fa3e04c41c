"""How the page finds its server: addresses, keys, servers that are away."""

from __future__ import annotations

import json

import pytest

from tests.browser.sites import FakeApi, FakeWorld, static_page

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


def test_without_a_server_the_stage_asks_for_one_and_shows_the_presets(visitor, static_url):
    """Address and key are asked for on the stage. Presets and picture are there. Enter connects, also in the dialog."""
    page = visitor.page
    visitor.expected = ("net::ERR_",)
    FakeApi(page, HOME).is_up = False
    FakeApi(page, "http://box.example:1")
    page.goto(static_url)
    page.wait_for_selector("#connect:visible")
    assert page.locator("#start").is_hidden()
    page.wait_for_selector("[data-preset][aria-pressed=true]")
    assert page.input_value("#prompt")
    assert page.evaluate("() => document.getElementById('poster').width") > 160
    assert not any(url.startswith(f"{static_url}v1") for url in visitor.requests), "a server of files has no API"

    page.fill("#connect [name=address]", "not a url !!")
    page.press("#connect [name=address]", "Enter")
    assert "not a url !!" in page.inner_text("#connect .problem")
    page.fill("#connect [name=address]", "box.example:1")
    page.press("#connect [name=address]", "Enter")
    page.wait_for_selector("#start:enabled")
    assert page.locator("#connect").is_hidden()

    page.click("#server-chip")
    page.fill("#server-address", "///")
    page.press("#server-address", "Enter")
    assert page.locator("#server-dialog .problem").is_visible()
    page.fill("#server-address", HOME)
    page.fill("#server-key", "secret")
    page.press("#server-key", "Enter")
    page.wait_for_selector("#server-dialog", state="hidden")
    page.wait_for_selector("#connect:visible")
    page.click("#server-chip")
    assert page.input_value("#server-address") == HOME
    assert page.input_value("#server-key") == "secret"
    page.fill("#server-address", "box.example:1")
    assert page.input_value("#server-key") == "", "the key of another server"
    page.keyboard.press("Escape")
    page.wait_for_selector("#server-dialog", state="hidden")


def test_a_server_that_needs_a_key_is_asked_with_the_key_from_the_stage(visitor, static_url):
    """Without a key, and with a wrong one, the stage asks for it."""
    page = visitor.page
    visitor.expected = ("401",)
    FakeApi(page, HOME, key="secret")
    page.goto(static_url)
    page.wait_for_selector("#connect-title:has-text('needs a key')")
    page.fill("#connect [name=key]", "wrong")
    page.press("#connect [name=key]", "Enter")
    page.wait_for_selector("#connect-title:has-text('refused this key')")
    page.fill("#connect [name=key]", "secret")
    page.press("#connect [name=key]", "Enter")
    page.wait_for_selector("#start:enabled")
    visitor.open(static_url)


def test_a_link_with_something_else_than_an_address_is_refused(visitor, static_url):
    """Nothing is asked. The stage shows what the link said, and asks for an address."""
    page = visitor.page
    page.goto(f"{static_url}?server=not a url !!")
    page.wait_for_selector("#connect-title:has-text('is not an address')")
    assert page.input_value("#connect [name=address]") == "not a url !!"
    assert not any("/v1/models" in url for url in visitor.requests)


def test_the_card_of_a_lost_server_goes_when_the_server_is_back(visitor, static_url):
    """The page connects again by itself, also through a proxy that answers 502 meanwhile. A click starts again."""
    page = visitor.page
    visitor.expected = ("502",)
    api, world = FakeApi(page, HOME), FakeWorld(page, HOME)
    visitor.open(static_url)
    visitor.start()
    api.status = 502
    world.close(1001, "going away")
    visitor.wait_for_state("lost")
    page.wait_for_selector("[data-key=session]")
    page.wait_for_selector("#connect:visible")
    api.status = 200
    page.wait_for_selector("[data-key=session]", state="detached")
    page.wait_for_selector("#connect", state="hidden")
    visitor.start()

"""``lingbot-rt play``: opens the web page of the server at an address. Starts that server first when none answers."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import threading
import webbrowser

from lingbot_rt.client.address import ServerAddress
from lingbot_rt.client.server_info import server_answers
from lingbot_rt.commands.options import add_config_options, config_from, server_url
from lingbot_rt.commands.output import say
from lingbot_rt.commands.reference_flags import add_reference_options
from lingbot_rt.commands.serve import local_address, serve_until_stopped
from lingbot_rt.config import ServeConfig
from lingbot_rt.config_values import environment_value
from lingbot_rt.errors import ConfigError, ConnectFailed

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-browser", action="store_true", help="print the page's address and open nothing")
    parser.add_argument(
        "--url",
        type=server_url,
        help="address of the server, in place of --host and --port; one on another machine is opened, not started",
    )
    add_config_options(parser)
    add_reference_options(parser)


def run(args: argparse.Namespace) -> int:
    config = config_from(args)
    page = _page(args, config)
    if server_answers(page.shown):
        say(f"  page       {page.shown}")
        if not args.no_browser and not open_browser(page.shown):
            say("no browser can be opened here: open this address in one")
        return 0
    if args.url is not None:
        if not page.is_local or page.is_secure or page.base:
            raise ConnectFailed(
                f"--url {page.shown} does not answer, and no server can be started there", reconnectable=True
            )
        config = dataclasses.replace(config, host=page.host, port=page.port)
    return serve_until_stopped(config, None if args.no_browser else open_browser_later)


def _page(args: argparse.Namespace, config: ServeConfig) -> ServerAddress:
    """The address of the server that is looked for. Raises ConfigError for two addresses."""
    if args.url is None:
        return ServerAddress.parse(f"http://{local_address(config.host, config.port or 1)}")
    for name in ("host", "port"):
        if name in args:
            raise ConfigError(f"--url {args.url} and --{name} are two addresses: give one of them", field="url")
    return ServerAddress.parse(args.url)


def open_browser_later(url: str) -> None:
    """Opens the page from another thread: some browsers let their caller wait."""

    def opening() -> None:
        if not open_browser(url):
            log.warning("no browser can be opened here: open %s in one", url)

    threading.Thread(target=opening, name="browser", daemon=True).start()


def open_browser(url: str) -> bool:
    """Whether a browser was asked to show ``url``.

    Without a screen Python would find a browser for the terminal, which cannot show the page.
    """
    has_screen = sys.platform in ("darwin", "win32") or any(
        environment_value(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    try:
        return has_screen and webbrowser.open(url)
    except webbrowser.Error:
        return False

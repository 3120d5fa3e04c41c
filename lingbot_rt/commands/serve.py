"""``lingbot-rt serve``: the engine, the app around it, and uvicorn around both."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lingbot_rt import __version__
from lingbot_rt.commands.devices import is_follower, require_devices, require_folders
from lingbot_rt.commands.exit_code import exit_code
from lingbot_rt.commands.options import add_config_options, config_from
from lingbot_rt.config import ENDPOINT, ServeConfig
from lingbot_rt.errors import ConfigError

STOP_LIMIT_S = 4.5
"""After Ctrl-C the process ends by then, whatever a thread is still doing (reading 37 GB of weights, say)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    config = config_from(args)
    if is_follower():
        from lingbot_rt.engine.worker import run_launched_worker

        return run_launched_worker(config)
    # Told to end is told to end: by Ctrl-C or by a service manager.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with listening_socket(config) as listener:
            require_devices(config)
            require_folders(config)
            return _serve(config, listener)
    except KeyboardInterrupt:
        return 0


def _serve(config: ServeConfig, listener: socket.socket) -> int:
    """Returns the exit code when the server has ended by itself; Ctrl-C raises KeyboardInterrupt."""
    from lingbot_rt.commands.progress import StageBars
    from lingbot_rt.engine.engine import Engine
    from lingbot_rt.server.app import Server, create_app
    from lingbot_rt.telemetry import configure_logging

    class EndingServer(Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            watchdog = threading.Timer(STOP_LIMIT_S, _end_now)
            watchdog.daemon = True
            watchdog.start()
            super().handle_exit(sig, frame)

    configure_logging(config.log_level)
    engine = Engine(config)
    app = create_app(config, engine)
    server = EndingServer(app, config)

    if config.log_level == "info":
        # uvicorn's own steps and every request: only a debugger wants them.
        for name in ("uvicorn.error", "uvicorn.access"):
            logging.getLogger(name).setLevel(logging.WARNING)

    async def serve() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        with StageBars() as bars:
            await bars.follow(engine, serving)
        if engine.status.ready:
            model_info = engine.model_info
            address = shown_address(listener)
            print(
                f"lingbot-rt {__version__}: {model_info.model_id} on {model_info.device}, {model_info.dtype}\n"
                f"  page       http://{address}\n"
                f"  WebSocket  ws://{address}{ENDPOINT}",
                flush=True,
            )
        await serving

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(serve())
    failure = app.state.service.failure
    code = 0 if failure is None else exit_code(failure)
    if engine.is_lost:
        # What is left of a broken group of ranks may wait for those that are gone.
        logging.shutdown()
        os._exit(code)
    return code


def _end_now() -> None:
    print(f"lingbot-rt: still busy {STOP_LIMIT_S} s after it was told to stop, ended", file=sys.stderr, flush=True)
    os._exit(0)


def shown_address(listener: socket.socket) -> str:
    """``host:port`` to open from this machine, with the port that was found when 0 was asked for."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{host}:{port}"


@contextmanager
def listening_socket(config: ServeConfig) -> Iterator[socket.socket]:
    """The port is taken before anything slow starts, so that a wrong one is told at once. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {config.host}: {error.strerror}", field="host") from None
    with listener:
        # Without it a port stays taken for a minute after the server before.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise ConfigError(
                f"--port {config.port} on {config.host}: {error.strerror}; choose another --port", field="port"
            ) from None
        yield listener

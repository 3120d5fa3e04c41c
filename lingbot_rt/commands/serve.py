"""``lingbot-rt serve``: starts the engine and serves it with uvicorn."""

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
from pathlib import Path
from types import FrameType

from lingbot_rt import __version__
from lingbot_rt.commands import exit_code
from lingbot_rt.commands.local_engine import StartupBars, require_devices
from lingbot_rt.commands.options import add_config_options, config_from
from lingbot_rt.config import ENDPOINT, ServeConfig, flag
from lingbot_rt.errors import ConfigError

STOP_LIMIT_S = 4.5
"""Seconds after Ctrl-C at which the process ends, even if a thread is still busy (reading 37 GB of weights, say)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    config = config_from(args)
    if _is_worker_rank():
        from lingbot_rt.engine.worker import run_launched_worker

        return run_launched_worker(config)
    # A service manager's SIGTERM ends the server as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with listening_socket(config) as listener:
            require_devices(config)
            require_folders(config)
            return _serve(config, listener)
    except KeyboardInterrupt:
        return 0


def _serve(config: ServeConfig, listener: socket.socket) -> int:
    """Returns the exit code if the server ends by itself. Ctrl-C raises KeyboardInterrupt."""
    from lingbot_rt.engine.engine import Engine
    from lingbot_rt.server.app import Server, create_app
    from lingbot_rt.telemetry import configure_logging

    class EndingServer(Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            watchdog = threading.Timer(STOP_LIMIT_S, _end_now)
            watchdog.daemon = True
            watchdog.start()
            super().handle_exit(sig, frame)

    configure_logging(config.log_level, key=config.api_key)
    engine = Engine(config)
    app = create_app(config, engine)
    server = EndingServer(app, config)

    if config.log_level == "info":
        # uvicorn logs its own steps and every request at info; show them at debug only.
        for name in ("uvicorn.error", "uvicorn.access"):
            logging.getLogger(name).setLevel(logging.WARNING)

    async def serve() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        with StartupBars() as bars:
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
        # Threads of a broken process group may wait for lost ranks for ever, so skip the normal shutdown.
        logging.shutdown()
        os._exit(code)
    return code


def _end_now() -> None:
    print(f"lingbot-rt: still busy {STOP_LIMIT_S} s after the stop signal, exiting now", file=sys.stderr, flush=True)
    os._exit(0)


def _is_worker_rank() -> bool:
    """Whether torchrun started this process as a rank other than 0."""
    return "MASTER_PORT" in os.environ and int(os.environ.get("RANK", "0")) > 0


def require_folders(config: ServeConfig) -> None:
    """Raises ConfigError if a configured folder can't be used. Creates --record-dir."""
    for name in ("first_frame_dir", "postprocess_model_dir"):
        folder = getattr(config, name)
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"{flag(name)} {folder}: there is no such folder", field=name)
    if config.record_dir is None:
        return
    try:
        Path(config.record_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--record-dir {config.record_dir}: {error.strerror}", field="record_dir") from None
    if not os.access(config.record_dir, os.W_OK):
        raise ConfigError(f"--record-dir {config.record_dir} cannot be written", field="record_dir")


def shown_address(listener: socket.socket) -> str:
    """``host:port`` to open from this machine. With --port 0 it has the port that was found."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{host}:{port}"


@contextmanager
def listening_socket(config: ServeConfig) -> Iterator[socket.socket]:
    """Takes the port before anything slow starts, so that a taken port fails at once. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {config.host}: {error.strerror}", field="host") from None
    with listener:
        # Without this option the port stays taken for a minute after another server has closed it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise ConfigError(
                f"--port {config.port} on {config.host}: {error.strerror}; choose another --port", field="port"
            ) from None
        yield listener

"""``lingbot-rt serve``: starts the engine and serves it with uvicorn."""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from lingbot_rt import __version__
from lingbot_rt.commands import exit_code
from lingbot_rt.commands.local_engine import StartupBars, require_devices, require_folders
from lingbot_rt.commands.options import add_config_options, config_from
from lingbot_rt.commands.output import complain, say
from lingbot_rt.commands.reference_flags import add_reference_options
from lingbot_rt.config import ENDPOINT, ServeConfig
from lingbot_rt.config_values import environment_value
from lingbot_rt.errors import MAX_QUOTED, ConfigError, OutputFailed, printable, quoted, reason_of

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

STOP_LIMIT_S = 4.5
"""Seconds after a stop signal at which a ready server ends, even if a thread is still busy."""

LOADING_STOP_LIMIT_S = 1.2
"""The same while the model loads. The thread that reads or compiles it cannot be interrupted."""

LOADING = "stopped while the model was loading"

_PORT_TRIES = 16
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOT_OURS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # an address of another machine, or IPv6 without IPv6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    add_reference_options(parser)


def run(args: argparse.Namespace) -> int:
    return serve_until_stopped(config_from(args))


def serve_until_stopped(config: ServeConfig, on_ready: Callable[[str], None] | None = None) -> int:
    """Serves until a stop signal or a failure, and returns the exit code.

    Calls ``on_ready`` with the page's URL once the model is ready.
    """
    if _is_worker_rank():
        from lingbot_rt.engine.worker import run_launched_worker

        return run_launched_worker(config)
    with _ending_at_once(), listening_sockets(config) as listeners:
        require_folders(config)
        if config.ray_replicas is None:
            require_devices(config)
        return _serve(config, listeners, on_ready)


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """A stop signal ends the process with exit code 0. uvicorn takes the signals over while it serves.

    Before that nothing has to be undone, and an exception at a random place of an import would show as a traceback.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        _end_now(f"stopped by {signal.Signals(number).name}")

    before = {number: signal.signal(number, end) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(config: ServeConfig, listeners: Sequence[socket.socket], on_ready: Callable[[str], None] | None) -> int:
    """Returns the exit code: 0 after a stop signal."""
    from lingbot_rt.server.app import Server
    from lingbot_rt.server.parking import CLOSE_LIMIT_S
    from lingbot_rt.telemetry import configure_logging

    class EndingServer(Server):
        stopped_while_loading = False

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # uvicorn would send the signals again after its shutdown; this server returns an exit code instead.
            if not self.should_exit:
                self.stopped_while_loading = not engine.status.ready
                limit_s = LOADING_STOP_LIMIT_S if self.stopped_while_loading else STOP_LIMIT_S
                if config.park_dir is not None and not self.stopped_while_loading:
                    limit_s += CLOSE_LIMIT_S  # sessions are written
                why = LOADING if self.stopped_while_loading else f"still busy {limit_s} s after the stop signal"
                watchdog = threading.Timer(limit_s, _end_now, [why])
                watchdog.daemon = True
                watchdog.start()
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    configure_logging(config.log_level, key=config.api_key, log_format=config.log_format)
    app = _application(config)
    engine = app.state.service.engine
    server = EndingServer(app, config)

    if config.log_level == "info":
        # uvicorn logs its own steps and every request at info; show them at debug only.
        for name in ("uvicorn.error", "uvicorn.access"):
            logging.getLogger(name).setLevel(logging.WARNING)

    async def serve() -> None:
        serving = asyncio.create_task(server.serve(sockets=list(listeners)))
        with StartupBars() as bars:
            await bars.follow(engine, serving)
        if engine.status.ready:
            address = shown_address(listeners)
            show_banner(
                f"lingbot-rt {__version__}: {_what_is_served(config, engine)}",
                f"  page       http://{address}",
                f"  WebSocket  ws://{address}{ENDPOINT}",
            )
            if on_ready is not None:
                on_ready(f"http://{address}")
        await serving

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(serve())
    failure = app.state.service.failure
    code = 0 if failure is None else exit_code(failure)
    if server.stopped_while_loading and failure is None:
        _end_now(LOADING)
    if engine.is_lost:
        # Threads of a broken process group may wait for lost ranks for ever, so skip the normal shutdown.
        logging.shutdown()
        os._exit(code)
    return code


def _application(config: ServeConfig) -> FastAPI:
    """The server with its engine, or the front of the replicas. Raises ConfigError."""
    if config.ray_replicas is None:
        from lingbot_rt.engine.engine import Engine
        from lingbot_rt.server.app import create_app

        return create_app(config, Engine(config))
    try:
        from lingbot_rt.deploy.ray import RayPool
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(
            f"--ray-replicas {config.ray_replicas} needs Ray: pip install 'lingbot-rt[ray]'", field="ray_replicas"
        ) from None
    from lingbot_rt.deploy.front import create_front

    return create_front(config, RayPool(config))


def _what_is_served(config: ServeConfig, engine: Any) -> str:
    if config.ray_replicas is not None:
        most = f" to {config.ray_max_replicas}" if config.ray_max_replicas else ""
        return f"{config.model_id} on Ray, {config.ray_replicas}{most} replicas"
    model_info = engine.model_info
    weights = ", random weights (--load-format dummy)" if model_info.load_format == "dummy" else ""
    return f"{model_info.model_id} on {model_info.device}, {model_info.dtype}{weights}"


def _end_now(why: str) -> NoReturn:
    complain(why)
    os._exit(0)


def show_banner(*lines: str) -> None:
    """Prints the lines on standard output. A server that is ready goes on when they cannot be shown."""
    try:
        say("\n".join(map(printable, lines)))
    except OutputFailed as error:
        log.warning("the server is ready, but its banner cannot be shown: %s", error)


def _is_worker_rank() -> bool:
    """Whether torchrun started this process as a rank other than 0."""
    return environment_value("MASTER_PORT") is not None and environment_value("RANK") not in (None, "0")


def shown_address(listeners: Sequence[socket.socket]) -> str:
    """``host:port`` to open from this machine. With --port 0 it has the port that was found."""
    listener = next((each for each in listeners if each.family == socket.AF_INET), listeners[0])
    host, port = listener.getsockname()[:2]
    return local_address(host, port)


def local_address(host: str, port: int) -> str:
    """``host:port`` to open from this machine for a server that listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{host}:{port}"


@contextmanager
def listening_sockets(config: ServeConfig) -> Iterator[list[socket.socket]]:
    """Takes the port before anything slow starts, so that a taken port fails at once. Raises ConfigError.

    A name may have several addresses, such as 127.0.0.1 and ::1 for localhost: the server listens on those that this
    machine has, all with one port.
    """
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "not the name of a host"
        host = config.host if len(config.host) <= MAX_QUOTED else quoted(config.host)
        raise ConfigError(f"--host {host}: {reason}", field="host") from None
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    for tries_left in reversed(range(_PORT_TRIES if config.port == 0 else 1)):
        with ExitStack() as stack:
            try:
                listeners = _bind_all(config, addresses, stack)
            except ConfigError as error:
                # A free port of the first address may be taken on the second one: look for another.
                if tries_left and error.field == "port":
                    continue
                raise
            yield listeners
            return


def _bind_all(config: ServeConfig, addresses: Sequence[tuple[int, tuple]], stack: ExitStack) -> list[socket.socket]:
    """One socket per address of this machine. ``stack`` closes them. Raises ConfigError."""
    listeners: list[socket.socket] = []
    port = config.port
    for family, address in addresses:
        try:
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            # Without this option the port stays taken for a minute after another server has closed it.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6 and len(addresses) > 1:
                with suppress(OSError):  # IPv4 has a socket of its own
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address[0], port, *address[2:]))
            # Two processes may bind one port with SO_REUSEADDR; only one may listen.
            listener.listen()
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise _bind_error(config, error) from None
            continue
        port = listener.getsockname()[1]
        listeners.append(listener)
    if not listeners:
        raise ConfigError(
            f"--host {config.host}: this machine has no such address; expected one of its own, or 0.0.0.0 for all",
            field="host",
        )
    return listeners


def _bind_error(config: ServeConfig, error: OSError) -> ConfigError:
    where = f"--port {config.port} on {config.host}: {reason_of(error)}"
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"{where}; choose another --port", field="port")
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(f"{where}; choose a --port from 1024 up", field="port")
    return ConfigError(f"--host {config.host}: {reason_of(error)}", field="host")

"""Engines with Ray Serve: one replica is one server with its engine and GPUs, and a front relays clients to them.

    lingbot-rt serve --ray-replicas 4                 the front is this process
    serve run lingbot_rt.deploy.ray:app               the front is a Serve deployment behind Serve's proxy

Serve starts the replicas, starts a lost one again, queues calls until a replica is free, and adds or removes replicas
by the number of calls. One call is one session: ``EngineReplica.hold`` gives the replica's address and returns when the
session is over. Frames do not pass through Serve with ``--ray-replicas``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from lingbot_rt.config import ServeConfig, parse_value
from lingbot_rt.config_sources import load_config
from lingbot_rt.config_values import environment_value
from lingbot_rt.deploy.front import create_front
from lingbot_rt.deploy.hold import POLL_S, held
from lingbot_rt.errors import ConfigError, EngineFailed, one_line, quoted
from lingbot_rt.session.plan import EngineStatus

log = logging.getLogger(__name__)

APP_NAME = "lingbot-rt"

ALONE = "127.0.0.1"
"""Where replicas listen whose front is on the same machine."""

ANY = "0.0.0.0"
"""Stands for the address of the replica's machine in its cluster. Nobody but the front should be able to reach it."""

FORGET_AFTER_S = 30.0
"""A replica that has not said for so long that it lives is no longer asked for metrics."""

DRAIN_LIMIT_S = 3600.0
"""How long a replica that is to go may finish its session."""

HEALTH_PERIOD_S = 5.0

_LOST = "the replica was lost before the session began; connect again"


class Directory:
    """Knows the addresses of the replicas: a busy replica takes no call that could ask it."""

    def __init__(self) -> None:
        self._seen_at: dict[str, float] = {}

    def lives(self, address: str) -> None:
        self._seen_at[address] = time.monotonic()

    def leaves(self, address: str) -> None:
        self._seen_at.pop(address, None)

    def addresses(self) -> list[str]:
        newest = time.monotonic() - FORGET_AFTER_S
        self._seen_at = {address: at for address, at in self._seen_at.items() if at >= newest}
        return sorted(self._seen_at)


class EngineReplica:
    """A complete server of this package in a thread, on a free port of its machine."""

    def __init__(self, config: ServeConfig, directory: Any) -> None:
        """Returns when the engine is ready: Serve then counts the replica as free. Raises LingbotError."""
        from lingbot_rt.engine.engine import Engine
        from lingbot_rt.server.app import Server, create_app

        self._directory = directory
        self._listener = socket.socket()
        host = config.host if config.host == ALONE else ray.util.get_node_ip_address()
        self._listener.bind((host, 0))
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._engine = Engine(config)
        app = create_app(config, self._engine)
        self._service = app.state.service
        self._server = Server(app, config)
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._thread.start()
        while not self._engine.status.ready:
            self.check_health()
            time.sleep(POLL_S)
        self.check_health()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            runner.run(self._server.serve(sockets=[self._listener]))

    async def hold(self) -> AsyncIterator[str]:
        """As ``held`` says."""
        async for address in held(self._service, self.address):
            yield address

    def check_health(self) -> None:
        """Serve calls it every few seconds. Raises when the server has ended: Serve then starts another replica."""
        failure = self._service.failure
        if failure is not None or not self._thread.is_alive():
            raise EngineFailed(f"the replica at {self.address} has ended: {failure or 'no reason is known'}")
        if self._engine.status.ready:
            self._directory.lives.remote(self.address)

    def __del__(self) -> None:
        """Serve calls it when the replica is to go."""
        if hasattr(self, "_thread"):
            self._directory.leaves.remote(self.address)
            self._server.should_exit = True
            self._thread.join(10)


class RayLease:
    """One call of ``EngineReplica.hold``."""

    def __init__(self, engines: Any) -> None:
        self._engines = engines
        self._call: Any = None

    async def acquire(self) -> str:
        self._call = self._engines.options(stream=True).hold.remote()
        try:
            return await anext(self._call)
        except (RayError, RayServeException, StopAsyncIteration) as error:
            log.error("no replica for a client: %s", one_line(error))
            raise EngineFailed(_LOST) from None

    async def release(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()


class HandlePool:
    """The replicas of a running application, by the handles of its deployments."""

    is_lost = False

    def __init__(self, engines: Any = None, directory: Any = None) -> None:
        self._engines = engines
        self._directory = directory
        self.status = EngineStatus("starting", detail="replicas")

    async def start(self) -> None:
        while not await self.addresses():  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        self.status = EngineStatus("ready")

    async def stop(self) -> None:
        self.status = EngineStatus("stopped")

    def lease(self) -> RayLease:
        return RayLease(self._engines)

    async def addresses(self) -> list[str]:
        try:
            return await self._directory.addresses.remote()
        except (RayError, RayServeException) as error:
            log.error("the replicas are not known: %s", one_line(error))
            return []


class RayPool(HandlePool):
    """Starts the replicas on the Ray cluster that RAY_ADDRESS names, else on one of this machine, and ends them."""

    def __init__(self, config: ServeConfig) -> None:
        super().__init__()
        self._config = config

    async def start(self) -> None:
        """Returns when a replica is ready. Raises EngineFailed when Ray or the replicas do not start."""
        try:
            await asyncio.to_thread(self._deploy)
        except (RayError, RayServeException, RuntimeError, ConnectionError, ValueError) as error:
            self.status = EngineStatus("failed", detail=one_line(error))
            raise EngineFailed(one_line(error)) from None
        await super().start()

    def _deploy(self) -> None:
        address = environment_value("RAY_ADDRESS")
        ray.init(address, logging_level="warning", **({"include_dashboard": False} if address is None else {}))
        serve.start(http_options={"location": "NoServer"})
        self._engines = serve.run(
            _engines(self._config, _directory(), host=ALONE if address is None else ANY),
            name=APP_NAME,
            route_prefix=None,
        )
        self._directory = serve.get_deployment_handle("Directory", APP_NAME)

    async def stop(self) -> None:
        await super().stop()
        if ray.is_initialized():
            with suppress(RayError, RayServeException):
                await asyncio.to_thread(serve.delete, APP_NAME, _blocking=False)
            await asyncio.to_thread(ray.shutdown)


def _directory() -> Any:
    return serve.deployment(Directory, ray_actor_options={"num_cpus": 0}).bind()


def _engines(config: ServeConfig, directory: Any, *, host: str) -> Any:
    """The deployment of the replicas. Ray must be connected: the cluster decides whether they are on GPUs."""
    on_gpu = config.device == "cuda" or (config.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    # All GPUs of an actor are of one machine, as the processes of one session need them.
    resources = {"num_gpus": config.num_gpus} if on_gpu else {"num_cpus": config.cpu_threads or 1}
    least = config.ray_replicas or 1
    options: dict[str, Any] = {"num_replicas": least}
    if config.ray_max_replicas is not None and config.ray_max_replicas > least:
        # One session per replica: a call that waits is a replica too few.
        scaling = {"min_replicas": least, "max_replicas": config.ray_max_replicas, "target_ongoing_requests": 1}
        options = {"autoscaling_config": scaling}
    deployment = serve.deployment(
        EngineReplica,
        ray_actor_options=resources,
        max_ongoing_requests=1,
        graceful_shutdown_timeout_s=DRAIN_LIMIT_S,
        health_check_period_s=HEALTH_PERIOD_S,
        **options,
    )
    inner = dataclasses.replace(  # of a server that the front alone calls: it has checked hosts and origins
        config,
        host=host,
        port=0,
        allowed_hosts="*",
        cors_allow_origins="*",
        ray_replicas=None,
        ray_max_replicas=None,
        resume_s=0.0,  # a client that comes back gets any free replica
    )
    return deployment.bind(inner, directory)


@serve.ingress()
class Ingress:
    """The front behind Serve's own proxy."""

    def __init__(self, config: ServeConfig, engines: Any, directory: Any) -> None:
        self._config = config
        self._pool = HandlePool(engines, directory)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_front(self._config, self._pool)


def app(arguments: dict[str, str]) -> Any:
    """For ``serve run lingbot_rt.deploy.ray:app ray_replicas=2``. Options come from the environment too.

    Raises ConfigError.
    """
    fields = {field.name: field for field in dataclasses.fields(ServeConfig)}
    unknown = sorted(set(arguments) - set(fields))
    if unknown:
        raise ConfigError(f"{quoted(unknown[0])}: no such option; expected one of {', '.join(sorted(fields))}")
    config = load_config({name: parse_value(fields[name], text, source=name) for name, text in arguments.items()})
    directory = _directory()
    front = serve.deployment(Ingress, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=config.max_connections)
    return front.bind(config, _engines(config, directory, host=ANY), directory)

"""How long a replica is held for one client of the front. No Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from lingbot_rt.server.service import OpenConnection, Service

POLL_S = 0.2
"""How often a replica looks whether its session is over."""

CLAIM_LIMIT_S = 15.0
"""How long a held replica waits for the front's connection. It then waits for its init, as every server does."""


async def held(service: Service, address: str) -> AsyncIterator[str]:
    """Gives ``address``, and ends when the session that comes there is over, or when none comes.

    Connections without a session hold nothing: whoever opens one and says nothing would keep the others out.
    """

    def playing() -> OpenConnection | None:
        # The server adds and removes connections in another thread meanwhile.
        return next((each for each in tuple(service.connections) if each.state is not None), None)

    await _until(lambda: playing() is None)  # the last session may still be closing
    over = service.sessions_over
    yield address
    came_by = time.monotonic() + CLAIM_LIMIT_S
    spoke_by = came_by + service.config.init_timeout_s

    def is_late() -> bool:
        return time.monotonic() >= (spoke_by if service.connections else came_by)

    # A session may come and go between two looks.
    await _until(lambda: playing() is not None or service.sessions_over > over or is_late())
    session = playing()
    if session is not None:
        await _until(session.gone.is_set)


async def _until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110  the server is in another thread
        await asyncio.sleep(POLL_S)

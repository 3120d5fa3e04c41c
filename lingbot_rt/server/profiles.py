"""``POST /debug/profile?chunks=N``: writes a profiler trace of the next chunks into --profile-dir."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import LingbotError, public_text, quoted, reason_of
from lingbot_rt.session.plan import EnginePort

log = logging.getLogger(__name__)

MAX_PROFILE_CHUNKS = 8
"""Chunks in one trace: of the 14B each has some ten thousand kernels."""

PROFILE_LIMIT_S = 60.0
"""How long a request waits for its chunks."""

KEPT_PROFILES = 8
"""Traces in the folder; older ones are deleted."""

_ENDING = ".trace.json.gz"


class Profiles:
    """The traces of one server. One is written at a time."""

    def __init__(self, config: ServeConfig, engine: EnginePort) -> None:
        self._config = config
        self._engine = engine
        self._is_busy = False

    async def take(self, chunks_text: str | None) -> dict[str, Any]:
        """The answer to one request. Raises HTTPException."""
        folder = self._folder()
        chunks = _chunks(chunks_text)
        if self._is_busy:
            raise HTTPException(409, "a profile is already being written: try again when that request is answered")
        if not self._engine.status.ready:
            raise HTTPException(503, f"the server is not ready: {public_text(str(self._engine.status))}")
        self._is_busy = True
        try:
            return await self._record(folder, chunks)
        except OSError as error:
            log.error("the profile cannot be written: %s", error)
            raise HTTPException(507, f"the profile cannot be written: {reason_of(error)}") from None
        except LingbotError as error:
            raise HTTPException(503, public_text(error.described)) from None
        finally:
            self._is_busy = False

    def _folder(self) -> Path:
        if self._config.api_key is None:
            raise HTTPException(403, "profiles are written only by a server with an API key (--api-key)")
        if self._config.profile_dir is None:
            raise HTTPException(403, "profiles are written only by a server with a folder for them (--profile-dir)")
        return Path(self._config.profile_dir)

    async def _record(self, folder: Path, chunks: int) -> dict[str, Any]:
        name = f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}{_ENDING}"
        part = folder / f"part-{name}"
        try:
            recorded = await self._engine.profile(chunks, part, PROFILE_LIMIT_S)
            if not recorded:
                raise HTTPException(
                    504, f"no chunk was generated within {PROFILE_LIMIT_S:g} s: ask again while a session plays"
                )
            size = await asyncio.to_thread(_keep, part, folder / name)
        finally:
            part.unlink(missing_ok=True)
        log.info("profile of %d chunks: %s", recorded, folder / name)
        return {"file": name, "chunks": recorded, "bytes": size}


def profile_routes(profiles: Profiles) -> APIRouter:
    routes = APIRouter()

    @routes.post("/debug/profile")
    async def profile(request: Request) -> dict[str, Any]:
        return await profiles.take(request.query_params.get("chunks"))

    return routes


def _chunks(text: str | None) -> int:
    if text is None:
        return 1
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= MAX_PROFILE_CHUNKS):
        raise HTTPException(400, f"chunks {quoted(text)}: expected 1 to {MAX_PROFILE_CHUNKS}")
    return int(text)


def _keep(part: Path, file: Path) -> int:
    """Gives the finished trace its name; its size in bytes.

    Deletes the oldest ones beyond KEPT_PROFILES, and what a server left that ended while it wrote.
    """
    part.rename(file)
    finished = sorted(file.parent.glob(f"[0-9]*{_ENDING}"))
    for old in (*finished[:-KEPT_PROFILES], *file.parent.glob(f"part-*{_ENDING}")):
        with suppress(OSError):
            old.unlink()
    return file.stat().st_size

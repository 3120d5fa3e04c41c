"""``--park-dir``: one file per session, named by the digest of its token. Only the server's user can read them."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from lingbot_rt.errors import reason_of

log = logging.getLogger(__name__)

_ENDING = ".world"
_NAME = re.compile(r"[0-9a-f]{64}\.world")


class ParkFolder:
    """The files of parked sessions. Methods that touch the disk raise no OSError: what fails is logged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def found(self) -> list[str]:
        """The digests of the sessions that an earlier server left; deletes what it did not finish to write."""
        digests = []
        try:
            for path in sorted(self._folder.iterdir()):
                if _NAME.fullmatch(path.name):
                    digests.append(path.name.removesuffix(_ENDING))
                elif path.name.endswith(f"{_ENDING}.part"):
                    path.unlink()
        except OSError as error:
            log.error("--park-dir %s: %s", self._folder, reason_of(error))
        return digests

    def write(self, digest: str, data: bytes) -> bool:
        """Whether it is there now, whole. An older file of the session stays if it is not."""
        path = self._path(digest)
        part = path.with_suffix(f"{_ENDING}.part")
        try:
            with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(data)
            part.replace(path)
        except OSError as error:
            log.error("a session cannot be written to --park-dir %s: %s", self._folder, reason_of(error))
            self._delete(part)
            return False
        return True

    def read(self, digest: str) -> bytes | None:
        try:
            return self._path(digest).read_bytes()
        except OSError as error:
            log.error("a session cannot be read from --park-dir %s: %s", self._folder, reason_of(error))
            return None

    def delete(self, digest: str) -> None:
        self._delete(self._path(digest))

    def _delete(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.error("--park-dir %s: %s", self._folder, reason_of(error))

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}{_ENDING}"

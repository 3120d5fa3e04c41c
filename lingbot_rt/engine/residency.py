"""Which sessions are on the device. One that computes has to be there; others may give up their room for it."""

from __future__ import annotations

from collections.abc import Callable

Move = Callable[[str, bool], None]
"""Moves what a session holds to the host's memory if True, back to the device if False."""


class Residency:
    """Used on the engine thread alone, where one session computes at a time."""

    def __init__(self, move: Move) -> None:
        self._move = move
        self._on_device: list[str] = []  # in the order of their newest use
        self._on_host: set[str] = set()
        self._parked: set[str] = set()

    @property
    def on_host(self) -> frozenset[str]:
        return frozenset(self._on_host)

    def opened(self, session_id: str) -> None:
        self._on_device.append(session_id)

    def closed(self, session_id: str) -> None:
        self._on_host.discard(session_id)
        self._parked.discard(session_id)
        if session_id in self._on_device:
            self._on_device.remove(session_id)

    def parked(self, session_id: str) -> None:
        """It does not compute for a while."""
        self._parked.add(session_id)

    def use(self, session_id: str, fits: Callable[[], bool]) -> None:
        """The session computes now. ``fits()``: whether the device has room for it, should it be elsewhere."""
        self._parked.discard(session_id)
        if session_id in self._on_host:
            self.make_room(fits)
            self._on_host.remove(session_id)
            self._move(session_id, False)
        else:
            self._on_device.remove(session_id)
        self._on_device.append(session_id)

    def make_room(self, fits: Callable[[], bool]) -> None:
        """Moves sessions off the device until ``fits()``, or until none is left there.

        Parked ones go first. Of those that take turns the newest goes: its next turn is the farthest away.
        """
        while self._on_device and not fits():
            parked = [each for each in self._on_device if each in self._parked]
            session_id = parked[0] if parked else self._on_device[-1]
            self._move(session_id, True)
            self._on_device.remove(session_id)
            self._on_host.add(session_id)

"""A queue of length one between two halves of a loop: the next item is made while the last one is used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """``async with Prefetch(source) as items: async for item in items`` runs ``source`` one item ahead of its user.

    The next item is begun when the one before is taken, never earlier. What ``source`` raises is raised in its place,
    after the items that came before it. Leaving the block stops ``source``.
    """

    def __init__(self, source: AsyncGenerator[Item, None]) -> None:
        self._source = source
        self._next: asyncio.Task[Item | None] | None = None

    async def __aenter__(self) -> Prefetch[Item]:
        self._next = asyncio.create_task(self._make())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._next is not None
        self._next.cancel()
        await asyncio.wait({self._next})
        if not self._next.cancelled():
            self._next.exception()  # nobody asked for the item any more, nor for what went wrong with it
        await self._source.aclose()

    def __aiter__(self) -> Prefetch[Item]:
        return self

    async def __anext__(self) -> Item:
        assert self._next is not None
        item = await self._next
        if item is None:
            raise StopAsyncIteration
        self._next = asyncio.create_task(self._make())
        return item

    async def _make(self) -> Item | None:
        """The next item; None at the end."""
        return await anext(self._source, None)

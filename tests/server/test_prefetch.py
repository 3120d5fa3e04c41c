"""One item ahead, no more and no less, and nothing left behind."""

from __future__ import annotations

import asyncio

import pytest

from lingbot_rt.server.stream import Prefetch


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_source_runs_one_item_ahead():
    """The next item is made while the last one is used; the one after that is not begun."""
    made, used = [], []

    async def source():
        for number in range(4):
            made.append(number)
            yield number

    async with Prefetch(source()) as items:
        await settle()
        assert made == [0]
        async for item in items:
            used.append(item)
            await settle()
            assert made == list(range(min(item + 2, 4)))
    assert used == [0, 1, 2, 3]


async def test_an_error_comes_after_the_items_before_it():
    """What the source raises is raised in the place of the item that failed."""
    used = []

    async def source():
        yield 0
        raise ValueError("broke")

    with pytest.raises(ValueError, match="broke"):
        async with Prefetch(source()) as items:
            async for item in items:
                used.append(item)
                await settle()
    assert used == [0]


@pytest.mark.parametrize("cancelled_while", ["using an item", "waiting for one"])
async def test_leaving_early_stops_the_source(cancelled_while):
    """A cancelled user leaves neither a task nor an open source, whatever either was doing."""
    ended, before = [], len(asyncio.all_tasks())

    async def source():
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def use() -> None:
        async with Prefetch(source()) as items:
            async for _ in items:
                if cancelled_while == "using an item":
                    await asyncio.Event().wait()

    using = asyncio.create_task(use())
    await settle()
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using
    assert ended == [True]
    assert len(asyncio.all_tasks()) == before


async def test_an_error_that_nobody_waits_for_is_dropped(caplog):
    """A source that breaks ahead of a user that leaves is no unhandled error."""

    async def source():
        yield 0
        raise ValueError("broke")

    async with Prefetch(source()) as items:
        async for _ in items:
            await settle()
            break
    assert caplog.records == []

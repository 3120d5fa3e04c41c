"""The pool of daemon threads that first frames are read in."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

import pytest

from lingbot_rt.server.daemon_pool import DaemonPool


async def test_results_and_errors_come_back():
    """A call's result or error is that of ``run``; an error does not cost the thread."""
    pool = DaemonPool(1, "test")
    with pytest.raises(ZeroDivisionError):
        await pool.run(lambda: 1 // 0)
    assert await pool.run(lambda: 7) == 7


async def test_at_most_so_many_run_and_the_cancelled_never_do():
    """Calls wait in line for a thread. One that is cancelled in line is not run."""
    pool, release, ran = DaemonPool(2, "test"), threading.Event(), []
    at_work = [0]
    lock = threading.Lock()

    def work(name: int) -> int:
        with lock:
            at_work.append(at_work[-1] + 1)
        release.wait()
        with lock:
            at_work.append(at_work[-1] - 1)
            ran.append(name)
        return name

    tasks = [asyncio.create_task(pool.run(lambda name=name: work(name))) for name in range(6)]
    await asyncio.sleep(0)
    tasks[5].cancel()
    with suppress(asyncio.CancelledError):
        await tasks[5]
    release.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[:5] == [0, 1, 2, 3, 4]
    assert isinstance(results[5], asyncio.CancelledError)
    assert sorted(ran) == [0, 1, 2, 3, 4]
    assert max(at_work) <= 2


async def test_a_cancelled_call_lets_go_of_what_it_holds():
    """Clients that leave while their pictures wait for a busy thread cost no memory, however many come."""
    pool, release = DaemonPool(1, "test"), threading.Event()
    at_work = asyncio.create_task(pool.run(release.wait))
    await asyncio.sleep(0)

    class Picture:
        pass

    picture = Picture()
    gone = weakref.ref(picture)
    waits = asyncio.create_task(pool.run(functools.partial(id, picture)))
    del picture
    await asyncio.sleep(0)
    waits.cancel()
    await asyncio.wait({waits})
    del waits
    assert gone() is None
    release.set()
    assert await at_work
    assert await pool.run(lambda: 7) == 7


def test_a_call_that_hangs_does_not_delay_the_end_of_the_process():
    """The interpreter exits although a thread of the pool still waits."""
    code = (
        "import threading\n"
        "from lingbot_rt.server.daemon_pool import DaemonPool\n"
        "begun = threading.Event()\n"
        "DaemonPool(1, 'test').submit(lambda: (begun.set(), threading.Event().wait()))\n"
        "begun.wait()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)

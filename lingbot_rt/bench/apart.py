"""A measurement in a process of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import ParamSpec, TypeVar

from lingbot_rt.errors import EngineFailed

Params = ParamSpec("Params")
Result = TypeVar("Result")


def in_a_process(function: Callable[Params, Result], *args: Params.args, **options: Params.kwargs) -> Result:
    """``function`` of these arguments in a new process, which ends with this one.

    A process connects its GPU's memory with that of other ranks once (``peer_memory``). Raises what the function
    raises, EngineFailed if the process dies.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_end_with_parent) as process:
            return process.submit(function, *args, **options).result()
    except BrokenProcessPool:
        raise EngineFailed("the process that measures has died") from None


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its child, which would keep the GPUs."""
    parent = parent_process()
    assert parent is not None, "called in the new process"
    threading.Thread(target=_await_end, args=(parent.sentinel,), daemon=True).start()


def _await_end(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)

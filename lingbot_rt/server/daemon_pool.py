"""A small pool of daemon threads: work that hangs in one of them does not delay the end of the process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class DaemonPool(Executor):
    """Runs at most ``threads`` calls at a time, in the order in which they came.

    The threads start with the first calls. A call that is cancelled while it waits is never run, and what it holds is
    let go at once: clients may come with large pictures and leave faster than a thread is free.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], list[Callable[[], Any]]]] = SimpleQueue()
        self._threads_left = threads
        self._name = name
        self._lock = threading.Lock()

    def submit(self, call: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        waiting: list[Callable[[], Any]] = [lambda: call(*args, **options)]
        future.add_done_callback(lambda _: waiting.clear())
        self._calls.put((future, waiting))
        with self._lock:
            if self._threads_left:
                self._threads_left -= 1
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
        return future

    async def run(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self, call)

    def _work(self) -> None:
        while True:
            self._run(*self._calls.get())

    @staticmethod
    def _run(future: Future[Any], waiting: list[Callable[[], Any]]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = waiting.pop()()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

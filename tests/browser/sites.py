"""The page without its server: files over HTTP, and made-up servers whose answers a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WEBUI = Path(__file__).parents[2] / "webui"


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def static_page() -> Iterator[str]:
    """The page as any static server delivers it. Yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(WEBUI))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


class FakeApi:
    """Answers ``BASE/v1/models`` inside the browser. ``is_up`` and ``key`` may change at any time."""

    def __init__(self, page: Any, base: str, *, key: str | None = None) -> None:
        self.is_up = True
        self.key = key
        self.model: dict[str, Any] = {"device": "cpu", "sizes": ["160x96", "832x480"], "default_size": "160x96"}
        self.asked: list[dict[str, str]] = []  # the headers of each request
        page.route(f"{base}/v1/models", self._answer)

    def _answer(self, route: Any) -> None:
        self.asked.append(route.request.headers)
        if not self.is_up:
            route.abort("connectionrefused")
            return
        refused = self.key is not None and route.request.headers.get("authorization") != f"Bearer {self.key}"
        body = {"error": {"message": "a key is needed"}} if refused else {"data": [{"id": "a-world", **self.model}]}
        route.fulfill(
            status=401 if refused else 200,
            body=json.dumps(body),
            headers={"Content-Type": "application/json", "Access-Control-Allow-Origin": "*"},
        )

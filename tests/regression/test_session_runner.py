"""Scripted sessions on a server mean the same as in this process."""

from __future__ import annotations

from typing import Any

import pytest

from lingbot_rt.errors import ConnectFailed
from lingbot_rt.regression import session_runner


@pytest.mark.parametrize(("fields", "size"), [({}, "832x480"), ({"size": "64x64"}, "64x64")])
async def test_the_size_of_a_case_is_never_the_servers(fields, size, monkeypatch):
    """An init without a size means the wire's default, as it does for an engine in this process."""
    sent: list[dict[str, Any]] = []

    def connect(url: str, **init: Any) -> None:
        sent.append(init)
        raise ConnectFailed("stopped by the test", reconnectable=False)

    monkeypatch.setattr(session_runner, "connect", connect)
    monkeypatch.setattr(session_runner, "fetch_model_info", lambda url, key: {})
    init = session_runner.scripted_init({"prompt": "A street.", "first_frame": b"picture"} | fields, [], 2)
    with pytest.raises(ConnectFailed, match="stopped"):
        async for _ in session_runner.ServerRunner("http://127.0.0.1:1").run(init):
            pass
    assert sent[0]["size"] == size


def test_a_case_never_takes_the_servers_window():
    """The interactive window is off unless a case asks for it, whatever the server's own setting."""
    for fields, expected in (({}, False), ({"interactive_kv_window": True}, True)):
        assert session_runner.scripted_init(fields, [], 1)["interactive_kv_window"] == expected

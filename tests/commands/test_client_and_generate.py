"""``client`` and ``generate`` on the tiny golden model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lingbot_rt.cli import main
from tests.e2e.served import Server, running

SESSION = ["--size", "64x64", "--keys", "w*4,a*2", "--seed", "7"]


@pytest.fixture(scope="module")
def model(golden) -> list[str]:
    return ["--model-path", str(golden("e2e/model")), "--device", "cpu", "--warmup", "false"]


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with running(tmp_path_factory.mktemp("serve"), *model) as it:
        yield it


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]


def test_client_and_generate_give_the_same_frames(server: Server, model, tmp_path, capsys):
    """A session with raw frames on a server and one without a server give the same 21 frames."""
    assert main(["client", "--url", server.http, *SESSION, "--format", "raw", "--out", str(tmp_path / "client")]) == 0
    summary = capsys.readouterr().out
    assert "21 frames in 2 chunks" in summary
    assert "overhead" in summary
    assert main(["generate", *model, *SESSION, "--out", str(tmp_path / "generate")]) == 0
    live, offline = pictures(tmp_path / "client"), pictures(tmp_path / "generate")
    assert len(live) == 21
    np.testing.assert_array_equal(np.stack(live), np.stack(offline))


@pytest.mark.parametrize("kind", ["delta-gzip", "webp", "jpeg"])
def test_a_live_session_measures_key_to_frame(server: Server, kind, capsys):
    """Keys pressed during the session come back in frames, in every other transport."""
    assert main(["client", "--url", server.ws, *SESSION, "--chunks", "4", "--format", kind, "--live"]) == 0
    summary = capsys.readouterr().out
    assert "45 frames in 4 chunks" in summary
    assert "key to frame" in summary


def test_a_refused_init_is_one_line_and_code_2(server: Server, capsys):
    """The client prints the server's message."""
    assert main(["client", "--url", server.http, "--size", "65x64"]) == 2
    assert "nearest valid 64x64" in capsys.readouterr().err

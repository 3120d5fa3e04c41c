"""``client`` and ``generate`` on the tiny golden model."""

from __future__ import annotations

import itertools
import math
import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lingbot_rt.cli import main
from lingbot_rt.client import connect, poses_payload
from lingbot_rt.session.camera_path import CameraPath
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
    generated = capsys.readouterr().out
    assert "21 frames in 2 chunks" in generated
    assert re.search(r"steady rate +\d+\.\d frames/s", generated)
    assert generated.splitlines()[-1] == f"{tmp_path / 'generate'}: 21 frames of 64x64 at 16 frames/s"
    live, offline = pictures(tmp_path / "client"), pictures(tmp_path / "generate")
    assert len(live) == 21
    np.testing.assert_array_equal(np.stack(live), np.stack(offline))


def test_a_path_made_by_keys_gives_the_frames_of_the_keys(server: Server, model, tmp_path, capsys):
    """A folder of poses, one per pixel frame, in ``generate`` and in ``client``: bit for bit the walk of the keys.

    With intrinsics that are not the model's own the frames are others.
    """
    path, poses = CameraPath(), np.tile(np.eye(4), (22, 1, 1))
    for latent, key in enumerate("wwwwaa"):
        path.extend(((key,),))
        poses[4 * latent :] = path.pose
    (tmp_path / "example").mkdir()
    np.save(tmp_path / "example" / "poses.npy", poses)
    size, followed = ["--size", "64x64", "--seed", "7"], ["--poses", str(tmp_path / "example")]
    assert main(["generate", *model, *SESSION, "--out", str(tmp_path / "keys")]) == 0
    assert main(["generate", *model, *size, *followed, "--out", str(tmp_path / "poses")]) == 0
    assert "21 frames in 2 chunks" in capsys.readouterr().out
    live = ["client", "--url", server.http, "--format", "raw", *size, *followed]
    assert main([*live, "--out", str(tmp_path / "live")]) == 0
    np.save(tmp_path / "example" / "intrinsics.npy", np.tile([300.0, 300, 416, 240], (22, 1)))
    assert main([*live, "--out", str(tmp_path / "lens")]) == 0
    frames = {name: np.stack(pictures(tmp_path / name)) for name in ("keys", "poses", "live", "lens")}
    np.testing.assert_array_equal(frames["keys"], frames["poses"])
    np.testing.assert_array_equal(frames["keys"], frames["live"])
    assert not np.array_equal(frames["keys"], frames["lens"])


def test_the_client_follows_a_path_in_mid_session(server: Server):
    """Held keys, then ``follow``, then keys: the frames are those of the same walk by keys alone."""
    walks = []
    for follows in (False, True):
        path = CameraPath()
        path.extend((("w",),) * 6)
        poses = []
        for _ in range(3):
            path.extend((("l",),))
            poses.append(path.pose)
        with connect(
            server.http,
            prompt="A street.",
            size="64x64",
            max_chunks=4,
            realtime_output_format="raw",
            protocol_extensions=["pinned_events"],
            pinned_events=[
                {"chunk": 0, "kind": "camera_actions", "payload": [["w"]] * 6},
                {
                    "chunk": 2,
                    "kind": "camera_poses" if follows else "camera_actions",
                    "payload": poses_payload(poses, every=1, anchor="session") if follows else [["l"]] * 3,
                },
                {"chunk": 3, "kind": "camera_actions", "payload": [["w", "i"]] * 3},
            ],
        ) as world:
            walks.append(np.stack([frame.pixels for frame in world]))
    assert len(walks[0]) == 45
    np.testing.assert_array_equal(*walks)


@pytest.mark.parametrize("kind", ["delta-gzip", "webp", "jpeg"])
def test_a_live_session_measures_key_to_frame(server: Server, kind, capsys):
    """Keys pressed during the session come back in frames, in every other transport."""
    # Without pacing all chunks may be planned before the key comes.
    paced = ["--fps", "60", "--init", "realtime_output_pacing=true"]
    assert main(["client", "--url", server.ws, *SESSION, *paced, "--chunks", "4", "--format", kind, "--live"]) == 0
    summary = capsys.readouterr().out
    assert "45 frames in 4 chunks" in summary
    assert "key to frame" in summary


def test_a_refused_init_is_one_line_and_code_2(server: Server, capsys):
    """The client prints the server's message, or its own where it can tell without asking."""
    assert main(["client", "--url", server.http, "--size", "65x64"]) == 2
    assert "nearest valid 64x64" in capsys.readouterr().err
    assert main(["client", "--url", server.http, "--size", "64x64", "--init", "model=other"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model: 'other' is not served here" in line


def test_the_address_of_the_http_api_and_a_proxy_variable(server: Server, capsys, monkeypatch):
    """A URL that ends in /v1 reaches the session, and a proxy variable does not concern this machine."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert main(["client", "--url", f"{server.http}/v1", "--keys", "w", "--size", "64x64"]) == 0
    assert "9 frames in 1 chunk\n" in capsys.readouterr().out
    assert main(["client", "--url", server.http, "--keys", "w", "--size", "64x64"]) == 0
    assert "9 frames in 1 chunk\n" in capsys.readouterr().out


def test_a_second_walk_into_the_same_folder(server: Server, tmp_path, capsys):
    """It is refused before it begins, and the first walk stays; --overwrite puts the second one in its place."""
    words = ["client", "--url", server.http, "--size", "64x64", "--out", str(tmp_path)]
    assert main([*words, "--keys", "-*2,w*7"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}: 33 frames of 64x64 at 16 frames/s"
    assert main([*words, "--keys", "w"]) == 2
    assert "--out" in capsys.readouterr().err
    assert len(pictures(tmp_path)) == 33
    assert main([*words, "--keys", "w", "--overwrite"]) == 0
    assert len(pictures(tmp_path)) == 9


def test_no_share_of_a_chunk_is_negative(server: Server, capsys):
    """The parts of a chunk add up to it, or the line says that they overlap."""
    with connect(server.http, prompt="A street.", size="64x64", max_chunks=4) as world:
        for _ in world:
            pass
    assert len(world.stats) == 4
    assert all(chunk.overhead_ms is not None and chunk.overhead_ms >= 0 for chunk in world.stats)
    assert main(["client", "--url", server.http, "--keys", "w", "--size", "64x64"]) == 0
    out = capsys.readouterr().out
    total, dit, vae, overhead = (
        int(re.search(rf"{name} +(-?\d+) ms", out)[1]) for name in ("p50", "DiT", "VAE", "overhead")
    )
    assert overhead >= 0
    assert "overlap" in out or dit + vae + overhead == total


@contextmanager
def breaking_line(port: int, limits: Iterator[int]) -> Iterator[str]:
    """A relay to ``port`` whose WebSocket connections break after so many bytes from the server. Yields its address."""

    def pump(source: socket.socket, target: socket.socket, limit: float) -> None:
        with suppress(OSError):
            while limit > 0 and (data := source.recv(min(65536, int(min(limit, 65536))))):
                limit -= len(data)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            head = self.request.recv(65536)
            limit = next(limits) if b"Upgrade: websocket" in head else math.inf
            with socket.create_connection(("127.0.0.1", port)) as upstream:
                upstream.sendall(head)
                up = threading.Thread(target=pump, args=(self.request, upstream, math.inf))
                up.start()
                pump(upstream, self.request, limit)
                up.join()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Relay) as relay:
        thread = threading.Thread(target=relay.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{relay.server_address[1]}"
        finally:
            relay.shutdown()
            thread.join()


@pytest.mark.parametrize("kind", ["raw", "delta-gzip"])
def test_a_line_that_breaks_again_and_again_costs_no_frame(server: Server, kind):
    """The frames are those of a line that holds: none is missing, none comes twice, and each is the same."""
    init = {
        "prompt": "A street.",
        "size": "64x64",
        "max_chunks": 4,
        "realtime_output_format": kind,
        "fps": 60,
        "realtime_output_pacing": True,  # else more than the chunks that are kept may be lost with a line
        "script": [["w"]] * 9,
    }
    with connect(server.http, **init) as world:
        whole = [(frame.chunk_index, frame.pixels) for frame in world]
    limits = itertools.chain([3_000, 25_000, 60_000, 90_000, 130_000], itertools.repeat(10**9))
    with breaking_line(server.port, limits) as url, connect(url, **init) as world:
        broken = [(frame.chunk_index, frame.pixels) for frame in world]
        assert len(world.resumes) >= 3
        assert all(place.exact for place in world.resumes)
    assert [chunk for chunk, _ in broken] == [chunk for chunk, _ in whole]
    np.testing.assert_array_equal(*(np.stack([pixels for _, pixels in frames]) for frames in (broken, whole)))


def test_a_walk_goes_on_from_a_saved_world(server: Server, model, tmp_path, capsys):
    """``client --save`` has the frames up to the world that it saves. From there ``client --resume`` and
    ``generate --from`` walk on alike, with the prompt and the keys of the second walk.
    """
    world = str(tmp_path / "world.safetensors")
    live = ["client", "--url", server.http, "--format", "raw"]
    first = tmp_path / "first"
    assert main([*live, *SESSION, "--out", str(first), "--save", world]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    (chunk,) = re.findall(rf"^{re.escape(world)}: the world before chunk (\d+)$", said)
    assert int(chunk) >= 2
    assert len(pictures(first)) == 9 + 12 * (int(chunk) - 1)
    further = ["--keys", "l*6", "--prompt", "Heavy rain."]
    assert main([*live, "--resume", world, *further, "--out", str(tmp_path / "client")]) == 0
    assert "24 frames in 2 chunks" in capsys.readouterr().out
    assert main(["generate", *model, "--from", world, *further, "--out", str(tmp_path / "generate")]) == 0
    assert "24 frames in 2 chunks" in capsys.readouterr().out
    frames = [np.stack(pictures(tmp_path / name)) for name in ("client", "generate")]
    np.testing.assert_array_equal(*frames)
    assert main(["generate", *model, "--from", world, "--keys", "-*6", "--out", str(tmp_path / "still")]) == 0
    assert not np.array_equal(frames[0], np.stack(pictures(tmp_path / "still")))


def test_a_world_that_cannot_go_on(server: Server, model, tmp_path, capsys):
    """One line names the option and what is expected, before a server or an engine is asked."""
    file = tmp_path / "no-world"
    file.write_bytes(b"no world")
    cases = [
        (["client", "--resume", str(file)], f"--resume '{file}': the snapshot cannot be read"),
        (["client", "--resume", "nothing-here"], "'nothing-here': there is no such file, expected a saved world"),
        (["client", "--resume", "t" * 43, "--seed", "3"], "--seed: expected nothing beside --resume"),
        (["client", "--resume", "t" * 43, "--init", "fps=3"], "--init fps: expected none beside --resume"),
        (["client", "--save", str(tmp_path / "no" / "folder")], "there is no folder"),
        (["generate", *model, "--from", str(file)], f"--from '{file}': the snapshot cannot be read"),
        (["generate", *model, "--from", str(tmp_path / "missing")], "No such file"),
        (["generate", *model, "--from", str(file), "--size", "64x64"], "--size: expected nothing beside --from"),
    ]
    for words, expected in cases:
        server_words = ["--url", "http://127.0.0.1:1"] if words[0] == "client" else []
        try:
            code = main([words[0], *server_words, *words[1:]])
        except SystemExit as end:  # argparse
            code = end.code
        assert code == 2
        assert expected in capsys.readouterr().err
    assert main(["client", "--url", server.http, "--resume", "t" * 43]) == 2
    assert "resume" in capsys.readouterr().err

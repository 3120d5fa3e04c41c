"""PostProcessor: frames across calls, both steps together, timings and memory."""

from __future__ import annotations

import pickle

import pytest
import torch

from lingbot_rt.errors import CheckpointError
from lingbot_rt.postprocess import loader
from lingbot_rt.postprocess.stage import PostprocessNetworks, PostProcessor
from lingbot_rt.session.plan import PostprocessPlan
from lingbot_rt.shapes import FrameSize

SIZE = FrameSize(48, 32)
CPU = torch.device("cpu")
BOTH = PostprocessPlan(upscaling_scale=2, interpolation_exp=1)


@pytest.fixture
def stage(upscaler, interpolator):
    """``stage(plan)`` -> a session's processor on the shipped networks."""

    def make(plan: PostprocessPlan) -> PostProcessor:
        return PostProcessor(
            plan, SIZE, upscaler if plan.upscales else None, interpolator if plan.interpolates else None
        )

    return make


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and int((a.int() - b.int()).abs().max()) <= 1


@pytest.mark.parametrize("exp", [1, 2])
def test_interpolation_goes_on_across_calls(stage, panning, exp):
    """Calls of 1, 4, 4 and 2 frames give what one call gives: the first of each pairs with the last before it."""
    frames = panning(11, SIZE.height, SIZE.width, step=2)
    plan = PostprocessPlan(interpolation_exp=exp)
    whole = stage(plan).process(frames)
    in_parts = stage(plan)
    parts = []
    for part in frames.split([1, 4, 4, 2]):
        expected = plan.frames_out(len(part), first=not parts)
        parts.append(in_parts.process(part))
        assert len(parts[-1]) == expected
    assert len(whole) == 2**exp * 10 + 1
    assert close(torch.cat(parts), whole)
    assert torch.equal(whole[:: 2**exp], frames)


def test_the_callers_memory_may_be_written_again(stage, panning):
    """What a call remembers is its own: frames overwritten after the call change nothing."""
    frames = panning(4, SIZE.height, SIZE.width, step=2)
    plan = PostprocessPlan(interpolation_exp=1)
    expected = stage(plan).process(frames)
    reused = stage(plan)
    buffer = frames[:2].clone()
    reused.process(buffer)
    buffer.copy_(frames[2:])
    assert close(reused.process(buffer), expected[3:])


def test_both_together(stage, upscaler, panning):
    """Frames between are made first, then every frame is enlarged: 3 become 5, twice as large."""
    frames = panning(3, SIZE.height, SIZE.width, step=2)
    both = stage(BOTH)
    out = both.process(frames)
    assert both.size_out == FrameSize(96, 64)
    assert out.shape == (5, 64, 96, 3)
    assert torch.equal(out, upscaler(stage(PostprocessPlan(interpolation_exp=1)).process(frames), 2))


def test_nothing_asked_nothing_done(stage, panning):
    """With the default plan frames pass as they are, and no time is reported."""
    frames = panning(2, SIZE.height, SIZE.width, step=2)
    idle = stage(PostprocessPlan())
    assert idle.process(frames) is frames
    assert idle.take_timings() == {}
    assert idle.memory_bytes() == 0


def test_sessions_do_not_share_frames(stage, panning):
    """Two sessions on the same networks, in turn, give what each gives alone."""
    frames = panning(6, SIZE.height, SIZE.width, step=2)
    plan = PostprocessPlan(interpolation_exp=1)
    a, b = stage(plan), stage(plan)
    turns = [a.process(frames[:2]), b.process(frames[3:5]), a.process(frames[2:3]), b.process(frames[5:])]
    assert close(torch.cat(turns[0::2]), stage(plan).process(frames[:3]))
    assert close(torch.cat(turns[1::2]), stage(plan).process(frames[3:]))


def test_timings_are_taken_once(stage, panning):
    """Both steps report their milliseconds, summed over the calls since they were last asked for."""
    both = stage(BOTH)
    for part in panning(3, SIZE.height, SIZE.width, step=2).split(1):
        both.process(part)
    spent = both.take_timings()
    assert spent.keys() == {"interpolate_ms", "upscale_ms"}
    assert all(ms > 0 for ms in spent.values())
    assert both.take_timings() == {}


def test_an_empty_call_changes_nothing(stage, panning):
    """No frames in, none out, and the next frame is still the first."""
    both = stage(BOTH)
    assert both.process(panning(1, SIZE.height, SIZE.width, step=2)[:0]).shape == (0, 64, 96, 3)
    assert len(both.process(panning(2, SIZE.height, SIZE.width, step=2))) == 3


def test_networks_are_loaded_once(tmp_path):
    """Sessions share the networks of a file; a file that is none is an error of the session that asked."""
    networks = PostprocessNetworks(CPU)
    assert not networks.loaded(BOTH)
    networks.open(BOTH, SIZE)
    assert networks.loaded(BOTH)
    assert networks.loaded(PostprocessPlan(upscaling_scale=4))
    (tmp_path / "net.pth").write_bytes(b"nothing")
    broken = PostprocessPlan(upscaling_scale=2, upscaling_model=tmp_path / "net.pth")
    assert not networks.loaded(broken)
    with pytest.raises(CheckpointError):
        networks.open(broken, SIZE)


PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 37\n"


@pytest.mark.parametrize("content", [PNG, POINTER, b"", b"<html>Sign in</html>", pickle.dumps({"a": 1})])
@pytest.mark.parametrize(
    ("kind", "field", "expected"),
    [
        ("upscaling", "upscaling_model_path", "Real-ESRGAN"),
        ("interpolation", "frame_interpolation_model_path", "RIFE"),
    ],
)
def test_a_file_that_is_no_network(tmp_path, caplog, content, kind, field, expected):
    """The client reads its own name of the file and what is expected. The path and the reason are in the log."""
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "x.pth"
    path.write_bytes(content)
    switch = {"upscaling": {"upscaling_scale": 2}, "interpolation": {"interpolation_exp": 1}}[kind]
    named = {f"{kind}_model": path, f"{kind}_given": "deep/../deep/x.pth"}
    with pytest.raises(CheckpointError) as refused:
        PostprocessNetworks(CPU).open(PostprocessPlan(**switch, **named), SIZE)
    message = str(refused.value)
    assert refused.value.field == field
    assert "deep/../deep/x.pth" in message
    assert expected in message
    assert message.isprintable()
    assert str(tmp_path) not in message
    assert "weights_only" not in message
    assert str(path) in caplog.text


def test_the_shipped_network_is_missing(tmp_path, monkeypatch, caplog):
    """A client hears which command helps. The log, and an operator who warms it up, get the path too."""
    monkeypatch.setattr(loader, "WEIGHTS", tmp_path)
    monkeypatch.setattr(loader, "SHIPPED_INTERPOLATOR", tmp_path / "rife.safetensors")
    plan = PostprocessPlan(interpolation_exp=1)
    with pytest.raises(CheckpointError, match="run scripts/fetch_models") as refused:
        PostprocessNetworks(CPU).open(plan, SIZE)
    assert refused.value.field == "enable_frame_interpolation"
    assert str(tmp_path) not in str(refused.value)
    assert str(tmp_path / "rife.safetensors") in caplog.text
    with pytest.raises(CheckpointError, match=str(tmp_path / "rife.safetensors")):
        PostprocessNetworks(CPU).warm_up(plan, SIZE)


def test_memory_counts_the_larger_step(stage):
    """What is planned for both is at least what either takes, and holds the enlarged frames."""
    planned = stage(BOTH).memory_bytes()
    assert planned >= stage(PostprocessPlan(interpolation_exp=1)).memory_bytes()
    assert planned >= stage(PostprocessPlan(upscaling_scale=2)).memory_bytes()
    assert planned > 8 * FrameSize(96, 64).bytes_per_frame

"""What a session asks of postprocessing: frame counts, sizes and the paths of models."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import InvalidInit
from lingbot_rt.session.messages import Init
from lingbot_rt.session.plan import ModelInfo, PostprocessPlan
from lingbot_rt.session.settings import client_model_path, resolve
from lingbot_rt.shapes import FrameSize

FIELD = "upscaling_model_path"
MODEL = ModelInfo(
    model_id="world",
    model_path="world",
    default_size=FrameSize(64, 64),
    latent_frames=3,
    sink_frames=3,
    window_frames=9,
    num_steps=4,
    device="cpu",
    dtype="float32",
)


@given(exp=st.integers(0, 3), calls=st.lists(st.integers(0, 12), max_size=6))
def test_counts_do_not_depend_on_the_batches(exp, calls):
    """However the frames are split into calls, 2^exp times as many come out, less those before the first."""
    plan = PostprocessPlan(interpolation_exp=exp)
    total, out = 0, 0
    for count in calls:
        out += plan.frames_out(count, first=total == 0)
        total += count
    assert out == (max(0, 2**exp * (total - 1) + 1) if total else 0)


def test_the_first_two_chunks():
    """Chunks of 9 and 12 decoded frames are 17 and 24 at exp 1, and 4 times as large at scale 4."""
    plan = PostprocessPlan(upscaling_scale=4, interpolation_exp=1)
    assert [plan.frames_out(9, first=True), plan.frames_out(12, first=False)] == [17, 24]
    assert plan.size_out(FrameSize(832, 480)) == FrameSize(3328, 1920)
    assert (plan.rate, PostprocessPlan().rate) == (2, 1)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "models" / "deep").mkdir(parents=True)
    (tmp_path / "models" / "deep" / "net.pth").touch()
    (tmp_path / "secret.pth").touch()
    (tmp_path / "models" / "link.pth").symlink_to(tmp_path / "secret.pth")
    return tmp_path / "models"


def test_a_file_inside_the_folder(folder):
    """Relative and absolute names of a file inside lead to it."""
    for given_path in ("deep/net.pth", "deep/../deep/net.pth", str(folder / "deep" / "net.pth")):
        assert client_model_path(given_path, str(folder), field=FIELD) == (folder / "deep" / "net.pth").resolve()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../secret.pth", "leads out"),
        ("../gone.pth", "leads out"),
        ("/etc/passwd", "leads out"),
        ("link.pth", "leads out"),
        ("gone.pth", "no file"),
        ("deep", "no file"),
        ("HTTPS://example.org/net.pth", "not a URL"),
        ("a\0b", "not a path"),
        ("x" * 5000, "no file|not a path"),
    ],
)
def test_paths_that_are_refused(folder, path, message):
    """Nothing outside the folder is named or probed, by dots, links or URLs; the error names the field."""
    with pytest.raises(InvalidInit, match=message) as refused:
        client_model_path(path, str(folder), field=FIELD)
    assert refused.value.field == FIELD


def test_the_plan_keeps_the_name_that_was_given(folder):
    """Errors about a model show the path as the client wrote it; paths of what is off are ignored."""
    config = ServeConfig(postprocess_model_dir=str(folder))
    init = Init(
        first_frame=b"x", prompt="Rain.", size="64x64", enable_upscaling=True, upscaling_model_path="./deep/net.pth"
    )
    plan = resolve(init, MODEL, config).postprocess
    assert (plan.upscaling_model, plan.upscaling_given) == ((folder / "deep" / "net.pth").resolve(), "./deep/net.pth")
    assert (plan.interpolation_model, plan.interpolation_given) == (None, "")


def test_no_folder_no_paths():
    """Without --postprocess-model-dir every path is refused, saying so."""
    with pytest.raises(InvalidInit, match="--postprocess-model-dir"):
        client_model_path("net.pth", None, field=FIELD)

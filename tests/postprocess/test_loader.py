"""Weight files: every usual form loads, anything else is one named error."""

from __future__ import annotations

import contextlib
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lingbot_rt.errors import CheckpointError
from lingbot_rt.postprocess import loader
from lingbot_rt.postprocess.interpolate import IFNet
from lingbot_rt.postprocess.loader import load_interpolator, load_upscaler, read_weights
from lingbot_rt.postprocess.upscale import RRDBNet, SRVGGNetCompact

CPU = torch.device("cpu")


def same(net: torch.nn.Module, weights: dict) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    "net",
    [
        SRVGGNetCompact(features=8, inner_convs=2, scale=2),
        SRVGGNetCompact(features=4, inner_convs=0, scale=4),
        RRDBNet(features=8, growth=4, blocks=2, fold=1),
        RRDBNet(features=8, growth=4, blocks=1, fold=2),
    ],
    ids=["compact-x2", "compact-x4", "rrdb-x4", "rrdb-x2"],
)
@pytest.mark.parametrize("form", ["safetensors", "pth", "params", "params_ema"])
def test_architecture_is_found_from_the_weights(tmp_path, net, form):
    """Width, depth and factor come out of any of the usual forms of file; the averaged weights are preferred."""
    weights = net.state_dict()
    path = tmp_path / ("net.safetensors" if form == "safetensors" else "net.pth")
    if form == "safetensors":
        save_file(weights, path)
    elif form == "params_ema":
        other = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        torch.save({"params": other, "params_ema": weights}, path)
    else:
        torch.save({"params": weights} if form == "params" else weights, path)
    found = load_upscaler(path, CPU).net
    assert type(found) is type(net)
    assert found.scale == net.scale
    assert same(found, weights)


def test_rife_as_it_is_published(tmp_path):
    """flownet.pkl: names with ``module.``, and parts of the training that are left aside."""
    net = IFNet([16, 8, 8, 8], convs=2)
    weights = net.state_dict()
    published = {f"module.{name}": tensor for name, tensor in weights.items()}
    published |= {f"module.{part}conv.weight": torch.zeros(1) for part in ("block_tea.", "contextnet.", "unet.")}
    torch.save(published, tmp_path / "flownet.pkl")
    assert same(load_interpolator(tmp_path / "flownet.pkl", CPU).net, weights)


def test_shipped_files_are_small_and_licensed():
    """Both networks ship, under 12 MB each, beside their licences."""
    for path in (loader.SHIPPED_UPSCALER, loader.SHIPPED_INTERPOLATOR):
        assert path.stat().st_size < 12e6
        assert path.name in (loader.WEIGHTS / "LICENSES.md").read_text(encoding="utf-8")


class Harmful:
    def __reduce__(self):
        return (print, ("run while loading",))


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    """A pickle that would call a function is refused, and the function is not called."""
    torch.save({"params": Harmful()}, tmp_path / "bad.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Harmful(), protocol=2))
    for name in ("bad.pth", "plain.pkl"):
        with pytest.raises(CheckpointError, match="damaged or has more than weights"):
            load_upscaler(tmp_path / name, CPU)
    assert "run while loading" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut off"])
def test_damaged_files(tmp_path, suffix, content):
    """A file of other or cut-off content is one named error."""
    path = tmp_path / f"net.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_weights(path)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6))
def test_altered_bytes_are_never_another_error(tmp_path_factory, changes):
    """A file of torch's older form with bytes changed anywhere in its pickles loads, or is the one named error."""
    path = tmp_path_factory.mktemp("altered") / "net.pth"
    torch.manual_seed(0)
    weights = SRVGGNetCompact(features=4, inner_convs=0, scale=2).state_dict()
    torch.save({"params": weights}, path, _use_new_zipfile_serialization=False)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place] = value
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        load_upscaler(path, CPU)


def test_missing_files(tmp_path, monkeypatch):
    """A missing shipped file names the command that fetches it; another one is only said to be missing."""
    with pytest.raises(CheckpointError, match=r"no weight file .*gone\.pth$"):
        load_upscaler(tmp_path / "gone.pth", CPU)
    monkeypatch.setattr(loader, "WEIGHTS", tmp_path)
    monkeypatch.setattr(loader, "SHIPPED_INTERPOLATOR", tmp_path / "rife-v4.safetensors")
    with pytest.raises(CheckpointError, match="run scripts/fetch_models"):
        load_interpolator(None, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("body.2.bias"), "does not fit it"),
        (lambda w: w.update({"extra.weight": torch.zeros(1)}), "extra.weight"),
        (lambda w: w.update({"body.2.weight": torch.zeros(8, 8, 1, 1)}), "body.2.weight"),
        (lambda w: w.update({"body.999999999.weight": torch.zeros(8)}), "missing or not a convolution|not a SRVGG"),
        (lambda w: w.update({"body.0.weight": torch.zeros(())}), "missing or not a convolution"),
        (lambda w: [w.pop(name) for name in list(w) if name.startswith("body.0")], "not a Real-ESRGAN generator"),
        (lambda w: w.update({"conv_first.weight": torch.zeros(8, 5, 3, 3)}), "body.0.rdb1.conv1.weight"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    """Anything but a whole generator is an error that names what is wrong, however large a number it names."""
    weights = SRVGGNetCompact(features=8, inner_convs=1, scale=2).state_dict()
    change(weights)
    torch.save(weights, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=message):
        load_upscaler(tmp_path / "net.pth", CPU)


def test_other_things_than_tables_of_weights(tmp_path):
    """A list, numbers and an empty table are refused as such."""
    for i, thing in enumerate(([1, 2], {"a": 1}, {}, torch.zeros(3))):
        path = tmp_path / f"{i}.pth"
        torch.save(thing, path)
        with pytest.raises(CheckpointError, match="no table of weights"):
            read_weights(path)


def test_one_kind_is_not_the_other():
    """An interpolation network is not taken for an upscaler, nor an upscaler for an interpolation network."""
    with pytest.raises(CheckpointError, match="not a Real-ESRGAN generator"):
        load_upscaler(loader.SHIPPED_INTERPOLATOR, CPU)
    with pytest.raises(CheckpointError, match="not a RIFE network"):
        load_interpolator(loader.SHIPPED_UPSCALER, CPU)


def test_converter_keeps_the_values(converter, tmp_path):
    """RIFE's conversion keeps the four blocks, in half floats, under their plain names."""
    net = IFNet([16, 8, 8, 8], convs=1)
    published = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save(published | {"module.unet.conv.weight": torch.zeros(1)}, tmp_path / "flownet.pkl")
    save_file(converter.rife_weights((tmp_path / "flownet.pkl").read_bytes()), tmp_path / "rife.safetensors")
    assert load_file(tmp_path / "rife.safetensors").keys() == net.state_dict().keys()
    assert same(load_interpolator(tmp_path / "rife.safetensors", CPU).net.half(), net.half().state_dict())

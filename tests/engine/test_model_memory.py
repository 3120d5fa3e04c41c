"""What a model takes, counted before it is loaded, and the refusal of what does not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lingbot_rt.cli import main
from lingbot_rt.config import ServeConfig
from lingbot_rt.engine import memory, model_memory
from lingbot_rt.engine.memory import GB, weight_bytes
from lingbot_rt.engine.model_memory import ModelCounts, needed_memory, require_memory
from lingbot_rt.engine.pipeline import load_pipeline
from lingbot_rt.errors import ConfigError
from lingbot_rt.models.checkpoint import load_dit, load_text_encoder, load_vae, open_checkpoint
from lingbot_rt.models.model_path import LINGBOT_WORLD_FAST

CPU = torch.device("cpu")
LARGE = ServeConfig(model_path=LINGBOT_WORLD_FAST, load_format="dummy", device="cpu")


@pytest.fixture
def free(monkeypatch):
    """``free(gigabytes)`` sets what the host has free."""

    def set_free(gigabytes: float | None) -> None:
        value = None if gigabytes is None else int(gigabytes * GB)
        monkeypatch.setattr(model_memory, "known_host_bytes", lambda: value)

    return set_free


@pytest.fixture
def on_gpu(monkeypatch):
    """``on_gpu(gigabytes)``: a GPU that has this much free, and no driver."""

    def set_free(gigabytes: float) -> None:
        monkeypatch.setattr(model_memory, "resolve_device", lambda name: torch.device("cuda", 0))
        monkeypatch.setattr(model_memory, "free_bytes", lambda device: int(gigabytes * GB))
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))

    return set_free


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_count_is_what_loading_takes(quantization, dtype):
    """Of every network exactly the bytes of its parameters and buffers once it is loaded."""
    folder = open_checkpoint("builtin", load_format="dummy")
    found = ModelCounts.of(folder).nbytes(dtype, torch.float32, quantization)
    dit = load_dit(folder, dtype, CPU, quantization=quantization)
    assert found.dit.total == weight_bytes(dit)
    assert found.dit.layer == weight_bytes(dit.blocks[0])
    assert found.vae == weight_bytes(load_vae(folder, torch.float32, CPU)._vae)
    text = load_text_encoder(folder, dtype, CPU)._encoder
    assert found.text_encoder.total == weight_bytes(text)
    assert found.text_encoder.layer == weight_bytes(text.encoder.block[0])


def test_where_weights_are():
    """On a GPU everything, or what each offload option leaves there; on a CPU all ranks share the host."""
    folder = open_checkpoint(LINGBOT_WORLD_FAST, load_format="dummy")
    counts = ModelCounts.of(folder)

    def need(kind: str, **options) -> tuple[float, float]:
        config = dataclasses.replace(LARGE, **({"device": "auto"} | options))
        found = needed_memory(counts, folder.dit_config, config, kind, text_encoder=True)
        return found.device / GB, found.host / GB

    device, host = need("cuda")
    assert device == pytest.approx(37.1 + 0.25 + 11.4 + 0.4, abs=0.3)
    assert host == 0
    device, host = need("cuda", quantization="fp8", text_encoder_cpu_offload=True)
    assert device == pytest.approx(18.9 + 0.25 + 0.8 + 0.4, abs=0.3)
    assert 11.4 < host < 2 * 11.4
    device, host = need("cuda", dit_cpu_offload=True, text_encoder_cpu_offload=True, num_gpus=2)
    assert device < 5
    assert host > 2 * 36
    assert need("cpu") == (0, pytest.approx(74.2 + 0.5 + 22.7 + 0.8, abs=0.5))
    assert need("cpu", num_gpus=2)[1] - need("cpu")[1] == pytest.approx(74.2 + 0.5, abs=0.5)


@pytest.mark.parametrize(
    ("gigabytes", "options", "expected"),
    [
        (40, {}, r"needs 49\.\d GB on cuda:0 \(transformer 37\.1, VAE 0\.3, text encoder 11\.4\), 40\.0 GB is free: "
                 r"use --text-encoder-cpu-offload"),
        (32, {}, "use --quantization fp8$"),
        (24, {}, "use --text-encoder-cpu-offload --quantization fp8$"),
        (24, {"text_encoder_cpu_offload": True}, "use --quantization fp8$"),
        (12, {}, "use --text-encoder-cpu-offload --dit-cpu-offload$"),
        (2, {}, "no option makes it fit"),
    ],
)  # fmt: skip
def test_the_14b_on_smaller_cards(free, on_gpu, gigabytes, options, expected):
    """The error has the numbers and the first options with which it would fit."""
    free(256)
    on_gpu(gigabytes)
    with pytest.raises(ConfigError, match=expected):
        require_memory(dataclasses.replace(LARGE, device="auto", **options))


def test_what_a_remedy_needs_is_checked_too(free, on_gpu, monkeypatch):
    """Offload is not proposed on a host that cannot hold the weights, fp8 not on a GPU that has none."""
    free(8)
    on_gpu(24)
    with pytest.raises(ConfigError, match="no option makes it fit"):
        require_memory(dataclasses.replace(LARGE, device="auto"))
    free(256)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match="is free: use --dit-cpu-offload"):
        require_memory(dataclasses.replace(LARGE, device="auto"))


def test_what_fits_or_is_not_known_is_not_refused(free, on_gpu):
    """The built-in model on a machine of 2 GB, memory that nobody knows, and a card that is large enough."""
    free(2)
    require_memory(ServeConfig(device="cpu", load_format="dummy"))
    free(None)
    require_memory(LARGE)
    free(256)
    on_gpu(50)
    require_memory(dataclasses.replace(LARGE, device="auto"))
    on_gpu(24)
    require_memory(dataclasses.replace(LARGE, device="auto", quantization="fp8", text_encoder_cpu_offload=True))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bench pipeline --random-weights", "use --quantization fp8"),
        ("bench pipeline --random-weights --num-gpus 1,2,4", "use --quantization fp8"),
        ("bench pipeline --random-weights --num-gpus 4", "use --quantization fp8 --num-gpus 1"),
        ("bench targets", "no option makes it fit"),
        (f"generate --model-path {LINGBOT_WORLD_FAST} --load-format dummy --out new", "no option makes it fit"),
        (f"generate --model-path {LINGBOT_WORLD_FAST} --load-format dummy --num-gpus 2 --out new", "on 2 ranks"),
    ],
)
def test_commands_refuse_before_they_allocate(free, monkeypatch, capsys, tmp_path, line, expected):
    """On a machine with 22 GB free: one line, exit code 2, and no weight gets memory."""
    free(22)
    # Where another process would measure, this one does: the patches are its own.
    monkeypatch.setattr("lingbot_rt.bench.apart.in_a_process", lambda function, *args: function(*args))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lingbot_rt.models.checkpoint._allocate", lambda *args: pytest.fail("memory was taken"))
    assert main([*line.split(), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--model-path {LINGBOT_WORLD_FAST} needs " in error
    assert " 22.0 GB is free: " in error
    assert expected in error


def test_files_are_counted_too(golden, free, monkeypatch):
    """A real checkpoint that does not fit is refused by its configuration, before a weight is read."""
    config = ServeConfig(model_path=str(golden("e2e/model")), device="cpu", warmup=False)
    free(0.001)
    monkeypatch.setattr("lingbot_rt.models.checkpoint._allocate", lambda *args: pytest.fail("memory was taken"))
    with pytest.raises(ConfigError, match=r"needs 0\.0 GB on the host"):
        load_pipeline(config, lambda status: None)


def test_a_container_has_less_than_the_host(tmp_path):
    """Both versions of control groups; files in memory count as free, and no limit is no limit."""
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 4000\nactive_file 300\ninactive_file 400\n")
    assert list(memory._container_bytes(tmp_path)) == []
    (tmp_path / "memory.max").write_text("8000\n")
    assert list(memory._container_bytes(tmp_path)) == [3700]
    first = tmp_path / "memory"
    first.mkdir()
    (first / "memory.limit_in_bytes").write_text("6000\n")
    (first / "memory.usage_in_bytes").write_text("5000\n")
    (first / "memory.stat").write_text("total_inactive_file 500\n")
    assert list(memory._container_bytes(tmp_path)) == [3700, 1500]

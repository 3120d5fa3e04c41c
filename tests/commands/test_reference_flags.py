"""Command lines and variables of the reference's server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lingbot_rt.cli import build_parser
from lingbot_rt.commands import reference_flags
from lingbot_rt.commands.options import config_from
from lingbot_rt.commands.reference_flags import REFERENCE_FLAGS, SWITCHES, VARIABLES
from lingbot_rt.config import ServeConfig
from lingbot_rt.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "docs" / "reference-flags.md").read_text(encoding="utf-8")
COOKBOOK = (
    "--model-path robbyant/lingbot-world-v2-14b-causal-fast-diffusers --num-gpus 8 --ulysses-degree 8 "
    "--pipeline-class-name LingBotWorldCausalDMDPipeline --dit-cpu-offload false --text-encoder-cpu-offload false "
    "--vae-config.use-parallel-decode true --vae-config.parallel-decode-mode spatial --enable-torch-compile false "
    "--host 0.0.0.0 --port 30000"
)
VALUES = {"true|false": "false", "N": "1", "PATH": "a", "TEXT": "a", "HUB_ID": "robbyant/lingbot-world-v2"}
"""A value for each placeholder. Of choices the first one is taken."""


def parse(line: str) -> ServeConfig:
    return config_from(build_parser("serve").parse_args(["serve", *line.split()]))


def warnings_of(line: str, capsys) -> list[str]:
    parse(line)
    return capsys.readouterr().err.splitlines()


def table() -> dict[str, tuple[str, str]]:
    """The page's table of flags: flag -> (kind, here)."""
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \|(.*)\|$", PAGE, re.MULTILINE)
    return {name: (kind, here.strip()) for names, kind, here in rows for name in re.findall(r"`(--[^`]+)`", names)}


def test_the_cookbook_of_the_second_model(capsys):
    """The whole command line is taken, without a warning."""
    config = parse(COOKBOOK)
    assert (config.num_gpus, config.ulysses_degree, config.compile) == (8, 8, "false")
    assert (config.vae_parallel, config.host, config.port) == ("auto", "0.0.0.0", 30000)
    assert capsys.readouterr().err == ""


def test_the_page_lists_every_flag():
    """The table has exactly the flags that are handled, each with its kind and what it does here."""
    listed = table()
    taken = {name for name, (kind, _) in listed.items() if kind == "taken"}
    assert {name: row for name, row in listed.items() if name not in taken} == {
        each.name: (each.kind, each.here) for each in REFERENCE_FLAGS
    }
    assert taken <= {"--" + name.replace("_", "-") for name in ServeConfig.__dataclass_fields__}
    assert all(f"`{name}`" in PAGE for name in (*VARIABLES, *SWITCHES))


@pytest.mark.parametrize("each", REFERENCE_FLAGS, ids=lambda each: each.name)
def test_each_flag_does_what_its_kind_says(each, capsys):
    """A refused flag ends the start with a reason. One without effect changes no option, and one line names it."""
    line = f"{each.name} {VALUES.get(each.form, each.form.partition('|')[0])}"
    if each.kind == "refused":
        with pytest.raises(ConfigError) as caught:
            parse(line)
        assert str(caught.value).startswith(each.name)
        assert each.here in str(caught.value)
        return
    config = parse(line)
    if each.kind == "no effect":
        assert config == ServeConfig()
        assert each.here.startswith("only ") or each.name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--enable-torch-compile", {"compile": "true"}),
        ("--enable-torch-compile False", {"compile": "false"}),
        ("--vae-config.use-parallel-decode false", {"vae_parallel": "none"}),
        ("--vae-config.use-parallel-decode true", {"vae_parallel": "auto"}),
        ("--num-gpus 2 --vae-parallel width --vae-config.use-parallel-decode true", {"vae_parallel": "width"}),
        ("--num-gpus 2 --sp-degree 2", {"ulysses_degree": 2}),
        ("--dit-layerwise-offload true", {"dit_cpu_offload": True}),
        ("--dit-layerwise-offload false --dit-cpu-offload true", {"dit_cpu_offload": True}),
        ("--vae-precision bf16", {"vae_dtype": "bfloat16"}),
        ("--warmup-mode off", {"warmup": False}),
        ("--model-id robbyant/lingbot-world-v2-14b-causal-fast-diffusers", {"schedule": "v2"}),
        ("--model-id robbyant/lingbot-world-fast-diffusers", {"schedule": "v1"}),
        ("--attention-backend torch_sdpa", {"attention_backend": "sdpa"}),
        ("--attention-backend fa", {"attention_backend": "auto"}),
        ("--log-level INFO", {"log_level": "info"}),
        ("--log-level Warning", {"log_level": "warning"}),
    ],
)
def test_mapped_flags_set_options(line, expected):
    """Each sets the option that does the same here."""
    config = parse(line)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--enable-torch-compile false --compile true", ("--enable-torch-compile false", "--compile true")),
        ("--num-gpus 4 --ulysses-degree 4 --sp-degree 2", ("--sp-degree 2", "--ulysses-degree 4")),
        ("--num-gpus 4 --sp-degree 2", ("2", "--num-gpus 4")),
        ("--model-id someone/other", ("--model-id", "someone/other")),
        ("--tp-size 2", ("--tp-size", "2", "--ulysses-degree")),
        ("--use-fsdp-inference true", ("--use-fsdp-inference", "true", "--dit-cpu-offload")),
        ("--vae-config.parallel-decode-mode rows", ("--vae-config.parallel-decode-mode", "rows", "spatial")),
        ("--enable-torch-compile perhaps", ("--enable-torch-compile", "perhaps", "true")),
        ("--attention-backend sage_attn", ("--attention-backend", "sage_attn", "sdpa")),
    ],
)
def test_what_cannot_be_done_is_refused(line, named):
    """One line names the flag, the value and what is expected."""
    with pytest.raises(ConfigError) as caught:
        parse(line)
    assert all(part in str(caught.value) for part in named)


def test_an_int4_window_is_one_in_fp8(capsys):
    """One line says how it differs. fp8 itself and no quantization need no line; another format is a contradiction."""
    assert parse("--kv-cache-quant int4").kv_cache_dtype == "fp8"
    (warning,) = capsys.readouterr().err.splitlines()
    assert all(part in warning for part in ("--kv-cache-quant 'int4'", "--kv-cache-dtype fp8", "twice that of int4"))
    for text, expected in (("none", "auto"), ("bf16", "auto"), ("FP8", "fp8"), ("fp8 --kv-cache-dtype fp8", "fp8")):
        assert parse(f"--kv-cache-quant {text}").kv_cache_dtype == expected
    assert capsys.readouterr().err == ""
    with pytest.raises(
        ConfigError, match=r"--kv-cache-quant 'int4' does not go together with --kv-cache-dtype bfloat16"
    ):
        parse("--kv-cache-quant int4 --kv-cache-dtype bfloat16")


@pytest.mark.parametrize("backend", ["fa2", "fa3", "FA3", "fa4"])
def test_flash_attention_by_the_references_names(backend, capsys, monkeypatch):
    """With its package it is that package. Without it one line names the package and what is used instead."""
    monkeypatch.setattr(reference_flags, "_is_installed", lambda package: True)
    assert parse(f"--attention-backend {backend}").attention_backend == backend.lower()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(reference_flags, "_is_installed", lambda package: False)
    assert parse(f"--attention-backend {backend}").attention_backend == "auto"
    (warning,) = capsys.readouterr().err.splitlines()
    assert ("pip install fa3-fwd" if backend.lower() == "fa3" else "pip install flash-attn") in warning


def test_variables_of_the_reference(capsys, monkeypatch):
    """Each that is set is one line; unset, empty or off it is none."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "60")
    lines = warnings_of("", capsys)
    assert len(lines) == len(VARIABLES)
    assert all(name in line for name, line in zip(VARIABLES, lines, strict=True))
    for value in ("false", ""):
        for name in VARIABLES:
            monkeypatch.setenv(name, value)
        assert warnings_of("", capsys) == []


def test_the_variable_of_the_interactive_window_sets_its_option(capsys, monkeypatch):
    """As the reference reads it, with one line that says so. Flag and own variable win, in silence."""
    (name,) = SWITCHES
    for value, expected in (("true", True), ("1", True), ("false", False), ("", False)):
        monkeypatch.setenv(name, value)
        assert parse("").interactive_kv_window == expected
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == expected
        assert all(name in line and "--interactive-kv-window" in line for line in lines)
    monkeypatch.setenv(name, "true")
    assert not parse("--interactive-kv-window false").interactive_kv_window
    monkeypatch.setenv("LINGBOT_RT_INTERACTIVE_KV_WINDOW", "false")
    assert not parse("").interactive_kv_window
    assert capsys.readouterr().err == ""


def test_idle_flags_share_one_line(capsys):
    """However many there are, the start has one line about them."""
    (warning,) = warnings_of("--performance-mode speed --pin-cpu-memory --master-port 29500 --tp-size 1", capsys)
    assert all(name in warning for name in ("--performance-mode", "--pin-cpu-memory", "--master-port"))
    assert "--tp-size" not in warning

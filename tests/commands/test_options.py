"""The command line and the configuration are one table."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from lingbot_rt.cli import main
from lingbot_rt.commands import VERBS
from lingbot_rt.commands.options import GROUPS, add_config_options, config_from
from lingbot_rt.config import ServeConfig, load_config
from lingbot_rt.errors import ConfigError

ROOT = Path(__file__).parents[2]
FIELDS = dataclasses.fields(ServeConfig)
REFERENCE = (
    "--model-path robbyant/lingbot-world-fast-diffusers --pipeline-class-name LingBotWorldCausalDMDPipeline "
    "--num-gpus 4 --ulysses-degree 4 --dit-cpu-offload false --text-encoder-cpu-offload false"
)


def parse(line: str) -> ServeConfig:
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    return config_from(parser.parse_args(line.split()))


def test_every_field_has_a_group_that_is_shown():
    """No option can be defined and stay unreachable."""
    assert {field.metadata["group"] for field in FIELDS} == set(GROUPS)


def test_the_reference_command_line_is_taken_as_it_stands():
    """The flags of the reference deployment give the configuration that they mean."""
    config = parse(REFERENCE)
    assert (config.num_gpus, config.ulysses_degree) == (4, 4)
    assert config.model_path == "robbyant/lingbot-world-fast-diffusers"
    assert not config.dit_cpu_offload
    assert not config.text_encoder_cpu_offload


@pytest.mark.parametrize(
    ("line", "value"),
    [("", True), ("--warmup", True), ("--warmup true", True), ("--warmup false", False), ("--warmup 0", False)],
)
def test_booleans(line, value):
    """A bare boolean flag means true; written values win."""
    assert parse(line).warmup is value


def test_flags_win_over_the_file(tmp_path):
    """Only flags that were given override --config."""
    file = tmp_path / "serve.toml"
    file.write_text('port = 31000\nlog-level = "debug"\n')
    config = parse(f"--config {file} --port 32000")
    assert (config.port, config.log_level) == (32000, "debug")


@pytest.mark.parametrize(
    "line",
    [
        "serve --port many",
        "serve --port 70000",
        "serve --no-such-flag",
        "serve --warmup perhaps",
        "serve --dtype float64",
        "serve --pipeline-class-name OtherPipeline",
        "serve --num-gpus 4 --ulysses-degree 2",
        "serve --config no-such-file.toml",
        "serve --num-gpus 3 --device cpu",
        "serve --num-gpus 64 --device cuda",
        "serve --host no.such.host.invalid",
        "serve --port 0 --record-dir /proc/records",
        "serve --port 0 --postprocess-model-dir no-such-folder",
        "serve --record-max-mb 2000 --record-total-mb 1000",
        "check run configs/regression/builtin.toml --gt no-such-folder --only neutral",
        "check record no-such-file.toml --out nowhere",
        "client --keys q*3",
        "client --size large --keys w",
        "client --init fps",
        "generate --first-frame no-such-file.png --model-path no-such-folder",
        "nothing",
        "",
    ],
)
def test_wrong_command_lines_get_one_line_and_code_2(line, capsys):
    """Whatever is wrong is said in one line on stderr, and the exit code is 2."""
    try:
        code = main(line.split())
    except SystemExit as end:
        code = end.code
    output = capsys.readouterr()
    assert code == 2
    assert len(output.err.strip().splitlines()) == 1
    assert output.out == ""


def test_a_taken_port_is_one_line(capsys):
    """The port is tried before anything slow starts."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "already in use" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    """``lingbot-rt VERB --help`` prints its options."""
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"lingbot-rt {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda file: file.name)
def test_shipped_configs_load(file):
    """Every key of a shipped configuration file is a real one with a valid value."""
    assert load_config({}, file=str(file), environment={}).model_path


def test_shipped_configs_are_found():
    assert len(list((ROOT / "configs").glob("*.toml"))) >= 4


def test_an_unknown_key_of_a_file_is_named(tmp_path):
    """A misspelt key does not pass in silence."""
    file = tmp_path / "serve.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(ConfigError, match="prot"):
        parse(f"--config {file}")

"""The command line: options from the configuration's fields, wrong command lines, help."""

from __future__ import annotations

import argparse
import dataclasses
import socket
from pathlib import Path

import pytest

from lingbot_rt.cli import joined, main
from lingbot_rt.commands import VERBS
from lingbot_rt.commands.options import GROUPS, add_config_options, config_from
from lingbot_rt.config import ServeConfig
from lingbot_rt.config_sources import load_config
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
    """No option is left out of ``serve``."""
    assert {field.metadata["group"] for field in FIELDS} == set(GROUPS)


def test_the_reference_command_line_works():
    """The flags of the reference deployment set the fields they name."""
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
    """A bare boolean flag means true. A written value wins."""
    assert parse(line).warmup is value


def test_flags_win_over_the_file(tmp_path):
    """Flags that are given override --config, the others keep its values."""
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
        "client --keys w*600",
        "generate --keys w*600",
        "client --size large --keys w",
        "client --init fps",
        "generate --first-frame no-such-file.png --model-path no-such-folder",
        "nothing",
    ],
)
def test_wrong_command_lines_get_one_line_and_code_2(line, capsys):
    """Every mistake gets one line on stderr and exit code 2."""
    try:
        code = main(line.split())
    except SystemExit as end:
        code = end.code
    output = capsys.readouterr()
    assert code == 2
    # In a process that has not loaded torch yet, commands first say that this takes a while.
    assert len(output.err.strip().removeprefix("lingbot-rt: starting, this takes some seconds\n").splitlines()) == 1
    assert output.out == ""


def test_an_unknown_option_names_the_help_that_lists_the_options(capsys):
    """The help of the verb, since the help of the program lists none."""
    with pytest.raises(SystemExit, match="2"):
        main(["client", "--server", "http://127.0.0.1:1"])
    assert "--server http://127.0.0.1:1 (see lingbot-rt client --help)" in capsys.readouterr().err


def test_a_taken_port_is_one_line(capsys):
    """The port is taken before anything slow starts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "already in use" in capsys.readouterr().err


def test_live_keys_have_no_limit(capsys):
    """600 latent frames are too long for a script only: with --live the client goes on and finds no server."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert main(["client", "--url", url, "--keys", "w*600"]) == 2
        assert "--keys: 600 latent frames, at most 512" in capsys.readouterr().err
        assert main(["client", "--url", url, "--keys", "w*600", "--live"]) == 1
    assert "does not answer" in capsys.readouterr().err


OPTION_OF = {
    "serve": "--port",
    "play": "--no-browser",
    "client": "--live",
    "generate": "--keys",
    "bench": "collectives",
    "check": "record",
    "replay": "--min-psnr",
    "doctor": "--model-path",
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    """``lingbot-rt VERB --help`` prints what the verb does and its options."""
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: lingbot-rt {verb}" in printed
    assert f"{VERBS[verb][1:]}." in " ".join(printed.split())
    assert OPTION_OF[verb] in printed


@pytest.mark.parametrize("words", [[], ["bench"], ["check"]])
def test_a_command_line_that_names_no_work_shows_the_help(words, capsys):
    """What can be said next is on standard output."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {' '.join(['lingbot-rt', *words])}")


@pytest.mark.parametrize(
    ("words", "parsed"),
    [
        ("client --keys -*2,w*9 --live", "client --keys=-*2,w*9 --live"),
        ("client --keys -,w -h", "client --keys=-,w -h"),
        ("client --keys - --seed -1", "client --keys - --seed=-1"),
        ("client --api-key=x -y", "client --api-key=x -y"),
        ("replay -- --video -x", "replay -- --video -x"),
    ],
)
def test_values_that_begin_with_a_dash(words, parsed):
    """They are values of the option before them, and no options."""
    assert joined(words.split()) == parsed.split()


SHIPPED = {
    "builtin": ("builtin", 1, "delta-gzip"),
    "lingbot_world_fast_1gpu": ("robbyant/lingbot-world-fast-diffusers", 1, "webp"),
    "lingbot_world_fast_sp2": ("robbyant/lingbot-world-fast-diffusers", 2, "webp"),
    "lingbot_world_fast_sp4": ("robbyant/lingbot-world-fast-diffusers", 4, "webp"),
}


def test_all_shipped_configs_are_tested():
    """Every file of configs/ is in the table above."""
    assert {file.stem for file in (ROOT / "configs").glob("*.toml")} == SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load(name):
    """A shipped configuration file is valid and sets the model, the GPUs and the transport it is made for."""
    config = load_config({}, file=str(ROOT / "configs" / f"{name}.toml"), environment={})
    assert (config.model_path, config.num_gpus, config.default_output_format) == SHIPPED[name]


def test_an_unknown_key_of_a_file_is_named(tmp_path):
    """A misspelt key is an error."""
    file = tmp_path / "serve.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(ConfigError, match="prot"):
        parse(f"--config {file}")

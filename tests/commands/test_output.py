"""Standard output that cannot show, write or be read, and messages on standard error."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lingbot_rt.cli import main
from lingbot_rt.commands import output
from lingbot_rt.commands.serve import show_banner
from lingbot_rt.errors import ConfigError, OutputFailed, ReaderGone, printable, quoted

COMMAND = [sys.executable, "-m", "lingbot_rt"]


def test_no_message_writes_a_control_character():
    """Controls are escaped wherever they come from; long values are cut."""
    assert printable("a\r\n\x1b[31m\x9bé ö") == "a\\r\\n\\x1b[31m\\x9bé ö"
    assert quoted("x" * 1000) == repr("x" * 100) + "..."


@pytest.mark.parametrize("words", [["serve", "--\r\x1b[31m"], ["client", "--keys", "w\x1b"], ["doc\rtor"]])
def test_a_wrong_command_line_is_one_line_without_controls(words, capsys):
    """Whatever was typed, the terminal shows it as text."""
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2
    assert err.endswith("\n")
    assert err[:-1].isprintable()


@pytest.mark.parametrize("words", [["--help"], ["serve", "--help"], ["--version"]])
def test_the_reader_of_the_output_goes_away(words):
    """Nothing on standard error. The code is 0 where argparse has dropped the error of an unbuffered stream."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(COMMAND + words, stdout=write, stderr=subprocess.PIPE, timeout=120)
    finally:
        os.close(write)
    assert done.returncode in (0, 141)
    assert done.stderr == b""


@contextmanager
def full_disk() -> Iterator[None]:
    """Standard output on a device that is full."""
    if not os.path.exists("/dev/full"):
        pytest.skip("the system has no /dev/full")
    with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        yield


def test_output_on_a_full_disk():
    """One named error with the system's reason. The rest of the output is dropped."""
    with full_disk():
        with pytest.raises(OutputFailed, match="standard output: No space left on device"):
            output.say("text")
        output.say("more")


@contextmanager
def broken_pipe() -> Iterator[None]:
    """Standard output whose reader has ended."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        yield


def test_a_command_whose_reader_has_ended(capsys):
    """It ends quietly after its first line."""
    with broken_pipe():
        assert main(["doctor"]) == 141
    assert capsys.readouterr().err == ""


def test_output_that_nobody_reads():
    """A broken pipe is told apart from a disk that is full."""
    with broken_pipe():
        with pytest.raises(ReaderGone):
            output.say("text")
        output.say("more")


def test_a_banner_that_cannot_be_shown_ends_no_server(caplog):
    """The server logs why and goes on."""
    with caplog.at_level(logging.WARNING), full_disk():
        show_banner("lingbot-rt", "  page")
    assert "No space left on device" in caplog.text


def test_a_banner_on_a_console_without_the_letters():
    """Letters that the console's encoding lacks are replaced."""
    program = (
        "from lingbot_rt.commands.output import prepare_output\n"
        "from lingbot_rt.commands.serve import show_banner\n"
        "prepare_output()\n"
        "show_banner('w\\xf6rld\\x1b[2J')\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"w\\xf6rld\\x1b[2J\n", b"")


def test_exit_codes_of_the_output(monkeypatch, capsys):
    """Nobody reads: 141 without a word. A full disk: 1 with one line. A file in the way: 1 with its name."""

    def failing(error: Exception) -> int:
        def run(args: object) -> int:
            raise error

        monkeypatch.setattr("lingbot_rt.commands.doctor.run", run)
        return main(["doctor"])

    assert failing(ReaderGone("gone")) == 141
    assert capsys.readouterr().err == ""
    assert failing(OutputFailed("standard output: No space left on device")) == 1
    assert failing(OSError(28, "No space left on device", "frames/x")) == 1
    assert failing(TimeoutError("timed out")) == 1
    assert failing(ConfigError("two\nlines")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "lingbot-rt: standard output: No space left on device",
        "lingbot-rt: frames/x: No space left on device",
        "lingbot-rt: timed out",
        "lingbot-rt: two\\nlines",
    ]

"""Values that the commands cannot use: exit code 2 and one line, before anything is sent or written."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lingbot_rt.cli import main

CASES = Path(__file__).parents[2] / "configs" / "regression" / "builtin.toml"
SESSION = ["--keys", "w", "--size", "64x64"]


def refusal(words: list[str], capsys) -> str:
    """The only line of a command that ends with exit code 2."""
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@contextmanager
def silent_server() -> Iterator[str]:
    """The URL of a server that must not be asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("verb", ["client", "generate"])
@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--num-frames", "0", "1 to 81"),
        ("--num-frames", "-1", "1 to 81"),
        ("--num-frames", "82", "1 to 81"),
        ("--num-frames", "nine", "1 to 81"),
        ("--chunks", "0", "1 or more"),
        ("--steps", "0", "1 to 50"),
        ("--seed", "-1", "0 to 9223372036854775807"),
        ("--fps", "0", "1 to 120"),
        ("--fps", "nan", "1 to 120"),
        ("--size", "64x65", "multiples of 16"),
        ("--size", "16x16", "at least 64"),
        ("--size", "big", "WIDTHxHEIGHT"),
        ("--prompt", " ", "1 to 8192"),
        ("--keys", "q", "keys of w a s d"),
        ("--first-frame", "no-such-file", "no such file"),
        ("--out", "", "not empty"),
        ("--out", "clip.avi", ".mp4, .webp or .gif"),
        ("--out", "clip.mp5", ".mp4, .webp or .gif"),
    ],
)
def test_options_of_a_session(verb, option, value, expected, capsys, tmp_path, monkeypatch):
    """Both verbs check alike: the option, the value and what is expected. No server is asked, no file appears."""
    monkeypatch.chdir(tmp_path)
    with silent_server() as url:
        where = ["--url", url] if verb == "client" else ["--device", "cpu"]
        line = refusal([verb, *where, *SESSION, option, value], capsys)
    assert option in line
    assert expected in line
    assert value.strip() in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["client", "generate"])
def test_a_prompt_that_is_not_utf_8(verb, capsys):
    """Python gives bytes of the command line that are not UTF-8 as lone surrogates. They are shown escaped."""
    assert r"--prompt: 'a\udcff': expected text in UTF-8" in refusal([verb, "--prompt", "a\udcff"], capsys)


@pytest.mark.parametrize(
    "words",
    [
        ["client"],
        ["bench", "serve"],
        ["check", "run", str(CASES), "--gt", "."],
        ["check", "record", str(CASES), "--out", "gt"],
        ["replay", "."],
    ],
)
@pytest.mark.parametrize(
    ("url", "expected"),
    [("http://127.0.0.1:99999", "1 to 65535"), ("ftp://127.0.0.1", "http://HOST:PORT"), ("http://[::1", "HOST:PORT")],
)
def test_every_verb_checks_its_url(words, url, expected, capsys):
    """The option, the URL and the form that is expected."""
    line = refusal([*words, "--url", url], capsys)
    assert "--url" in line
    assert url in line
    assert expected in line


@pytest.mark.parametrize("source", ["--api-key", "LINGBOT_RT_API_KEY"])
def test_every_verb_checks_its_key(source, capsys, monkeypatch):
    """A key that no header can carry is refused by its source and not shown."""
    words = ["client", "--url", "http://127.0.0.1:1", *SESSION]
    if source.startswith("--"):
        words += [source, "sec\nret"]
    else:
        monkeypatch.setenv(source, "sec\nret")
    line = refusal(words, capsys)
    assert source in line
    assert "ret" not in line


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("fps=fast", "fps: 'fast', expected a number from 1 to 120"),
        ("fps=NaN", "fps: nan, expected a number from 1 to 120"),
        ("num_frames=0", "num_frames: 0, expected"),
        ("max_chunks=0", "max_chunks: 0, expected"),
        ("frame_interpolation_exp=x", "frame_interpolation_exp: 'x', expected"),
        ("prompt=5", "prompt: 5, expected"),
        ("api_key=x", "'api_key': an init has no such field"),
        ("script=1", "'script': an init has no such field"),
        ("type=event", "'type': an init has no such field"),
        ("first_frame=street.jpg", "first_frame: expected a data: or http(s) URL; --first-frame reads a file"),
        ("seed=" + "9" * 30, "seed"),
        ("=5", "expected FIELD=VALUE"),
        ("fps", "expected FIELD=VALUE"),
    ],
)
@pytest.mark.parametrize("verb", [["client"], ["bench", "serve"]])
def test_fields_of_an_init(verb, assignment, expected, capsys):
    """--init is checked as the server would."""
    with silent_server() as url:
        line = refusal([*verb, "--url", url, "--init", assignment], capsys)
    assert "--init" in line
    assert expected in line


@pytest.mark.parametrize("verb", [["client"], ["bench", "serve"]])
def test_a_misspelt_field_of_an_init_is_refused(verb, capsys):
    """The message names the nearest field. No server is asked."""
    with silent_server() as url:
        line = refusal([*verb, "--url", url, "--init", "guidence_scale=2"], capsys)
    assert "'guidence_scale'" in line
    assert "guidance_scale" in line


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["client", "--out", "afile"], "--out"),
        (["generate", "--out", "afile"], "--out"),
        (["client", "--out", "afile/clip.mp4"], "--out"),
        (["replay", ".", "--video", "afile"], "--video"),
        (["check", "record", str(CASES), "--out", "afile"], "--out"),
        (["check", "run", str(CASES), "--gt", "afile"], "--gt"),
        (["check", "run", str(CASES), "--gt", ".", "--report", "afile"], "--report"),
        (["bench", "transport", "--json", "afile/x.json"], "--json"),
    ],
)
def test_a_file_in_the_way(words, option, capsys, tmp_path, monkeypatch):
    """A file where a folder is expected is named and stays as it is."""
    monkeypatch.chdir(tmp_path)
    Path("afile").write_text("mine")
    line = refusal(words, capsys)
    assert option in line
    assert "afile" in line
    assert "file" in line.replace("afile", "")
    assert "folder" in line
    assert Path("afile").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "afile"]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["client", "--out", "afolder/x.mp4"], "--out"),
        (["bench", "transport", "--json", "afolder"], "--json"),
        (["bench", "pipeline", "--random-weights", "--plot", "afolder"], "--plot"),
        (["bench", "transport", "--json", "nowhere/x.json"], "--json"),
        (["replay", "nowhere"], "RECORD"),
        (["check", "run", "nowhere.toml", "--gt", "."], "nowhere.toml"),
        (["replay", ".", "--min-psnr", "nan"], "--min-psnr"),
    ],
)
def test_other_paths_and_numbers(words, option, capsys, tmp_path, monkeypatch):
    """A folder where a file is expected, and what does not exist."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afolder" / "x.mp4").mkdir(parents=True)
    assert option in refusal(words, capsys)


@pytest.mark.parametrize("verb", ["client", "generate"])
def test_a_folder_with_the_frames_of_an_earlier_walk(verb, capsys, tmp_path):
    """Frames of two walks are never mixed, and nothing is removed."""
    (tmp_path / "frame_00030.png").write_bytes(b"mine")
    line = refusal([verb, *SESSION, "--out", str(tmp_path)], capsys)
    assert "--out" in line
    assert str(tmp_path) in line
    assert (tmp_path / "frame_00030.png").read_bytes() == b"mine"


def test_the_home_folder_in_paths_of_the_client(tmp_path, monkeypatch, capsys):
    """~ is the home folder in --first-frame and --out, although no shell expanded it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "x.png") in refusal(["client", "--first-frame=~/x.png"], capsys)
    (tmp_path / "afile").touch()
    assert str(tmp_path / "afile") in refusal(["client", "--out=~/afile"], capsys)
    assert not (tmp_path / "~").exists()

"""Command lines put together at random: whatever was typed, one line says what is wrong with it."""

from __future__ import annotations

import argparse
import os
import random

import pytest

from lingbot_rt.cli import build_parser, main
from lingbot_rt.commands import VERBS
from lingbot_rt.errors import ConfigError

WORDS = """
-1 0 1 1e400 nan -inf x -x - = a=b fps=x seed=99999999999999999999999 first_frame=x condition_inputs=[1] script=1
64x64 64x65 w*3 -*2,w w*1000000 , afile afolder afile/x nowhere nowhere/x.mp4 clip.mp4 clip.gif clip.xyz / /dev/null
/proc/x ~nobody9/x http://127.0.0.1:9 http://[::1 ftp://x http://127.0.0.1:99999 1,2,4 1,1 true maybe cpu %s {} ::1
"""
LONG = ("a" * 5000, "[" * 3000, "init=" + "[" * 3000)
VALUES = [*WORDS.split(), *LONG, "", " ", "a\x00b", "\udcff", "prompt=\udcff", "a\nb"]
LINES_PER_SHAPE = 12


def shapes() -> list[tuple[list[str], list[tuple[str, bool]], int]]:
    """Each verb, with what stands below it; its options, and whether they take a value; how many words it needs."""
    found = []

    def visit(words: list[str], parser: argparse.ArgumentParser) -> None:
        inner = next((each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction)), None)
        if inner is not None:
            for name, below in inner.items():
                visit([*words, name], below)
            return
        options = [(each.option_strings[-1], each.nargs != 0) for each in parser._actions if each.option_strings]
        found.append((words, options, sum(not each.option_strings for each in parser._actions)))

    for verb in VERBS:
        top = next(each for each in build_parser(verb)._actions if isinstance(each, argparse._SubParsersAction))
        visit([verb], top.choices[verb])
    return found


SHAPES = shapes()


@pytest.fixture
def nothing_runs(monkeypatch):
    """What passes the checks ends before an engine, a server or a measurement starts."""

    def stop(*args: object, **options: object) -> None:
        raise ConfigError("stopped by the test")

    for place in (
        "commands.generate.started_engine",
        "commands.local_engine.started_engine",
        "commands.serve._serve",
        "commands.doctor._memory",
        "bench.apart.in_a_process",
        "bench.ranks.pipeline_on_ranks",
        "bench.ranks.measure_on_ranks",
        "bench.targets.measure_targets",
        "bench.fidelity.measure_fidelity",
        "bench.transport.measure_transport",
        "bench.load.Load.run",
    ):
        monkeypatch.setattr(f"lingbot_rt.{place}", stop)


@pytest.mark.parametrize(("words", "options", "needed"), SHAPES, ids=[" ".join(shape[0]) for shape in SHAPES])
def test_any_command_line(words, options, needed, nothing_runs, tmp_path, monkeypatch, capsys):
    """It succeeds, or it prints one line of bounded length that a terminal can show. Nothing is raised."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("{}")
    os.mkdir("afolder")
    rng = random.Random(" ".join(words))
    reached = {"play": ["--port", "9"]}.get(words[0], [])
    if any(option == "--url" for option, _ in options) and words[0] != "play":
        reached = ["--url", "http://127.0.0.1:9"]
    for _ in range(LINES_PER_SHAPE):
        line = [*words, *rng.choices(VALUES, k=needed), *reached]
        for option, takes_value in rng.choices(options, k=rng.randint(1, 3)):
            line += [option, rng.choice(VALUES)] if takes_value and rng.random() < 0.95 else [option]
        try:
            code = main(line)
        except SystemExit as end:
            code = end.code
        said = [text for text in capsys.readouterr().err.splitlines() if "warning: " not in text]
        assert code in (0, 1, 2), line
        assert code == 0 or len(said) == 1, line
        assert all(text.isprintable() and len(text) < 1200 and " at 0x" not in text for text in said), line

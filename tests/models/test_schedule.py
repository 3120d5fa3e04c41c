"""Which schedule a model gets: its files, its name, the option, or the first model's."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from lingbot_rt.cli import build_parser, main
from lingbot_rt.commands.bench import _job as job_of
from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.pipeline import load_pipeline
from lingbot_rt.models.checkpoint import open_checkpoint
from lingbot_rt.models.schedule import SCHEDULES, DistilledSchedule, find_schedule, version_of

from .conftest import rewrite

SCHEDULER = "scheduler/scheduler_config.json"
TRANSFORMER = "transformer/config.json"
V1, V2 = SCHEDULES["v1"], SCHEDULES["v2"]
HUB_V2 = "robbyant/lingbot-world-v2-14b-causal-fast-diffusers"
UNKNOWN = "someone/my-world"


def found(folder: Path, files: dict[str, dict], name: str = UNKNOWN, asked: str = "auto") -> DistilledSchedule:
    """The schedule of a folder that has ``files`` and is called ``name``."""
    for file, values in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(values))
    return find_schedule(folder, [name], asked)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        (HUB_V2, "v2"),
        ("robbyant/lingbot-world-v2-14b-causal-fast", "v2"),
        ("someone/LingBot-World-V2-14B-Causal-Fast-NVFP4", "v2"),
        ("someone/LingBot-World-2.0", "v2"),
        ("someone/lingbot_world_infinity", "v2"),
        ("/models/lingbot-world-v2/", "v2"),
        ("someone/lingbot-world-fast-v2-anime", "v2"),
        ("robbyant/lingbot-world-fast-diffusers", "v1"),
        ("FastVideo/LingBot-World-Fast-Diffusers", "v1"),
        ("someone/lingbot-world-v1-anime", "v1"),
        ("lingbot-world-v2/other-world", None),
        ("someone/lingbot-world-tuned", None),
        ("someone/wan-v2", None),
        ("someone/lingbot-world-20-steps", None),
        ("builtin", None),
        ("", None),
    ],
)
def test_names(name, version):
    """The last part of a name says the version, however it is written. Names of other models say nothing."""
    assert version_of(name) == version


@pytest.mark.parametrize(
    ("files", "name", "expected"),
    [
        ({}, HUB_V2, V2),
        ({}, "robbyant/lingbot-world-fast-diffusers", V1),
        ({SCHEDULER: {"shift": 7.0, "dmd_denoising_steps": [900, 300]}}, HUB_V2, (7.0, (900, 300))),
        ({SCHEDULER: {"shift": 10.0, "dmd_denoising_steps": [1000, 821, 642, 321]}}, HUB_V2, V1),
        ({TRANSFORMER: {"flow_shift": 5.0, "dmd_denoising_steps": [1000, 750, 500, 250]}}, UNKNOWN, V2),
        ({SCHEDULER: {"dmd_denoising_steps": [1000, 750, 500, 250]}}, UNKNOWN, V2),
        ({SCHEDULER: {"dmd_denoising_steps": [1000, 500]}}, HUB_V2, (5.0, (1000, 500))),
        ({SCHEDULER: {"shift": 5.0}}, UNKNOWN, V2),
        ({SCHEDULER: {"shift": 3.0}}, HUB_V2, V2),
        ({SCHEDULER: {"_class_name": "UniPCMultistepScheduler", "flow_shift": 10.0}}, HUB_V2, V2),
        ({"model_index.json": {"_name_or_path": HUB_V2}}, UNKNOWN, V2),
        ({TRANSFORMER: {"_name_or_path": "/tmp/lingbot-world-v2"}}, UNKNOWN, V2),
    ],
)
def test_files_before_names(tmp_path, files, name, expected):
    """Shift and steps that the files state win over the name. The many-step scheduler's own values do not count."""
    schedule = found(tmp_path, files, name)
    assert (schedule.shift, schedule.steps) == expected
    assert not schedule.assumed


@pytest.mark.parametrize("files", [{}, {SCHEDULER: {"shift": 3.0}}])
def test_what_nothing_says_is_assumed(tmp_path, files):
    """Without a word from files and name it is v1, and the line says that this is assumed and what changes it."""
    schedule = found(tmp_path, files)
    assert (schedule.shift, schedule.steps) == V1
    assert schedule.assumed
    assert "v1" in str(schedule)
    assert "assumed" in str(schedule)
    assert "--schedule" in str(schedule)


def test_the_option_wins(tmp_path):
    """--schedule wins over files and name, and the line says which file it goes against."""
    stated = {SCHEDULER: {"shift": 10.0, "dmd_denoising_steps": [1000, 821, 642, 321]}}
    schedule = found(tmp_path, stated, asked="v2")
    assert (schedule.shift, schedule.steps) == V2
    assert SCHEDULER in str(schedule)
    assert SCHEDULER not in str(found(tmp_path, stated, asked="v1"))


def test_a_snapshot_is_known_by_its_hub_id(model, tmp_path):
    """A snapshot folder of the hub's cache, and a link to it, get the schedule of their hub id."""
    (model / SCHEDULER).unlink()
    snapshot = tmp_path / "models--robbyant--lingbot-world-v2-14b-causal-fast-diffusers" / "snapshots" / ("1" * 40)
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    for path in (snapshot, link):
        schedule = open_checkpoint(str(path)).schedule
        assert (schedule.shift, schedule.steps) == V2
        assert HUB_V2 in schedule.reason


def test_the_log_names_the_schedule(model, caplog):
    """One line at the start: a notice for a model that says its schedule, a warning for an assumed one."""
    options = {"model_path": str(model), "device": "cpu"}
    rewrite(model / SCHEDULER, lambda values: values.pop("dmd_denoising_steps") and values.pop("shift"))
    for schedule, level, shift in (("auto", logging.WARNING, 10.0), ("v2", logging.INFO, 5.0)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            pipeline = load_pipeline(ServeConfig(schedule=schedule, **options), lambda status: None)
        assert pipeline.schedule.shift == shift
        assert [record.levelno for record in caplog.records if "shift" in record.message] == [level]


def test_doctor_names_the_schedule(model, capsys):
    """doctor shows what would be served, with and without the option."""
    rewrite(model / SCHEDULER, lambda values: values.pop("dmd_denoising_steps") and values.pop("shift"))
    assert main(["doctor", "--model-path", str(model)]) == 0
    assert "assumed" in capsys.readouterr().out
    assert main(["doctor", "--model-path", str(model), "--schedule", "v2"]) == 0
    assert "shift 5, steps 1000, 750, 500, 250" in capsys.readouterr().out


def test_the_bench_knows_both():
    """The two published models have their own schedules, and the option wins there too."""
    for name, asked, (shift, steps) in (
        ("lingbot-world-fast", "auto", V1),
        ("lingbot-world-v2", "auto", V2),
        ("lingbot-world-fast", "v2", V2),
    ):
        schedule = open_checkpoint(name, asked, "dummy").schedule
        assert (schedule.shift, schedule.steps) == (shift, steps)
    line = "bench pipeline --model lingbot-world-v2 --random-weights --schedule v1"
    assert job_of(build_parser("bench").parse_args(line.split()), 1).config.schedule == "v1"

"""README.md and docs/ are held to the code: commands parse, links resolve, quotes and tables are the code's own."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

from lingbot_rt import errors
from lingbot_rt.commands.options import GROUPS
from lingbot_rt.config import ServeConfig
from lingbot_rt.session import camera_poses, controls, messages, settings
from lingbot_rt.session.history import HISTORY_KINDS
from lingbot_rt.session.messages import EXTENSIONS
from lingbot_rt.telemetry import Metrics
from scripts import limits
from scripts.limit_rows import NOT_LIMITS
from tests.e2e.served import running

ROOT = Path(__file__).parents[1]


def load_check_docs():
    loader = SourceFileLoader("check_docs", str(ROOT / "scripts" / "check_docs"))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


check_docs = load_check_docs()


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def first_cells(text: str, heading: str) -> list[str]:
    """The names in backticks of the first column of the table below ``heading``."""
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("path", check_docs.PAGES, ids=lambda path: path.name)
def test_a_page_is_true_to_the_code(path):
    """Commands parse, files, links and anchors exist, quotes and tables of flags are what the code says."""
    assert check_docs.problems_of(path) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```bash\nlingbot-rt serve --no-such-flag\n```", "unrecognized"),
        ("```bash\nlingbot-rt serve --port 70000\n```", "between 0 and 65535"),
        ("```bash\nlingbot-rt serve --config configs/none.toml\n```", "does not exist"),
        ("```bash\nlingbot-rt client --size large\n```", "large"),
        ("```bash\nscripts/none\n```", "does not exist"),
        ("```bash\npython scripts/bench_page.py URL --no-such-flag\n```", "has no --no-such-flag"),
        ("```bash\nsudo reboot\n```", "not a program"),
        ("```python\nworld =\n```", "invalid syntax"),
        ("In prose: `lingbot-rt bench pipeline --no-such-flag`.", "unrecognized"),
        ("See `lingbot_rt/none.py`.", "does not exist"),
        ("[a](none.md)", "does not exist"),
        ("# Title\n[a](#none)", "no heading #none"),
        ("<!-- source: lingbot_rt/shapes.py none -->\n", "has no none"),
        ("<!-- source: lingbot_rt/shapes.py FrameSize -->\n```python\nclass FrameSize: ...\n```\n", "--fix"),
        ("<!-- flags: none -->\n", "no group"),
    ],
)
def test_what_is_wrong_is_found(tmp_path, text, problem):
    """Each kind of mistake is one problem that says what is wrong."""
    wrong = tmp_path / "wrong.md"
    wrong.write_text(text + "\n")
    found = check_docs.problems_of(wrong)
    assert len(found) == 1
    assert problem in found[0]


def test_fix_writes_quotes_and_tables(tmp_path):
    """A directive alone, or one with an old text below it, gets the code's text; what surrounds it stays."""
    stale = tmp_path / "stale.md"
    stale.write_text(
        "before\n<!-- source: lingbot_rt/shapes.py FrameSize.parse -->\n```python\nold\n```\nbetween\n"
        "<!-- flags: limits -->\nafter\n"
    )
    assert check_docs.directive_problems(stale, fix=True) == []
    text = stale.read_text()
    assert text.startswith("before\n")
    assert "\nbetween\n" in text
    assert text.endswith("\nafter\n")
    assert "```python\n@classmethod\ndef parse(" in text
    assert "| `--max-pixels` | N |" in text
    assert check_docs.directive_problems(stale, fix=False) == []


def test_every_flag_is_listed():
    """docs/flags.md has the table of every group that ``lingbot-rt serve`` has."""
    tables = re.findall(r"<!-- flags: (\w+) -->", page("flags.md"))
    assert tables == list(GROUPS)


def test_every_metric_is_listed():
    """The table of metrics in docs/operations.md has the server's metrics and no other."""
    metrics = {family.name for family in Metrics().registry.collect()}
    listed = first_cells(page("operations.md"), "Metrics")
    assert {name for name in listed if name.startswith(("lingbot_rt_", "process_"))} == metrics


def test_every_error_code_exists():
    """The error codes of docs/wire.md are codes of named errors."""
    named = {kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")}
    listed = set(first_cells(page("wire.md"), "Errors and close codes"))
    assert listed
    assert listed <= named


def test_every_extension_is_listed():
    """docs/wire.md lists the extensions that an init may name, and no other."""
    assert set(first_cells(page("wire.md"), "Extensions")) == set(EXTENSIONS)


def test_every_kind_of_event_is_listed():
    """docs/wire.md has a row for each kind, and for each field of a camera path's payload."""
    kinds = set(controls._PARSERS) | {"pause", "resume", *HISTORY_KINDS}
    assert set(first_cells(page("wire.md"), "event")) == kinds | {"type", "kind", "payload", "event_id"}
    fields = {field.name for field in dataclasses.fields(camera_poses.PosesEvent)} - {"notices"}
    assert set(first_cells(page("wire.md"), "Camera poses")) == fields


def test_every_folder_is_in_the_layout():
    """The table of the package layout has every folder of the package."""
    files = (path for path in (ROOT / "lingbot_rt").glob("*/*") if path.suffix in (".py", ".json"))
    assert set(first_cells(page("architecture.md"), "Package layout")) == {f"{path.parent.name}/" for path in files}


@pytest.fixture(scope="module")
def printed_by_the_example(tmp_path_factory) -> list[str]:
    """What the Python session of the README prints when it runs against the built-in model, line by line."""
    ((_, example),) = check_docs.blocks(ROOT / "README.md", "python")
    with running(tmp_path_factory.mktemp("serve"), "--warmup", "false") as server:
        program = example.replace(check_docs.DEFAULT_URL, server.http)
        assert program != example
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_example_in_the_readme_runs(printed_by_the_example):
    """It prints a line per frame, of the size it asked for, and ends by itself."""
    assert len(printed_by_the_example) == 81
    assert all(line.endswith("(96, 160, 3)") for line in printed_by_the_example)


def test_the_example_gets_its_prompt_back(printed_by_the_example):
    """The last frames carry the id of the prompt, which was sent after the key was released."""
    assert printed_by_the_example[-1].split()[2] == "3"


def test_every_bound_is_listed():
    """Each constant, queue and option that looks like a limit is a row of docs/limits.md, or is said to be none."""
    unlisted = limits.bound_like() - limits.listed()
    assert sorted(unlisted - set(NOT_LIMITS)) == [], "scripts/limit_rows.py lacks rows for these"
    assert sorted(set(NOT_LIMITS) - unlisted) == [], "scripts/limit_rows.py says that these are no limits"


def test_every_section_of_limits_is_on_the_page():
    """With the values of the code: what differs is a problem of the page."""
    assert re.findall(r"<!-- limits: (\w+) -->", page("limits.md")) == list(limits.LIMITS)


def test_values_of_limits_are_those_of_the_code():
    """Arithmetic with another number, a table, a field of an init and an option."""
    assert limits.value_of("session.controls:MAX_WAITING") == controls.MAX_WAITING
    assert limits.value_of("session.settings:MAX_PICTURE_SIDE") == settings.MAX_PICTURE_SIDE
    assert limits.value_of("init.num_frames") == {"from": 1, "to": messages.MAX_NUM_FRAMES}
    assert limits.value_of("--max-pixels")["default"] == ServeConfig().max_pixels
    with pytest.raises(ValueError, match="not in the code"):
        limits.value_of("session.controls:NONE")


def test_a_new_bound_is_found(tmp_path, monkeypatch):
    """Constants by their names, queues by what they are, wherever they stand in the package."""
    (tmp_path / "new.py").write_text(
        "MAX_CATS = 3\nCAT_LIMIT_S: float = 2 * MAX_CATS\n_CATS = DaemonPool(4, 'cats')\nNAME = 'cat'\n"
        "def f():\n    return asyncio.Queue(7), queue.Queue(), deque(maxlen=MAX_CATS)\n"
    )
    monkeypatch.setattr(limits, "PACKAGE", tmp_path)  # no other test reads a module of that name
    found = {name for name in limits.bound_like() if not name.startswith("--")}
    assert found == {"new:MAX_CATS", "new:CAT_LIMIT_S", "new:_CATS", "new:Queue"}
    assert (limits.value_of("new:CAT_LIMIT_S"), limits.value_of("new:_CATS")) == (6, 4)


def test_every_promise_has_its_test():
    """Each row of docs/security.md names tests, and each of them exists."""
    rows = [line for line in page("security.md").splitlines() if line.startswith("| ") and "| test |" not in line]
    assert len(rows) > 40
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"^(?:async )?def {name}\(", source, re.MULTILINE), f"{path} has no {name}"

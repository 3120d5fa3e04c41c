"""Case files: what is read, and how wrong ones are refused."""

from __future__ import annotations

import pytest

from lingbot_rt.errors import ConfigError
from lingbot_rt.regression.cases import CaseEvent, load_cases
from tests.regression.conftest import CASES

GOOD = """
[defaults]
keep_every = 2
[defaults.init]
first_frame = "picture.png"
size = "64x64"
prompt = "a street"
[defaults.thresholds]
exact = true

[[case]]
name = "held-keys"
chunks = 4
init = { seed = 7 }
thresholds = { min_psnr = 60.0 }
[[case.events]]
chunk = 1
kind = "camera_actions"
payload = { mode = "state", transitions = [{ actions = ["w"] }] }
event_id = 3
"""


@pytest.fixture
def cases_file(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"picture")

    def write(text: str):
        path = tmp_path / "cases.toml"
        path.write_text(text)
        return path

    return write


def test_defaults_and_case_are_joined(cases_file):
    """A case's own fields win over the defaults; the picture is read beside the file."""
    (case,) = load_cases(cases_file(GOOD))
    assert case.init == {"type": "init", "first_frame": b"picture", "size": "64x64", "prompt": "a street", "seed": 7}
    assert case.thresholds.exact
    assert case.thresholds.min_psnr == 60
    assert case.keep_every == 2
    assert case.events == (CaseEvent(1, "camera_actions", {"mode": "state", "transitions": [{"actions": ["w"]}]}, 3),)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("chunks = 4", "chunks = 0"), "`int` >= 1 - at `$.chunks`"),
        (("chunks = 4", "chunks = 2.5"), "at `$.chunks`"),
        (("keep_every = 2", "keep_every = 0"), "at `$.keep_every`"),
        (("keep_every = 2", "ignore_initial_chunks = 4"), "ignore_initial_chunks 4 leaves none"),
        (("min_psnr = 60.0", 'min_psnr = "high"'), "at `$.thresholds.min_psnr`"),
        (("seed = 7", "sed = 7"), "init has no sed"),
        (("seed = 7", "seed = -7"), "-7, expected a whole number from 0"),
        (('["w"]', '["x"]'), "'x'"),
        (('"camera_actions"', '"camera"'), "unsupported event kind"),
        (("chunk = 1\n", "chunk = 4\n"), "event at chunk 4 of 4"),
        (('kind = "camera_actions"', 'knd = "x"'), "unknown field `knd` - at `$.events[0]`"),
        (("min_psnr", "min_pnsr"), "unknown field `min_pnsr` - at `$.thresholds`"),
        (("keep_every", "keep_evry"), "unknown field `keep_evry`"),
        (('"picture.png"', '"gone.png"'), "gone.png: No such file"),
        (('name = "held-keys"', 'name = "../x"'), "matching regex"),
        (("case", "cases"), "has no"),
        (("chunks = 4", "chunks = "), "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused(cases_file, change, words):
    """Each mistake gets one line that names the case and the field."""
    with pytest.raises(ConfigError) as error:
        load_cases(cases_file(GOOD.replace(*change)))
    assert words in str(error.value)


def test_names_must_differ(cases_file):
    """Two cases of one name would share their ground truth."""
    entry = GOOD[GOOD.index("[[case]]") :]
    with pytest.raises(ConfigError, match="names must differ"):
        load_cases(cases_file(GOOD + entry))


def test_shipped_files_can_be_read():
    """Every shipped case file is valid and has its cases."""
    found = {path.stem: len(load_cases(path)) for path in CASES.glob("*.toml")}
    assert found == {"accelerator": 3, "builtin": 11, "long": 1}

"""Values of options, variables and file keys: what is normalized, what is refused, and which source is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lingbot_rt.cli import main
from lingbot_rt.config import ServeConfig
from lingbot_rt.config_sources import load_config, unread_variables
from lingbot_rt.config_values import environment_value, host_value, origins_value
from lingbot_rt.errors import ConfigError
from lingbot_rt.parallel.launch import RankInfo

PACKAGE = Path(__file__).parents[2] / "lingbot_rt"
TEXTS = ("api_key", "first_frame_dir", "record_dir", "served_model_name", "cors_allow_origins", "host", "model_path")

FOLDERS = ("first_frame_dir", "postprocess_model_dir", "record_dir", "compile_cache")


@pytest.mark.parametrize("empty", ["", " ", "\n", "\t \r\n"])
@pytest.mark.parametrize("name", [*TEXTS, "port", "warmup", "device", "init_timeout_s"])
def test_an_empty_variable_counts_as_unset(name, empty):
    """Every variable without a value leaves the default."""
    assert load_config({}, environment={f"LINGBOT_RT_{name.upper()}": empty}) == ServeConfig()


def test_empty_variables_of_launchers_count_as_unset():
    """Ranks and proxies are read by the same rule."""
    assert environment_value("X", {"X": " "}) is environment_value("X", {}) is None
    assert environment_value("X", {"X": " a\r"}) == "a"
    assert RankInfo.from_environment({"RANK": "", "MASTER_PORT": ""}) is None


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_text_of_a_flag_or_file_is_refused(name, empty, tmp_path):
    """What was written on purpose is not ignored: the error names the flag, or the file and its key."""
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ConfigError, match=flag) as caught:
        ServeConfig(**{name: empty})
    assert caught.value.field == name
    file = tmp_path / "serve.toml"
    file.write_text(f'{name} = "{empty}"\n')
    with pytest.raises(ConfigError, match=re.escape(f"--config {file}: {name}")):
        load_config({}, file=str(file), environment={})


@pytest.mark.parametrize("key", ["secret\n", "secret\r", " secret", "secret\r\n"])
def test_white_space_around_a_key_is_removed(key, tmp_path):
    """A key from a mounted file works, whichever way it comes."""
    assert load_config({"api_key": key}, environment={}).api_key == "secret"
    assert load_config({}, environment={"LINGBOT_RT_API_KEY": key}).api_key == "secret"


@pytest.mark.parametrize("key", ["sec\nret", "sécret", "\ufeffsecret", "sec\x7fret"])
def test_a_key_that_no_client_can_send_is_refused(key):
    """The message names the source and does not print the key."""
    with pytest.raises(ConfigError, match=r"^LINGBOT_RT_API_KEY .*ASCII") as caught:
        load_config({}, environment={"LINGBOT_RT_API_KEY": key})
    assert "ret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^--api-key ") as caught:
        ServeConfig(api_key=key)
    assert "ret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "origins"),
    [
        ("https://world.example/", ("https://world.example",)),
        ("HTTPS://World.Example:443", ("https://world.example",)),
        ("http://world.example:80, https://b.example:8443/,", ("http://world.example", "https://b.example:8443")),
        ("https://wörld.example", ("https://xn--wrld-5qa.example",)),
        ("http://[::1]:8000", ("http://[::1]:8000",)),
        ("null", ("null",)),
        ("*", ("*",)),
        ("none", ()),
    ],
)
def test_origins_become_what_browsers_send(given, origins):
    """Slashes, capital letters and default ports are removed."""
    config = ServeConfig(cors_allow_origins=given)
    assert config.allowed_origins == origins
    assert ServeConfig(cors_allow_origins=config.cors_allow_origins) == config


@pytest.mark.parametrize(
    "entry",
    [
        "world.example",
        "https://world.example/app",
        "https://world.example?x",
        "https://*.example",
        "https://name@world.example",
        "https://world.example:99999",
        "https://world.example:",
        "wss://world.example",
        "file:///srv",
        '"https://world.example"',
        "https://a.example https://b.example",
        "https://",
        "https://[::1",
    ],
)
def test_an_origin_that_no_browser_sends_is_refused(entry):
    """The message names the option and the entry."""
    with pytest.raises(ConfigError, match=r"^--cors-allow-origins ") as caught:
        ServeConfig(cors_allow_origins=f"https://good.example,{entry}")
    assert entry in str(caught.value)
    with pytest.raises(ValueError, match="none stands alone"):
        origins_value("none,https://a.example")


@pytest.mark.parametrize(
    "name", ["model_path", "record_dir", "compile_cache", "first_frame_dir", "postprocess_model_dir"]
)
def test_every_path_expands_the_home_folder(name, monkeypatch, tmp_path):
    """Flag, variable and file key alike."""
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = str(tmp_path / "x")
    file = tmp_path / "serve.toml"
    file.write_text(f'{name} = "~/x"\n')
    for config in (
        load_config({name: "~/x"}, environment={}),
        load_config({}, environment={f"LINGBOT_RT_{name.upper()}": "~/x"}),
        load_config({}, file="~/serve.toml", environment={}),
    ):
        assert getattr(config, name) == expected


@pytest.mark.parametrize("host", ["0.0.0.0:80", "http://0.0.0.0", "*", "a b"])
def test_a_host_is_an_address_alone(host):
    """A port or a scheme in --host is refused with what is expected. Brackets are removed."""
    with pytest.raises(ConfigError, match=r"^--host .*without scheme and port"):
        ServeConfig(host=host)
    assert host_value("[::1]") == "::1"


def test_a_port_from_kubernetes_names_its_origin():
    """The variable of a service named lingbot-rt: the error says who sets it and how to stop that. --port wins."""
    environment = {"LINGBOT_RT_PORT": "tcp://10.96.0.12:30000"}
    with pytest.raises(ConfigError, match=r"^LINGBOT_RT_PORT .*Kubernetes.*enableServiceLinks: false"):
        load_config({}, environment=environment)
    assert load_config({"port": 31000}, environment=environment).port == 31000


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("port", "70000", "between 0 and 65535"),
        ("port", "many", "between 0 and 65535"),
        ("device", "gpu", "auto, cuda, cpu"),
        ("warmup", "perhaps", "true or false"),
        ("session_wait_s", "nan", "between 0 and 3600"),
        ("device", "cp\ru", "control characters"),
        ("record_dir", "a\x1bb", "control characters"),
    ],
)
def test_a_wrong_value_names_its_variable(name, value, expected):
    """The variable, the value without control characters, and what is expected. Not the flag, which nobody gave."""
    variable = f"LINGBOT_RT_{name.upper()}"
    with pytest.raises(ConfigError, match=f"^{variable} ") as caught:
        load_config({}, environment={variable: value})
    message = str(caught.value)
    assert expected in message
    assert "--" not in message
    assert message.isprintable()


def test_white_space_around_a_value_is_removed():
    """A value of a file with Windows line ends works."""
    environment = {"LINGBOT_RT_DEVICE": "cpu\r", "LINGBOT_RT_PORT": "31000\r", "LINGBOT_RT_WARMUP": "false\r"}
    config = load_config({}, environment=environment)
    assert (config.device, config.port, config.warmup) == ("cpu", 31000, False)


def test_variables_that_nothing_reads():
    """Each is named with the nearest known name. Known, empty and foreign variables are not."""
    environment = {
        "LINGBOT_RT_API_KEYS": "x",
        "LINGBOT_RT_SERVICE_HOST": "10.96.0.12",
        "LINGBOT_RT_API_KEY": "x",
        "LINGBOT_RT_EMPTY": "",
        "OTHER": "x",
    }
    unread = unread_variables(environment)
    assert unread.keys() == {"LINGBOT_RT_API_KEYS", "LINGBOT_RT_SERVICE_HOST"}
    assert unread["LINGBOT_RT_API_KEYS"] == "LINGBOT_RT_API_KEY"


def test_every_variable_is_an_option():
    """The package reads no variable of its own besides those of the options."""
    options = {f"LINGBOT_RT_{name.upper()}" for name in ServeConfig.__dataclass_fields__}
    named = {
        name for file in PACKAGE.rglob("*.py") for name in re.findall(r"LINGBOT_RT_[A-Z_]*[A-Z]", file.read_text())
    }
    assert named <= options


def test_a_misspelt_variable_is_one_line_and_no_error(monkeypatch, capsys):
    """The line comes before anything else; the start goes on to the next error, a taken option here."""
    monkeypatch.setenv("LINGBOT_RT_API_KEYS", "x")
    assert main(["serve", "--host", "192.0.2.1"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "LINGBOT_RT_API_KEYS" in first
    assert "LINGBOT_RT_API_KEY)" in first
    assert "--host" in second


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot = 1", "'prot'; the nearest is port"),
        ("[server]\nport = 1", "'server'"),
        ("port = '1'", "port = '1': expected a whole number between 0 and 65535"),
        ("port = true", "port = 'True': expected a whole number"),
        ("device = 1", "device = '1': expected a string"),
        ("api_key = 12345", "api_key = (not shown): expected a string"),
        ("session_wait_s = nan", "session_wait_s nan: expected a number between 0"),
        ("log-level = 'info'\nlog_level = 'info'", "log_level is set twice"),
        ("port = ", "is not TOML"),
        ("port = " + "1" * 5000, "is not TOML"),
        ("port = " + "1" * 400, "expected a whole number between 0 and 65535"),
        ("session_wait_s = " + "1" * 400, "expected a number between 0 and 3600"),
        ("x = " + "[" * 5000, "is not TOML"),
    ],
)
def test_wrong_files_are_named(text, named, tmp_path):
    """One line with the file, the key, the value and what is expected."""
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(named)) as caught:
        load_config({}, file=str(file), environment={})
    assert f"--config {file}" in str(caught.value)


def test_a_file_with_a_byte_order_mark(tmp_path):
    """Editors on Windows write one."""
    file = tmp_path / "serve.toml"
    file.write_text("port = 31000\r\n", encoding="utf-8-sig")
    assert load_config({}, file=str(file), environment={}).port == 31000


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"record_max_mb": 50}, "--record-dir"),
        ({"record_sessions": "asked"}, "--record-dir"),
        ({"enable_upscaling_warmup": True, "warmup": False}, "--warmup"),
    ],
)
def test_an_option_without_the_one_it_needs_is_refused(options, needed):
    """An option that would have no effect names the option that it needs."""
    with pytest.raises(ConfigError, match=f"needs {needed}"):
        ServeConfig(**options)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("source", ["flag", "variable", "file"])
def test_a_folder_that_cannot_be_used_names_its_source(name, source, tmp_path, monkeypatch, capsys):
    """A file in the place of a folder is refused before the model loads. A variable or file key is named too."""
    (tmp_path / "afile").touch()
    words = ["serve", "--port", "0"]
    value, named = str(tmp_path / "afile"), f"--{name.replace('_', '-')}"
    if source == "flag":
        words += [named, value]
    elif source == "variable":
        named = f"LINGBOT_RT_{name.upper()}"
        monkeypatch.setenv(named, value)
    else:
        named = f"--config {tmp_path / 'serve.toml'}: {name}"
        (tmp_path / "serve.toml").write_text(f'{name} = "{value}"\n')
        words += ["--config", str(tmp_path / "serve.toml")]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert value in line

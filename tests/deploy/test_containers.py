"""The files that run the server elsewhere: the image, the compose file, the systemd unit. No container is started."""

from __future__ import annotations

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from lingbot_rt.cli import build_parser
from lingbot_rt.commands.options import config_from

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
UNIT = (ROOT / "configs/systemd/lingbot-rt.service").read_text(encoding="utf-8")


def served(arguments: list[str]):
    """The configuration that these arguments of lingbot-rt make."""
    return config_from(build_parser(arguments[0]).parse_args(arguments))


def environment(text: str) -> dict[str, str]:
    return dict(re.findall(r"\b([A-Z][A-Z_]+)=(\S+)", text))


def test_everything_that_the_image_copies_is_in_its_context():
    """Each COPY names files that exist and that .dockerignore lets through."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M) for name in line.split()[:-1]]
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(fnmatch(name, rule) for rule in kept), name


def test_the_image_serves_every_interface_as_another_user(monkeypatch):
    """The image's variables are options of serve; its user is not root, and what it writes is in its volume."""
    final = DOCKERFILE.rpartition("FROM ")[2]
    variables = environment(final)
    for name, value in variables.items():
        if name.startswith("LINGBOT_RT_"):
            monkeypatch.setenv(name, value)
    config = served(["serve"])
    assert config.host == "0.0.0.0"
    assert re.search(rf"^EXPOSE {config.port}$", final, re.M)
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", final, re.M)
    assert re.search(r"^VOLUME /cache$", final, re.M)
    assert all(variables[name].startswith("/cache") for name in ("HOME", "HF_HOME"))


@pytest.mark.parametrize("name", ["server", "server-gpu"])
def test_the_services_of_the_compose_file(name):
    """Their commands parse, their build arguments are the Dockerfile's, and the root file system is read-only."""
    service = COMPOSE["services"][name]
    assert served(service["command"])
    assert service["read_only"] is True
    build = service["build"]
    arguments = {} if isinstance(build, str) else build["args"]
    assert all(re.search(rf"^ARG {each}=", DOCKERFILE, re.M) for each in arguments)
    extras = set(arguments.get("EXTRAS", re.search(r"^ARG EXTRAS=(.+)$", DOCKERFILE, re.M)[1]).split(","))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras <= set(project["optional-dependencies"])


def test_prometheus_and_grafana_find_their_files():
    """Every mounted file exists; Prometheus scrapes the service by its name and port; Grafana's folder is mounted."""
    for service in COMPOSE["services"].values():
        for source, target, *_ in (volume.split(":") for volume in service.get("volumes", ())):
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], source
            assert target.startswith("/")
    scraping = yaml.safe_load((ROOT / "configs/prometheus/compose.yml").read_text(encoding="utf-8"))
    assert [job["static_configs"] for job in scraping["scrape_configs"]] == [[{"targets": ["server:30000"]}]]
    provisioning = ROOT / "configs/grafana/provisioning"
    [provider] = yaml.safe_load((provisioning / "dashboards/lingbot-rt.yml").read_text())["providers"]
    mounts = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert any(mount.startswith(provider["options"]["path"]) for mount in mounts)
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"].removeprefix("http://").split(":")[0] in COMPOSE["services"]


def test_the_unit_starts_the_server_and_not_twice_with_a_wrong_option():
    """Its command parses, and exit code 2, a wrong option, is not tried again."""
    [command] = re.findall(r"^ExecStart=(.+)$", UNIT, re.M)
    program, *arguments = shlex.split(command)
    assert program.endswith("/bin/lingbot-rt")
    assert served(arguments)
    assert "RestartPreventExitStatus=2" in UNIT
    assert float(re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.M)[1]) > 4.5

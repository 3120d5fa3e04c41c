"""Models of the hub: what is fetched, what the cache has to have, and the errors that lead to a fix."""

from __future__ import annotations

import fnmatch
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from lingbot_rt.config import ServeConfig
from lingbot_rt.models import hub
from lingbot_rt.models.checkpoint import open_checkpoint

from .conftest import load_all, refusal

COMMIT = "1" * 40
ID = "field/world"
SOCKS = "Using SOCKS proxy, but the 'socksio' package is not installed"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return tmp_path / "hub"


@pytest.fixture
def snapshot(cache, model) -> Path:
    """The cache with the golden model as field/world: links to blobs, as the hub's client makes them."""
    repository = cache / "models--field--world"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        link, blob = snapshot / path.relative_to(model), repository / "blobs" / f"{number:040x}"
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.fixture
def offline(monkeypatch):
    """HF_HUB_OFFLINE=1, and a client that fails the test when it is asked for anything."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: pytest.fail("the hub was asked"))


def failing(monkeypatch, error: Exception) -> None:
    """Every download fails with ``error``."""

    def fail(model_id, **options):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)


class FakeHub:
    """A repository. Downloads copy its files into the snapshot folder of a cache."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.snapshot = cache / "models--field--world" / "snapshots" / COMMIT
        self.fetched: list[str] = []
        self._files = files

    def download(self, model_id: str, *, allow_patterns: list[str], revision: str | None = None) -> str:
        assert model_id == ID
        assert revision in (None, COMMIT)
        for path in sorted(path for path in self._files.rglob("*") if path.is_file()):
            name = path.relative_to(self._files).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, self.snapshot / name)
                self.fetched.append(name)
        return str(self.snapshot)


def test_only_what_is_read_is_fetched(model, cache, monkeypatch):
    """Other formats, second weights, other networks, pictures and notes of a repository are not downloaded."""
    read = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    for name in (
        *("README.md", "demo.mp4", "world.safetensors", "text_encoder/pytorch_model.bin", "vae/diffusion_flax.msgpack"),
        *("transformer/diffusion_pytorch_model_ema.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"),
        *("tokenizer/spiece.model", "image_encoder/model.safetensors", "transformer/._config.json"),
    ):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"\x80")
    fake = FakeHub(model, cache)
    monkeypatch.setattr(hub, "snapshot_download", fake.download)
    assert open_checkpoint(ID).path == fake.snapshot
    assert sorted(fake.fetched) == sorted(read)
    load_all(ID)


def test_shards_are_fetched_by_their_index(model, cache, monkeypatch):
    """With an index the shards that it names are fetched, and a whole file beside them is not."""
    part = model / "vae"
    name = "diffusion_pytorch_model.safetensors"
    shutil.copyfile(part / name, part / "diffusion_pytorch_model-00001-of-00001.safetensors")
    weight_map = '{"weight_map": {"a": "diffusion_pytorch_model-00001-of-00001.safetensors"}}'
    (part / f"{name}.index.json").write_text(weight_map)
    fake = FakeHub(model, cache)
    monkeypatch.setattr(hub, "snapshot_download", fake.download)
    hub.fetch(ID)
    assert {file for file in fake.fetched if file.startswith("vae/")} == {
        *("vae/config.json", f"vae/{name}.index.json", "vae/diffusion_pytorch_model-00001-of-00001.safetensors")
    }


def test_a_repository_that_is_no_model(cache, tmp_path, monkeypatch):
    """A repository without the folders of a model is refused as such a folder is."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    monkeypatch.setattr(hub, "snapshot_download", FakeHub(tmp_path / "other", cache).download)
    assert "transformer/" in refusal(ID)


def test_a_cache_with_everything_that_is_read(snapshot, offline):
    """Offline, the cache serves, whatever else its repository lists, and without a question to the hub."""
    trees = snapshot.parent.parent / "trees"
    trees.mkdir()
    listing = '{"format_version": 1, "files": {"text_encoder/pytorch_model.bin": {"size": 1, "blob_id": "f"}}}'
    (trees / f"{COMMIT}.json").write_text(listing)
    assert open_checkpoint(ID).path == snapshot
    load_all(ID)


@pytest.mark.parametrize(
    "name",
    [
        *("transformer/diffusion_pytorch_model.safetensors", "transformer/config.json", "vae/config.json"),
        *("text_encoder/model.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    ],
)
def test_a_cache_that_lacks_a_file(snapshot, offline, name):
    """A file that is read and missing is named, whether its link or only its blob is gone."""
    (snapshot / name).resolve().unlink()
    for _ in range(2):
        message = refusal(ID)
        assert name in message
        assert "HF_HUB_OFFLINE" in message
        (snapshot / name).unlink(missing_ok=True)


def test_an_empty_cache_offline(cache, offline):
    """Without a copy the message names the variable, the cache and the way out."""
    message = refusal(ID)
    assert "HF_HUB_OFFLINE" in message
    assert str(cache) in message
    assert "--model-path ./models/world" in message


def test_two_revisions_without_a_main(snapshot, offline):
    """The only snapshot serves without refs/main; of two none is guessed."""
    (snapshot.parent.parent / "refs" / "main").unlink()
    assert open_checkpoint(ID).path == snapshot
    shutil.copytree(snapshot, snapshot.parent / ("2" * 40), symlinks=True)
    assert "no copy" in refusal(ID)
    assert "/snapshots" in refusal(snapshot.parent.parent)


@pytest.mark.parametrize("variable", ["ALL_PROXY", "https_proxy"])
def test_a_socks_proxy(snapshot, monkeypatch, caplog, variable):
    """A SOCKS proxy without its package: a complete cache serves with a warning; else both are named."""
    monkeypatch.setenv(variable, "socks5://127.0.0.1:9")
    failing(monkeypatch, ImportError(SOCKS))
    assert open_checkpoint(ID).path == snapshot
    assert variable in caplog.text
    assert "socksio" in caplog.text
    shutil.rmtree(snapshot.parent.parent)
    message = refusal(ID)
    assert variable in message
    assert "socksio" in message


class ProxyError(Exception):
    """As an HTTP library has one."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalEntryNotFoundError("cannot reach the hub\nsecond line"), ("cannot reach the hub",)),
        (RepositoryNotFoundError("404", response=Mock()), ("no such model", "HF_TOKEN")),
        (GatedRepoError("403", response=Mock()), ("access", "HF_TOKEN")),
        (OSError(28, "No space left on device", "/cache/x"), ("/cache/x", "No space left on device", "HF_HOME")),
        (PermissionError(13, "Permission denied", "/cache/x"), ("/cache/x", "Permission denied", "HF_HOME")),
        (ProxyError("503 from proxy"), ("503 from proxy", "HTTPS_PROXY")),
        (ValueError("Unknown scheme for proxy URL"), ("Unknown scheme", "HTTPS_PROXY")),
        (RuntimeError("a library's own"), ("a library's own",)),
    ],
    ids=["unreachable", "unknown", "gated", "full", "read-only", "proxy", "scheme", "other"],
)
def test_downloads_that_fail(snapshot, monkeypatch, caplog, error, words):
    """Whatever ends a download, a complete copy in the cache serves with a warning; without one the cause is named."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    failing(monkeypatch, error)
    assert open_checkpoint(ID).path == snapshot
    assert all(word in caplog.text for word in words)
    (snapshot / "vae" / "config.json").unlink()
    message = refusal(ID)
    assert "vae/config.json" in message
    shutil.rmtree(snapshot.parent.parent)
    message = refusal(ID)
    assert all(word in message for word in (ID, "--model-path ./models/world", *words))


def test_the_folder_of_a_repository(snapshot):
    """The cache's folder of a repository is not the model: the message has the folder inside and the id."""
    for folder in (snapshot.parent.parent, snapshot.parent):
        message = refusal(folder)
        assert str(snapshot) in message
        assert ID in message
    cache = snapshot.parents[2]
    for folder in (cache, cache.parent):
        assert f"name the id of one, of {ID}" in refusal(folder)
    load_all(snapshot)


def test_names_that_are_no_id(cache, monkeypatch):
    """What is neither a folder nor an id is not asked of the hub."""
    failing(monkeypatch, AssertionError("the hub was asked"))
    for name in ("no id", "owner/two words", "a--b/c", "-x"):
        assert "neither a folder that exists nor a hub id" in refusal(name)


def test_a_snapshot_is_served_under_its_id(snapshot, monkeypatch, tmp_path):
    """The served name of a snapshot folder, also behind a link or a relative path, is the hub id."""
    (tmp_path / "link").symlink_to(snapshot)
    monkeypatch.chdir(snapshot.parent)
    for path in (str(snapshot), f"{snapshot}/", str(tmp_path / "link"), f"./{COMMIT}"):
        assert ServeConfig(model_path=path).model_id == ID
    assert ServeConfig(model_path=str(snapshot), served_model_name="mine").model_id == "mine"
    assert ServeConfig(model_path=ID).model_id == ID
    plain = tmp_path / "snapshots" / "world"
    plain.mkdir(parents=True)
    assert ServeConfig(model_path=str(plain)).model_id == "world"

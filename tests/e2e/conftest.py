"""One server of the golden checkpoint for all tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest

from tests.e2e.served import Server, running


@pytest.fixture(scope="session")
def golden_server(golden, tmp_path_factory) -> Iterator[Server]:
    """Serves the golden checkpoint as a user would, but for a default size that warm-up is soon done with."""
    folder = tmp_path_factory.mktemp("serve")
    model = folder / "model"
    shutil.copytree(golden("e2e/model"), model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"default_size": "64x64"}))
    with running(folder, "--model-path", str(model), "--device", "cpu", "--dtype", "float32") as it:
        yield it

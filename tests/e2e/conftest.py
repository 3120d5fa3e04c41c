"""One server of the golden checkpoint for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.served import Server, running


@pytest.fixture(scope="session")
def golden_server(golden, tmp_path_factory) -> Iterator[Server]:
    """Serves the golden checkpoint as a user would."""
    model = str(golden("e2e/model"))
    with running(
        tmp_path_factory.mktemp("serve"), "--model-path", model, "--device", "cpu", "--dtype", "float32"
    ) as it:
        yield it

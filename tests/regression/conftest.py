"""The shipped cases, and the configuration of an engine that runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingbot_rt.config import ServeConfig
from lingbot_rt.regression.cases import Case, load_cases

CASES = Path(__file__).parents[2] / "configs" / "regression"


@pytest.fixture(scope="session")
def shipped_cases() -> list[Case]:
    return load_cases(CASES / "builtin.toml")


@pytest.fixture(scope="session")
def golden_config(golden) -> ServeConfig:
    return ServeConfig(model_path=str(golden("e2e/model")), device="cpu", dtype="float32", warmup=False)

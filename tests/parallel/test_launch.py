"""The checks before any rank starts, how a process finds its rank, and how tokens are split."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.worker import worker_command
from lingbot_rt.errors import ConfigError
from lingbot_rt.parallel.groups import RankGroup
from lingbot_rt.parallel.launch import RankInfo, require_ranks
from tests.parallel.conftest import config

INFO = RankInfo(rank=1, world=2, local_rank=1, address="127.0.0.1", port=29500, run_id="0", has_store=False)


def test_ranks_must_divide_the_heads():
    """The built-in DiT has four heads: three ranks are refused, with the numbers that fit. So are those that do not
    divide the published 14B's forty, without its weights."""
    require_ranks(config(2))
    with pytest.raises(ConfigError, match=r"--num-gpus 3 does not divide the 4 heads of builtin; use 1, 2 or 4$"):
        require_ranks(config(3))
    for world in (3, 6, 7):
        with pytest.raises(ConfigError, match=r"the 40 heads of lingbot-world-fast; use 1, 2, 4, 5, 8, 10, 20 or 40$"):
            require_ranks(config(world, model_path="lingbot-world-fast", load_format="dummy"))


def test_ranks_need_a_gpu_each(monkeypatch):
    """On cuda the GPUs are counted before anything starts."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"--num-gpus 2: this machine has 1 CUDA device"):
        require_ranks(config(2, device="cuda"))


@pytest.mark.parametrize("asked", [1, 4])
def test_the_launcher_must_have_started_as_many(monkeypatch, asked):
    """A launcher with two processes and another --num-gpus is one clear error, not a wait for ranks that never come."""
    for name, value in INFO.environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="the launcher started 2 processes; use --num-gpus 2"):
        require_ranks(config(asked))


def test_rank_info_survives_the_environment():
    """A worker reads from its environment what rank 0 wrote."""
    assert RankInfo.from_environment(INFO.environment()) == INFO
    assert RankInfo.from_environment({}) is None
    restarted = INFO.environment() | {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert RankInfo.from_environment(restarted) == dataclasses.replace(INFO, run_id="2", has_store=True)


def test_workers_do_not_get_the_api_key():
    """Other users can read a worker's command line."""
    *_, values = worker_command(config(2, api_key="secret"))
    assert ServeConfig(**json.loads(values)) == config(2)


@given(count=st.integers(0, 10_000), world=st.integers(1, 16))
def test_tokens_are_split_evenly(count, world):
    """Every token has one rank, and any two ranks differ by at most one token."""
    rows = RankGroup(0, world).split(count)
    assert sum(rows) == count
    assert len(rows) == world
    assert max(rows) - min(rows) <= 1

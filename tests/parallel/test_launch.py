"""What is asked of the ranks before any starts, how a process finds its place, and how tokens are shared."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingbot_rt.errors import ConfigError
from lingbot_rt.parallel.groups import Ranks
from lingbot_rt.parallel.launch import Place, require_ranks
from tests.parallel.conftest import config

PLACE = Place(rank=1, world=2, local_rank=1, address="127.0.0.1", port=29500, run="0", store_is_there=False)


def test_ranks_must_divide_the_heads():
    """The built-in DiT has four heads: three ranks are refused with what would fit."""
    require_ranks(config(2))
    with pytest.raises(ConfigError, match=r"--num-gpus 3 does not divide the 4 heads of builtin; use 1, 2$"):
        require_ranks(config(3))


def test_ranks_need_a_gpu_each(monkeypatch):
    """On cuda the GPUs are counted before anything starts."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"--num-gpus 2: this machine has 1 CUDA device"):
        require_ranks(config(2, device="cuda"))


@pytest.mark.parametrize("asked", [1, 4])
def test_the_launcher_must_have_started_as_many(monkeypatch, asked):
    """Two processes of a launcher and another --num-gpus is one clear error, not a wait for ranks that never come."""
    for name, value in PLACE.environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="the launcher started 2 processes; use --num-gpus 2"):
        require_ranks(config(asked))


def test_a_place_survives_the_environment():
    """What rank 0 writes for a follower is what the follower reads."""
    assert Place.from_environment(PLACE.environment()) == PLACE
    assert Place.from_environment({}) is None
    restarted = PLACE.environment() | {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert Place.from_environment(restarted) == dataclasses.replace(PLACE, run="2", store_is_there=True)


@given(count=st.integers(0, 10_000), world=st.integers(1, 16))
def test_tokens_are_shared_whole_and_evenly(count, world):
    """Every token has one rank, and no rank has more than one token above another."""
    rows = Ranks(0, world).share(count)
    assert sum(rows) == count
    assert len(rows) == world
    assert max(rows) - min(rows) <= 1

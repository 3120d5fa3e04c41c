"""Between hosts gloo takes the interface that leads there, whatever a host's own name resolves to."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from lingbot_rt.parallel import interface
from lingbot_rt.parallel.interface import VARIABLE, address_towards, choose_interface, interface_of

LIMIT = timedelta(minutes=1)


@pytest.fixture
def network(monkeypatch):
    """Rank 0's host has the store and calls itself 127.0.1.1; rank 1's reaches it by another name's address."""
    monkeypatch.setenv(VARIABLE, "")  # what the tests leave there is taken away again
    monkeypatch.delenv(VARIABLE)
    ways = {"hosta": "127.0.1.1", "10.0.0.1": "10.0.0.2", "10.0.0.2": "10.0.0.1"}
    monkeypatch.setattr(interface, "address_towards", ways.__getitem__)
    monkeypatch.setattr(interface, "interface_of", {"127.0.1.1": "lo", "10.0.0.1": "eth7"}.get)


def choose_on(store: dist.Store, own: str, other: str) -> str | None:
    """What rank 0 chooses when its store's name is ``own``; rank 1 comes by ``other``."""
    with ThreadPoolExecutor() as threads:
        first = threads.submit(choose_interface, store, 0, 2, own, LIMIT)
        store.set("address/1", interface.address_towards(other))
        first.result()
    return os.environ.get(VARIABLE)


def test_a_loopback_name_does_not_hide_the_way_out(network):
    """The host of the store goes by where the others come from."""
    assert choose_on(dist.HashStore(), "hosta", "10.0.0.1") == "eth7"


def test_ranks_of_one_host_stay_on_it(network):
    """Nobody comes from outside."""
    assert choose_on(dist.HashStore(), "hosta", "hosta") == "lo"


def test_what_is_set_stays(network, monkeypatch):
    """An operator knows better."""
    monkeypatch.setenv(VARIABLE, "ib0")
    assert choose_on(dist.HashStore(), "hosta", "10.0.0.1") == "ib0"


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces are asked for as Linux has it")
def test_the_loopback_interface_is_found():
    """Addresses and interfaces are the system's."""
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None

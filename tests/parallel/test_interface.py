"""Between hosts gloo uses the interface that leads to the others, whatever a host's own name resolves to."""

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
    """Rank 0's host has the store, and its own name is 127.0.1.1. Rank 1's host reaches it at 10.0.0.1."""
    monkeypatch.setenv(VARIABLE, "")  # so that monkeypatch restores it after the test
    monkeypatch.delenv(VARIABLE)
    ways = {"hosta": "127.0.1.1", "10.0.0.1": "10.0.0.2", "10.0.0.2": "10.0.0.1"}
    monkeypatch.setattr(interface, "address_towards", ways.__getitem__)
    monkeypatch.setattr(interface, "interface_of", {"127.0.1.1": "lo", "10.0.0.1": "eth7"}.get)


def choose_on(store: dist.Store, own: str, other: str) -> str | None:
    """Rank 0's choice when it reaches the store at ``own``, and rank 1 at ``other``."""
    with ThreadPoolExecutor() as threads:
        first = threads.submit(choose_interface, store, 0, 2, own, LIMIT)
        store.set("address/1", interface.address_towards(other))
        first.result()
    return os.environ.get(VARIABLE)


def test_a_loopback_name_does_not_hide_the_way_out(network):
    """The store's host takes the interface towards the other hosts."""
    assert choose_on(dist.HashStore(), "hosta", "10.0.0.1") == "eth7"


def test_ranks_of_one_host_stay_on_it(network):
    """Without other hosts the loopback interface is used."""
    assert choose_on(dist.HashStore(), "hosta", "hosta") == "lo"


def test_a_variable_that_is_set_stays(network, monkeypatch):
    """An operator's GLOO_SOCKET_IFNAME is not overwritten."""
    monkeypatch.setenv(VARIABLE, "ib0")
    assert choose_on(dist.HashStore(), "hosta", "10.0.0.1") == "ib0"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_the_loopback_interface_is_found():
    """The system's own addresses and interfaces are found; an unknown address has none."""
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None

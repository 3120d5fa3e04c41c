"""Training in several processes: one set of weights, the mean of all gradients, one clock."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from scripts.world.ranks import Ranks


def _work(rank: int, port: int, folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            patch.setenv(name, str(value))
        ranks = Ranks.join("cpu")
    torch.manual_seed(rank)
    layer = nn.Linear(3, 2)
    ranks.share_weights(layer)
    layer(torch.full((1, 3), float(1 + 2 * rank))).sum().backward()
    ranks.average_gradients(layer.parameters())
    result: dict[str, Any] = {
        "weights": layer.state_dict(),
        "grads": [parameter.grad for parameter in layer.parameters()],
        "time": ranks.from_first(10.0 + rank),
        "first": ranks.is_first,
    }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_weights_gradients_and_clock(tmp_path: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_work, (port, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["first"]
    assert not two["first"]
    assert one["time"] == two["time"] == 10.0
    for name, value in one["weights"].items():
        assert torch.equal(value, two["weights"][name])
    for grads in (one["grads"], two["grads"]):
        assert torch.equal(grads[0], torch.full((2, 3), 2.0))  # of inputs 1 and 3
        assert torch.equal(grads[1], torch.ones(2))


def test_a_single_process_changes_nothing() -> None:
    layer = nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    before = [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]
    ranks = Ranks.join("cpu")
    ranks.share_weights(layer)
    ranks.average_gradients(layer.parameters())
    assert ranks == Ranks(0, 1)
    assert ranks.from_first(2.5) == 2.5
    assert all(torch.equal(a, b.grad) for a, b in zip(before, layer.parameters(), strict=True) if b.grad is not None)

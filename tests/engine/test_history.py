"""``History`` by itself: what it says it keeps is what one can go back to."""

from __future__ import annotations

import copy
import random
import re

import pytest
import torch

from lingbot_rt.engine.history import History, KeptChunk, window_indices
from lingbot_rt.errors import InvalidEvent

F = 3
NONE = torch.zeros(0, dtype=torch.uint8)


def chunk(index: int, nbytes: int = 4) -> KeptChunk:
    latents = torch.zeros(nbytes, dtype=torch.uint8)
    return KeptChunk(index, latents, "", None, None, None, None, {}, (), NONE)


def new(sink: int, window: int, limit: int) -> History:
    return History(latent_frames=F, sink_frames=sink, window_frames=window, limit_bytes=limit)


def named(history: History, branch: int) -> range:
    """What a refusal says is kept of a branch."""
    with pytest.raises(InvalidEvent) as refused:
        history.go_back(branch, 10**6, keep=False)
    found = re.search(r"are (\d+) to (\d+)$", str(refused.value))
    return range(int(found[1]), int(found[2]) + 1) if found else range(0)


def walked(history: History, sink: int, window: int) -> int:
    """``kept_from``, one boundary after the other."""
    first = history.next_index
    while first > 0:
        indices = window_indices(F, sink, window, first - 1)
        if any(history._find(history.branch, index) is None for index in indices):
            break
        first -= 1
    return first


@pytest.mark.parametrize(("sink", "window"), [(3, 9), (0, 9), (4, 13), (6, 11)])
@pytest.mark.parametrize("seed", range(2))
def test_what_is_kept_is_what_can_be_gone_back_to(sink, window, seed):
    """Chunks of many sizes, branches, and a limit that ever more of them leave for."""
    choose = random.Random(seed)
    history, branches = new(sink, window, limit=choose.choice([0, 40, 90])), 1
    for _ in range(150):
        if choose.random() < 0.8:
            history.add(chunk(history.next_index, choose.randint(1, 8)))
        else:
            branch = choose.randrange(branches)
            kept = named(history, branch)
            keep = choose.random() < 0.6 and branches < 32
            boundary = choose.choice(kept) if kept else history.next_index
            gone = history.go_back(branch if kept else history.branch, boundary, keep=keep)
            assert [each.index for each in gone] == window_indices(F, sink, window, boundary)
            branches += keep
        assert history.kept_from() == walked(history, sink, window)
        newest = window_indices(F, sink, window, history.next_index)
        assert [each.index for each in history.window()] == newest
        assert history.nbytes == sum(each.nbytes for each in history._kept.values())
        assert history.nbytes <= history._limit_bytes or len(history._kept) == len(newest)
    for branch in range(branches):
        kept = named(history, branch)
        for boundary in range(history.next_index + 10):
            other = copy.deepcopy(history)
            if boundary in kept:
                other.go_back(branch, boundary, keep=False)
                assert other.kept_from() <= boundary
            else:
                with pytest.raises(InvalidEvent):
                    other.go_back(branch, boundary, keep=False)


def test_a_branch_keeps_its_sink_for_as_long_as_anything():
    """No window of it can be computed again without. What is left then is where it began."""
    history = new(3, 9, limit=48)
    for index in range(8):
        history.add(chunk(index))
    history.go_back(0, 0, keep=True)
    for index in range(9):
        history.add(chunk(index))
    assert history._find(0, 0) is not None
    assert named(history, 0) == range(8, 9)
    while history._find(0, 0) is not None:
        history.add(chunk(history.next_index))
    with pytest.raises(InvalidEvent, match=r"^3, kept of branch 0 are 0 to 0$"):
        history.go_back(0, 3, keep=False)

"""The ring against a plain rolling list."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lingbot_rt.models.kv_cache import KVCache

from .conftest import CPU

TOKENS, HEADS, DIM, LAYERS = 2, 2, 4, 2


def cache_of(sink: int, window: int) -> KVCache:
    return KVCache(
        num_layers=LAYERS,
        num_heads=HEADS,
        head_dim=DIM,
        tokens_per_frame=TOKENS,
        sink_frames=sink,
        window_frames=window,
        dtype=torch.float32,
        device=CPU,
    )


def keys(frames: range, layer: int, attempt: int) -> torch.Tensor:
    """Keys [1, N, H, D] with a value of their own for each frame, token, layer and forward."""
    tokens = torch.tensor([frame * 100.0 + token for frame in frames for token in range(TOKENS)])
    return (tokens + layer * 0.25 + attempt * 0.0625).view(1, -1, 1, 1).expand(1, -1, HEADS, DIM).contiguous()


@st.composite
def windows(draw) -> tuple[int, int, int, int]:
    latent_frames = draw(st.integers(1, 5))
    sink = draw(st.integers(0, 7))
    window = sink + latent_frames + draw(st.integers(0, 9))
    return sink, window, latent_frames, draw(st.integers(1, 30))


@given(windows())
def test_ring_equals_a_rolling_list(case):
    """Any sink, window and chunk length, over many chunks: the visible set is the sink and the newest frames."""
    sink, window, latent_frames, chunks = case
    cache, rolling = cache_of(sink, window), []
    for chunk in range(chunks):
        frames = range(chunk * latent_frames, (chunk + 1) * latent_frames)
        rolling += frames
        rolling = rolling[:sink] + rolling[sink:][-(window - sink) :]
        for attempt in range(2):
            cache.begin(frames.start, latent_frames)
            for layer in range(LAYERS):
                cache.write(layer, keys(frames, layer, attempt), -keys(frames, layer, attempt))
        assert cache.visible_frames == len(rolling)
        slots = [frame for frame in cache.frame_of_slot if frame is not None]
        assert sorted(slots) == rolling
        for layer in range(LAYERS):
            k, v = cache.view(layer)
            expected = torch.cat([keys(range(frame, frame + 1), layer, 1) for frame in slots], dim=1)
            assert torch.equal(k, expected)
            assert torch.equal(v, -expected)


def test_one_allocation_that_never_moves():
    """Chunks overwrite slots in place: the memory stays where it is and as large as it was."""
    cache = cache_of(3, 9)
    cache.begin(0, 3)
    cache.write(0, keys(range(3), 0, 0), keys(range(3), 0, 0))
    before, place = cache.nbytes, cache.view(0)[0].data_ptr()
    for chunk in range(1, 40):
        cache.begin(3 * chunk, 3)
        assert cache.view(0)[0].data_ptr() == place
    assert cache.nbytes == before == 2 * LAYERS * 9 * TOKENS * HEADS * DIM * 4

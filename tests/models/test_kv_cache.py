"""The ring against a plain rolling list."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lingbot_rt.models.kv_cache import KVCache

from .conftest import CPU

TOKENS, HEADS, DIM, LAYERS = 2, 2, 4, 2


def cache_of(sink: int, window: int, recent: tuple[int, ...] = ()) -> KVCache:
    return KVCache(
        num_layers=LAYERS,
        num_heads=HEADS,
        head_dim=DIM,
        tokens_per_frame=TOKENS,
        sink_frames=sink,
        window_frames=window,
        dtype=torch.float32,
        device=CPU,
        recent_frames=recent,
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


@given(windows(), st.lists(st.integers(0, 9), max_size=3), st.data())
def test_a_limited_window_is_the_sink_and_the_newest_frames(case, before, data):
    """Whatever the limits of the chunks before: keys and values of exactly these frames, in one piece of memory."""
    sink, window, latent_frames, chunks = case
    levels = tuple(latent_frames + more for more in before if latent_frames + more <= window - sink)
    cache, written = cache_of(sink, window, levels), {}
    for chunk in range(chunks):
        frames = range(chunk * latent_frames, (chunk + 1) * latent_frames)
        limit = data.draw(st.sampled_from([None, *levels]))
        cache.limit(limit)
        for attempt in range(2):
            cache.begin(frames.start, latent_frames)
            cache.write(1, keys(frames, 1, attempt), -keys(frames, 1, attempt))
        written |= {frame: keys(range(frame, frame + 1), 1, 1) for frame in frames}
        others = [frame for frame in written if frame >= sink][-(limit or window - sink) :]
        expected = sorted([frame for frame in written if frame < sink] + others)
        assert cache.visible_frames == len(expected)
        k, v = cache.view(1)
        assert sorted(k[0, :, 0, 0].tolist()) == sorted(
            torch.cat([written[f] for f in expected], 1)[0, :, 0, 0].tolist()
        )
        assert torch.equal(v, -k)
        assert k[:, :, 0].stride() == cache.view(0)[0][:, :, 0].stride()


@given(windows(), st.data())
def test_a_past_chunk_sees_what_is_left_of_the_time_before_its_end(case, data):
    """Computed again, it writes its frames that are in the window and no others, and sees those before its end."""
    sink, window, latent_frames, chunks = case
    levels = (latent_frames + 1,) if latent_frames + 1 <= window - sink else ()
    cache = cache_of(sink, window, levels)
    for chunk in range(chunks + 1):
        frames = range(chunk * latent_frames, (chunk + 1) * latent_frames)
        cache.begin(frames.start, latent_frames)
        cache.write(1, keys(frames, 1, 0), -keys(frames, 1, 0))
    before = {frame: 0 for frame in cache.frame_of_slot if frame is not None}
    chunk = data.draw(st.integers(0, chunks - 1))
    frames = range(chunk * latent_frames, (chunk + 1) * latent_frames)
    assert cache.holds(frames.start, latent_frames) == any(frame in before for frame in frames)
    assume(cache.holds(frames.start, latent_frames))
    limit = data.draw(st.sampled_from([None, *levels]))
    cache.limit(limit)
    cache.begin(frames.start, latent_frames)
    assert cache.chunk_tokens == latent_frames * TOKENS
    cache.write(1, keys(frames, 1, 1), -keys(frames, 1, 1))
    after = before | {frame: 1 for frame in frames if frame in before}
    past = sorted(frame for frame in before if frame < frames.stop)
    seen = [frame for frame in past if frame < sink] + [frame for frame in past if frame >= sink][-(limit or window) :]
    k, v = cache.view(1)
    expected = [keys(range(frame, frame + 1), 1, after[frame])[0, :, 0, 0] for frame in seen]
    assert sorted(k[0, :, 0, 0].tolist()) == sorted(torch.cat(expected).tolist())
    assert torch.equal(v, -k)
    assert cache.visible_frames == len(seen)
    cache.limit(None)
    newest = range(chunks * latent_frames, (chunks + 1) * latent_frames)
    cache.begin(newest.start, latent_frames)
    k, _ = cache.view(1)
    whole = torch.cat([keys(range(frame, frame + 1), 1, attempt)[0, :, 0, 0] for frame, attempt in after.items()])
    assert torch.equal(k[0, :, 0, 0], whole)


def test_one_allocation_that_never_moves():
    """Chunks overwrite slots in place: the memory stays where it is and as large as it was."""
    cache = cache_of(3, 9, (3, 4))
    cache.begin(0, 3)
    cache.write(0, keys(range(3), 0, 0), keys(range(3), 0, 0))
    before, place = cache.nbytes, cache.view(0)[0].data_ptr()
    for chunk in range(1, 40):
        cache.begin(3 * chunk, 3)
        assert cache.view(0)[0].data_ptr() == place
    assert cache.nbytes == before == 2 * LAYERS * 9 * TOKENS * HEADS * DIM * 4

"""Sets a session to a boundary between two chunks: from its history, or from a snapshot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lingbot_rt.engine.dmd import ChunkForward, commit_again
from lingbot_rt.engine.frame_readback import to_uint8
from lingbot_rt.engine.history import KeptChunk, WholeState
from lingbot_rt.engine.pipeline import Pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.models.transfer import to_device

_DECODER_FRAMES = 24
"""Latent frames that the decoder looks back: after as many its features no longer depend on what came before."""


@torch.inference_mode()
def set_back(pipeline: Pipeline, session: SessionState, window: Sequence[KeptChunk], boundary: int) -> bool:
    """``window``: the chunks that the session's window has frames of at ``boundary``, in order.

    Returns whether the session is now exactly as it was there. If not, its window was computed again from the latents
    of these chunks alone, one context pass each: what had left it is missing. Raises ChunkCancelled after ``cancel``.
    """
    newest = window[-1] if window else None
    states = [chunk.whole for chunk in window]
    whole = [state for state in states if state is not None]
    if newest is not None and newest.whole is not None and newest.whole.features and len(whole) == len(states):
        _load(pipeline, session, window, newest.whole)
        is_exact = True
    else:
        _compute(pipeline, session, window)
        is_exact = len(window) == boundary
    session.features.frames = boundary * session.plan.latent_frames
    session.text_kv(session.plan.prompt if newest is None else newest.prompt)
    session.recache.go_on(window, () if newest is None else newest.pending)
    session.holds_camera_of(newest)
    return session.set_random_state(None if newest is None else newest.random_state) and is_exact


def _load(pipeline: Pipeline, session: SessionState, window: Sequence[KeptChunk], state: WholeState) -> None:
    frames: dict[int, tuple[Tensor, ...]] = {}
    for chunk in window:
        assert chunk.whole is not None
        frames |= chunk.whole.kv
    frames |= state.again
    for number, cache in enumerate(session.windows):
        cache.load(state.frame_of_slot, {frame: both[number] for frame, both in frames.items()}.__getitem__)
    session.features.slots = [
        to_device(slot, pipeline.device) if isinstance(slot, Tensor) else slot for slot in state.features
    ]
    last = state.last_frame
    session.postprocessor.go_on_from(None if last is None else to_device(last, pipeline.device))


def _compute(pipeline: Pipeline, session: SessionState, window: Sequence[KeptChunk]) -> None:
    """Window and VAE features from latents, with the conditions that each chunk had."""
    for cache in session.windows:
        cache.clear()
    by_index = {chunk.index: chunk for chunk in window}
    in_turn = {chunk.recached for chunk in window}
    for chunk in window:
        session.limit_window(chunk.recent_frames)
        # One that was computed again with a chunk that has left the window has its newer prompt at once.
        prompt = chunk.prompt if chunk.index in in_turn else window[-1].prompts.get(chunk.index, chunk.prompt)
        text_kv = session.text_kv(prompt)
        if chunk.recached in by_index:
            commit_again(pipeline, session, by_index[chunk.recached], text_kv)
        ChunkForward.of(pipeline, session, chunk.index, text_kv, chunk.relative_poses, chunk.lenses).commit(
            to_device(chunk.latents, pipeline.device)
        )
    _decode(pipeline, session, window)


def _decode(pipeline: Pipeline, session: SessionState, window: Sequence[KeptChunk]) -> None:
    """The frames of the newest chunks without a gap between them, for what the decoder keeps of them."""
    session.features.slots, session.features.frames = [None] * len(session.features.slots), 0
    newest = list(window[-1:])
    for chunk in reversed(window[:-1]):
        if chunk.index != newest[0].index - 1 or len(newest) * session.plan.latent_frames >= _DECODER_FRAMES:
            break
        newest.insert(0, chunk)
    pixels: Tensor | None = None
    decoding = pipeline.decoding(session.plan)
    with decoding.placement.on_device():
        for chunk in newest:
            latents = to_device(chunk.latents, pipeline.device)
            for i in range(session.plan.latent_frames):
                session.raise_if_cancelled()
                pixels = decoding.decode(latents[:, :, i : i + 1], session.features)
    session.postprocessor.go_on_from(None if pixels is None else to_uint8(pixels)[-1:])

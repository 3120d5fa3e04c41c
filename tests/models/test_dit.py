"""The DiT against the reference's roll-outs.

Two golden variants are left out because what they exercise is not offered: ``kv_override_changes_mid_session`` (sink
and window are fixed when a session opens) and ``sink3_kv4`` (a window smaller than sink + chunk is refused).
"""

from __future__ import annotations

import pytest
import torch

from lingbot_rt.engine.flow_match import FlowSchedule
from lingbot_rt.models.checkpoint import load_dit
from lingbot_rt.models.quantize import FP8
from lingbot_rt.models.rope import rope_tables

from .conftest import CPU, Rollout, new_cache

TOLERANCE = 2e-5
TOKENS = 24


def worst(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return (got.double() - expected.double()).abs().max().item()


def test_main_rollout(dit, arrays):
    """Flow and x0 of every step and the latents of seven chunks equal the reference's, window sliding from chunk 3."""
    inputs, expected = arrays("dit/rollout_main_inputs"), arrays("dit/rollout_main_outputs")
    rollout = Rollout(dit, inputs, new_cache(dit))
    for chunk in range(7):
        assert worst(rollout.step(), expected["latents"][chunk]) <= TOLERANCE
        assert worst(torch.stack(rollout.flows), expected["model_out"][chunk]) <= TOLERANCE
        if chunk < 2:
            x0s = torch.stack([x0.transpose(1, 2) for x0 in rollout.x0s])
            assert worst(x0s, expected["x0_first_two_chunks"][chunk]) <= TOLERANCE


def test_window_after_context_pass(dit, arrays):
    """The window holds the reference's K/V, by absolute frame, before and after it slid."""
    expected = arrays("dit/rollout_main_kv")
    rollout = Rollout(dit, arrays("dit/rollout_main_inputs"), new_cache(dit))
    for chunk in range(7):
        rollout.step()
        if chunk not in (0, 6):
            continue
        frames = [0, 1, 2] if chunk == 0 else [0, 1, 2, 15, 16, 17, 18, 19, 20]
        slots = {frame: slot for slot, frame in enumerate(rollout.cache.frame_of_slot) if frame is not None}
        assert sorted(slots) == frames
        for layer in range(2):
            for name, got in zip("kv", rollout.cache.view(layer), strict=True):
                whole = expected[f"kv_after_chunk{chunk}_layer{layer}_{name}"]
                for golden_slot, frame in enumerate(frames):
                    ours = got[:, slots[frame] * TOKENS : (slots[frame] + 1) * TOKENS]
                    assert worst(ours, whole[:, golden_slot * TOKENS : (golden_slot + 1) * TOKENS]) <= TOLERANCE


@pytest.mark.parametrize(
    ("variant", "sink", "window"),
    [("sink0_kv6", 0, 6), ("sink0_kv3", 0, 3), ("sink1_kv7", 1, 7), ("sink6_kv9", 6, 9), ("sink3_kv45", 3, 45)],
)
def test_sink_and_window(dit, arrays, variant, sink, window):
    """Other sinks and windows, also where evictions are not aligned with chunks, equal the reference's latents."""
    rollout = Rollout(dit, arrays("dit/rollout_main_inputs"), new_cache(dit, sink, window))
    for expected in arrays(f"dit/rollout_{variant}")["latents"]:
        assert worst(rollout.step(), expected) <= TOLERANCE


def test_interactive_window(dit, arrays):
    """The still chunk 4 sees the sink and itself, the moving ones three frames more: the context passes do too."""
    cache = new_cache(dit, recent=(3, 6))
    rollout = Rollout(dit, arrays("dit/rollout_main_inputs"), cache)
    for chunk, expected in enumerate(arrays("dit/rollout_interactive_window")["latents"]):
        cache.limit(3 if chunk == 4 else 6)
        assert worst(rollout.step(), expected) <= TOLERANCE
        assert cache.visible_frames == (3 if chunk == 0 else 6 if chunk in (1, 4) else 9)


def test_a_limited_window_is_a_smaller_window(dit, arrays):
    """Chunks that all see few frames of a large window give what a window of that size gives, in fp8 too."""
    inputs = arrays("dit/rollout_main_inputs")
    for dtype, tolerance in ((torch.float32, TOLERANCE), (FP8, 5e-3)):
        small = Rollout(dit, inputs, new_cache(dit, sink=1, window=6, dtype=dtype))
        cache = new_cache(dit, sink=1, window=15, dtype=dtype, recent=(3, 5, 11))
        limited = Rollout(dit, inputs, cache)
        cache.limit(5)
        for _ in range(6):
            assert worst(limited.step(), small.step()) <= tolerance


def test_no_camera(dit, arrays):
    """Without a ray map the camera injector is skipped."""
    rollout = Rollout(dit, arrays("dit/rollout_main_inputs"), new_cache(dit), camera=False)
    for expected in arrays("dit/rollout_no_camera")["latents"]:
        assert worst(rollout.step(), expected) <= TOLERANCE


def test_prompt_change(dit, arrays):
    """New text K/V from chunk 3 on, with the self-attention history kept."""
    prompts = {0: "prompt_embeds", 3: "prompt_embeds_alt"}
    rollout = Rollout(dit, arrays("dit/rollout_main_inputs"), new_cache(dit), prompts=prompts)
    for expected in arrays("dit/rollout_prompt_change")["latents"]:
        assert worst(rollout.step(), expected) <= TOLERANCE


def test_two_steps(dit, arrays):
    """Two denoise steps a chunk: the time embedding goes by the timestep's value, not by the step's number."""
    golden = arrays("dit/rollout_two_steps")
    inputs = arrays("dit/rollout_main_inputs") | {name: golden[name] for name in ("init_noise", "renoise")}
    rollout = Rollout(dit, inputs, new_cache(dit), FlowSchedule(10.0, (1000, 642)))
    for expected in golden["latents"]:
        assert worst(rollout.step(), expected) <= TOLERANCE


def test_bf16(dit_folder, arrays):
    """In bfloat16 the latents stay within 2e-2 relative RMS of the reference's bfloat16 roll-out."""
    dit = load_dit(dit_folder, torch.bfloat16, CPU)
    golden = arrays("dit/rollout_bf16")
    inputs = arrays("dit/rollout_main_inputs") | {name: golden[name] for name in ("init_noise", "renoise")}
    rollout = Rollout(dit, inputs, new_cache(dit))
    for expected in golden["latents"]:
        got = rollout.step()
        assert got.dtype == torch.bfloat16
        assert ((got.float() - expected).norm() / expected.norm()).item() <= 2e-2


def test_intermediates(dit, arrays):
    """Each named part of the first forward equals the reference's, so that a failure names the part."""
    inputs, expected = arrays("dit/rollout_main_inputs"), arrays("dit/intermediates_chunk0_step0")
    found = {}

    def keep(name):
        def hook(module, args, output):
            found.setdefault(name, output)

        return hook

    block = dit.blocks[0]
    named = {
        "patch_embedding": dit.patch_embedding,
        "patch_embedding_wancamctrl": dit.patch_embedding_wancamctrl,
        "c2ws_mlp": dit.c2ws_hidden_states_layer2,
        "time_embedder": dit.time_embedding,
        "time_modulation": dit.time_projection,
        "text_embedder": dit.text_embedding,
        "block0_norm_q": block.self_attn.norm_q,
        "block0_norm_k": block.self_attn.norm_k,
        "block0_to_out": block.self_attn.o,
        "block0_cross_to_out": block.cross_attn.o,
        "block0_ffn": block.ffn,
        "proj_out": dit.head.head,
    }
    hooks = [module.register_forward_hook(keep(name)) for name, module in named.items()]
    try:
        Rollout(dit, inputs, new_cache(dit)).step()
    finally:
        for hook in hooks:
            hook.remove()
    expected["patch_embedding"] = expected["patch_embedding"].flatten(2).transpose(1, 2)
    for name in named:
        assert worst(found[name], expected[name]) <= TOLERANCE, name


@pytest.mark.parametrize("start", [0, 3, 18])
def test_rope_tables(arrays, start):
    """RoPE angles of absolute frames equal the reference's."""
    expected = arrays("dit/intermediates_chunk0_step0")
    cos, sin = rope_tables(32, start, 3, 4, 6, CPU)
    assert worst(cos, expected[f"rope_cos_start{start}"]) <= 1e-6
    assert worst(sin, expected[f"rope_sin_start{start}"]) <= 1e-6


def test_rope_far_from_the_start():
    """A session's ten-thousandth chunk still has exact angles: they come from float64."""
    cos, _ = rope_tables(32, 30_000, 1, 1, 1, CPU)
    assert cos[0, 0].item() == pytest.approx(torch.tensor(30_000.0, dtype=torch.float64).cos().item(), abs=1e-7)


def test_context_pass_stops_at_the_last_keys(dit, arrays):
    """The context pass runs neither the last block's attention and feed-forward nor the head."""
    inputs = arrays("dit/rollout_main_inputs")
    ran = []
    last = dit.blocks[-1]
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: ran.append(name))
        for name, module in {"o": last.self_attn.o, "ffn": last.ffn, "head": dit.head.head}.items()
    ]
    text_kv, cache = dit.text_kv(inputs["prompt_embeds"]), new_cache(dit)
    channels = torch.cat([inputs["init_noise"][0], inputs["condition"][:, :, :3]], dim=1)
    try:
        assert dit(channels, 0.0, text_kv, None, cache, 0, commit=True) is None
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == []
    assert all(side.abs().sum() > 0 for side in cache.view(1))

"""The regression check finds faults: with one thing broken at a time, the affected cases fail and the others pass.

The cases run on the golden checkpoint (window 9, sink 3), where any wrong key, position or feature changes every pixel.
"""

from __future__ import annotations

import msgspec
import pytest
import torch

from lingbot_rt.engine.dmd import ChunkForward
from lingbot_rt.engine.engine import Engine
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.models import dit
from lingbot_rt.models.feature_cache import FeatureCache
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.regression.check import CaseCheck
from lingbot_rt.regression.ground_truth import GroundTruthWriter
from lingbot_rt.regression.session_runner import EngineRunner, scripted_init
from lingbot_rt.session.camera_path import CameraPath


def ring_off_by_one(patch):
    """Once the ring is full, each frame is written one slot too far and the wrong one is overwritten."""
    begin = KVCache.begin

    def shifted(self, start_frame, num_frames):
        begin(self, start_frame + (start_frame >= self.window_frames), num_frames)

    patch.setattr(KVCache, "begin", shifted)


def sink_dropped(patch):
    """The window has no sink: the first frames are overwritten like any other."""
    make = KVCache.__init__

    def without_sink(self, **given):
        make(self, **(given | {"sink_frames": 0}))

    patch.setattr(KVCache, "__init__", without_sink)


def rope_restarted(patch):
    """Every chunk gets the temporal positions of the first."""
    tables = dit.rope_tables
    patch.setattr(dit, "rope_tables", lambda head_dim, start_frame, *rest: tables(head_dim, 0, *rest))


def context_skipped(patch):
    """The context pass is skipped: the last noisy forward's K/V stay in the window."""
    patch.setattr(ChunkForward, "commit", lambda self, latents: None)


def features_reset(patch):
    """The VAE's feature cache is cleared at each chunk."""
    decode = StreamingVAE.decode_latent_frame

    def forgetful(self, latent, features):
        if features.frames and features.frames % 3 == 0:
            features.slots = [slot * 0 if isinstance(slot, torch.Tensor) else slot for slot in features.slots]
        return decode(self, latent, features)

    patch.setattr(StreamingVAE, "decode_latent_frame", forgetful)


def text_kv_stale(patch):
    """A new prompt does not change the text K/V."""
    build = SessionState.text_kv

    def stale(self, prompt):
        return build(self, self.plan.prompt)

    patch.setattr(SessionState, "text_kv", stale)


def camera_history_cut(patch):
    """Each chunk scales its steps by its own longest one and forgets the previous pose."""
    extend = CameraPath.extend

    def forgetful(self, actions):
        self._previous, self._longest = None, 0.0
        return extend(self, actions)

    patch.setattr(CameraPath, "extend", forgetful)


def features_shared(patch):
    """All sessions share one feature cache."""
    made = []

    make = StreamingVAE.new_features

    def one_for_all(self):
        if self.device.type == "meta":  # a count of memory, not a session
            return make(self)
        if not made:
            made.append(make(self))
        return made[0]

    patch.setattr(StreamingVAE, "new_features", one_for_all)
    patch.setattr(FeatureCache, "release", lambda self: None)


FAULTS = [
    # (what is broken, cases that must fail, cases that must pass)
    (ring_off_by_one, {"sliding-window", "script", "sink-and-window"}, {"neutral", "guidance"}),
    (sink_dropped, {"sliding-window", "sink-and-window"}, {"neutral", "guidance"}),
    (rope_restarted, {"neutral", "script", "sliding-window"}, set()),
    (context_skipped, {"neutral", "script", "guidance"}, set()),
    (features_reset, {"neutral", "script", "held-keys"}, set()),
    (text_kv_stale, {"prompt-switch"}, {"neutral", "sliding-window", "guidance"}),
    (camera_history_cut, {"script", "sliding-window"}, {"neutral"}),
    (features_shared, {"in-turn-second"}, {"neutral"}),
]
CHECKED = {
    "neutral",
    "script",
    "held-keys",
    "prompt-switch",
    "sliding-window",
    "sink-and-window",
    "guidance",
    "in-turn-second",
}


@pytest.fixture(scope="module")
def cases(shipped_cases):
    """At a smaller size: no fault depends on it."""
    small = {"size": "64x64", "num_inference_steps": 2}
    chosen = [case for case in shipped_cases if case.name in CHECKED]
    return [msgspec.structs.replace(case, init=case.init | small) for case in chosen]


async def run_all(config, cases, make_consumer):
    """Runs all cases on one engine and returns the result of each case's consumer."""
    engine = Engine(config)
    await engine.start()
    runner, results = EngineRunner(engine, config), []
    try:
        for case in cases:
            consumer = make_consumer(case)
            async for chunk in runner.run(scripted_init(case.init, case.events, case.chunks)):
                consumer.add(chunk)
            results.append(consumer.finish(runner.origin))
    finally:
        await engine.stop()
    return results


@pytest.fixture(scope="module")
async def ground_truth(golden_config, cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gt")
    await run_all(golden_config, cases, lambda case: GroundTruthWriter(folder, case))
    return folder


async def verdicts(config, cases, ground_truth) -> dict[str, list[str]]:
    reports = await run_all(config, cases, lambda case: CaseCheck(case, ground_truth, check_latency=False))
    return {report.name: report.problems for report in reports}


async def test_an_unchanged_build_passes_every_case(golden_config, cases, ground_truth):
    """The same build produces the same bytes: every case is exact."""
    assert await verdicts(golden_config, cases, ground_truth) == {case.name: [] for case in cases}


@pytest.mark.parametrize(("fault", "must_fail", "must_pass"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
async def test_faults(golden_config, cases, ground_truth, monkeypatch, fault, must_fail, must_pass):
    """Cases that a fault affects fail, cases that it can't affect pass."""
    chosen = [case for case in cases if case.name in must_fail | must_pass]
    if fault is features_shared:
        chosen = [case for case in cases if case.name in {"neutral", "in-turn-second"}]
    fault(monkeypatch)
    found = await verdicts(golden_config, chosen, ground_truth)
    assert {name for name, problems in found.items() if problems} >= must_fail
    assert {name for name, problems in found.items() if not problems} >= must_pass


async def test_another_seed_is_another_world(golden_config, cases, ground_truth):
    """Exactness is no accident of constant pictures: with another seed all frames of chunk 1 differ."""
    case = next(case for case in cases if case.name == "neutral")
    other = msgspec.structs.replace(case, init=case.init | {"seed": 7})
    (problems,) = (await verdicts(golden_config, [other], ground_truth)).values()
    assert any(problem.startswith("chunk 1: 12 of 12 frames") for problem in problems)

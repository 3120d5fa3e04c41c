"""Schedules, x0 and re-noising against the reference's numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lingbot_rt.engine.flow_match import FlowSchedule, predict_x0, renoise

SCHEDULES = {"v1": FlowSchedule(10.0, (1000, 821, 642, 321)), "v2": FlowSchedule(5.0, (1000, 750, 500, 250))}


@pytest.fixture(scope="module")
def data(golden) -> dict[str, torch.Tensor]:
    with np.load(golden("scheduler/scheduler.npz")) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.mark.parametrize("version", SCHEDULES)
def test_distilled_steps(data, version):
    """The warped timesteps and sigmas of both checkpoints' schedules."""
    steps = SCHEDULES[version].steps_for(4)
    assert np.abs([step.timestep for step in steps] - data[f"{version}.dmd_timesteps_warped"].numpy()).max() <= 1e-4
    assert np.abs([step.sigma for step in steps] - data[f"{version}.dmd_sigmas"].numpy()).max() <= 1e-6


@pytest.mark.parametrize("version", SCHEDULES)
@pytest.mark.parametrize(("name", "dtype"), [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_x0_and_renoise(data, version, name, dtype):
    """x0 of each step and its re-noising to the next, in float32 to 1e-6 and in bfloat16 to one last place."""
    steps = SCHEDULES[version].steps_for(4)
    x_t, pred, noise = (data[f"{version}.{part}"] for part in ("x_t", "pred", "noise"))
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if name == "f32" else {"atol": 1e-6, "rtol": 2**-7}
    for i, step in enumerate(steps):
        x0 = predict_x0(x_t.to(dtype), pred.to(dtype), step.sigma)
        assert x0.dtype == dtype
        torch.testing.assert_close(x0.float(), data[f"{version}.x0_step{i}_{name}"], **tolerance)
        if i + 1 < len(steps):
            again = renoise(x0, noise.to(dtype), steps[i + 1].sigma)
            assert again.dtype == dtype
            torch.testing.assert_close(again.float(), data[f"{version}.renoised_to_step{i + 1}_{name}"], **tolerance)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [1000]), (2, [1000, 642]), (3, [1000, 821, 321]), (5, [1000, 800, 600, 400, 200])],
)
def test_other_step_counts(count, expected):
    """Fewer steps pick from the distilled list, more spread evenly; both are warped by the shift."""
    plain = FlowSchedule(1.0, (1000, 821, 642, 321)).steps_for(count)
    assert [step.timestep for step in plain] == pytest.approx(expected, abs=1e-3)
    shifted = SCHEDULES["v1"].steps_for(count)
    assert [step.sigma for step in shifted] == pytest.approx([10 * t / (1000 + 9 * t) for t in expected], abs=1e-6)


@pytest.mark.parametrize("count", range(1, 51))
def test_every_step_count_starts_at_noise_and_descends(count):
    """1 to 50 steps: as many as asked, from pure noise, strictly down, never to zero."""
    sigmas = [step.sigma for step in SCHEDULES["v1"].steps_for(count)]
    assert len(sigmas) == count
    assert sigmas[0] == 1
    assert all(later < earlier for earlier, later in itertools.pairwise(sigmas))
    assert sigmas[-1] > 0

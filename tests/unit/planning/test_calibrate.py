import os

import pytest

from bit_ray.planning import calibrate, costs
from bit_ray.planning.calibrate import calibrated
from bit_ray.planning.config import ClusterPlanConfig, FailureConfig
from bit_ray.planning.forecast import forecast
from bit_ray.planning.inputs import inputs_of


@pytest.mark.parametrize("restart_s", [0.0, 7.0])
def test_a_step_of_this_machine_takes_the_place_of_what_is_assumed(
    restart_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_SECONDS_OF_STEPS", 0.2)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    config = ClusterPlanConfig(
        gpus=1,
        calibrate=True,
        model="R1-1-1-1x0.5",
        crop_size=32,
        num_images=3000,
        num_classes=5,
        epochs=2,
        global_batch_size=8,
        failures=FailureConfig(restart_s=restart_s),
    )
    inputs = calibrated(config, inputs_of(config))
    found = forecast(config, inputs)
    named = {assumption.name: assumption for assumption in inputs.assumptions}
    assert len(named) == len(inputs.assumptions)
    assert named["step, per image"].value == inputs.step_s
    assert 1e-5 < inputs.step_s.low <= inputs.step_s.likely <= inputs.step_s.high < 10
    assert "measured with " in named["step, per image"].source
    # What is planned is a start, and 6,000 images one after the other, but for the checkpoints.
    start = restart_s or costs.RESTART_HERE_S.likely
    assert named["start, and restart"].value.likely == inputs.restart_s.likely == start
    assert found.total_s.likely == pytest.approx(start + 6000 * inputs.step_s.likely, rel=0.01)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before  # only the thread that measured gave way

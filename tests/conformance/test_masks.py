"""Mask optimisation: every map of the reference, at every threshold, to the last pixel."""

import numpy as np
import pytest

from jointseg_jax.annotations import masks


@pytest.mark.cases("jodiffusion_mask_optimization*")
def test_absorb_is_the_original(case, capsys):
    inputs, outputs, taus = case.inputs, case.outputs, case.config["thresholds"]
    numbers = [name.removeprefix("map_") for name in inputs if name.startswith("map_")]
    for number in numbers:
        labels = inputs[f"map_{number}"]
        for tau in taus:
            want, note = outputs[f"t{tau}_{number}"], f"map {number}, threshold {tau}"
            np.testing.assert_array_equal(masks.absorb(labels, tau), want, err_msg=note)
            ranked = masks._ranked(labels)
            masks.sequential(ranked, tau, masks.NONE, masks.sweep_crops)
            np.testing.assert_array_equal(ranked.values[ranked.ranks], want, err_msg=note)
    assert len(numbers) * len(taus) == len(outputs)
    with capsys.disabled():
        print(f"\n{case.name}: {len(numbers)} maps x {len(taus)} thresholds exact, both sweeps")

"""Segmentation metrics and the mean count difference against the reference's numbers."""

import numpy as np
import pytest

from jointseg_jax.evaluation.confusion import Confusion, mcd


@pytest.mark.cases("metric_miou*")
def test_confusion(case):
    gt, pred, outputs = case.inputs["gt"], case.inputs["pred"], case.outputs
    confusion = Confusion(len(outputs["confusion"]))
    for one, other in zip(gt, pred):
        confusion.add(one, other)
    np.testing.assert_array_equal(confusion.matrix, outputs["confusion"])
    iou, skipped, zero = confusion.iou, confusion.miou(), confusion.miou(absent="zero")
    got = {
        "iou": iou,
        "miou_present": skipped,
        "miou_absent_as_zero": zero,
        "pixel_accuracy": confusion.pixel_accuracy,
        "mean_accuracy": confusion.mean_accuracy,
        "frequency_weighted_iou": confusion.frequency_weighted_iou,
        "jodiffusion_miou": zero,
        "jodiffusion_iou": np.nan_to_num(iou),
        "torchmetrics_macro": skipped,
        "torchmetrics_none": np.nan_to_num(iou),
        "torchmetrics_micro": confusion.hits.sum() / confusion.union.sum(),
    }
    assert {*got, "confusion"} == set(outputs)
    for name, value in got.items():
        case.check(name, value)


@pytest.mark.cases("analog_bits*")
def test_mean_count_difference(case):
    inputs = case.inputs
    numbers = [name.removeprefix("map_") for name in inputs if name.startswith("map_")]
    assert numbers
    for i in numbers:
        raw, made = inputs[f"map_{i}"], inputs[f"gen_{i}"]
        classes = int(max(raw.max(), made.max())) + 1
        case.check(f"mcd_{i}", mcd(raw, made, classes))
        # raw id 0 is void: as VOID it is a category again, or left out
        case.check(f"mcd_{i}", mcd(raw - 1, made - 1, classes - 1))
        zeros = abs(int((raw == 0).sum()) - int((made == 0).sum())) / raw.size
        want = case.outputs[f"mcd_{i}"] - zeros
        case.check(f"mcd_{i}", mcd(raw - 1, made - 1, classes - 1, void=False), want=want)

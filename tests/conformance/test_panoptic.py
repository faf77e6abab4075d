"""Panoptic quality against the reference's numbers."""

import numpy as np
import pytest

from jointseg_jax.evaluation.panoptic_quality import PanopticQuality, mean


@pytest.mark.cases("metric_panoptic_quality*")
def test_panoptic_quality(case):
    config, inputs = case.config, case.inputs
    quality = PanopticQuality(config["things"], config["stuffs"], rule="torchmetrics")
    quality.add(inputs["gt"], inputs["pred"])
    per_class = np.stack([quality.pq, quality.sq, quality.rq], axis=-1)
    got = {
        "cat_order": quality.categories,
        "tp": quality.tp,
        "fp": quality.fp,
        "fn": quality.fn,
        "iou_sum": quality.iou_sum,
        "pq": mean(quality.pq),
        "pq_sq_rq_per_class": np.nan_to_num(per_class),  # the reference says 0 of absent classes
        "pq_sq_rq_mean": [mean(column) for column in per_class.T],
        "modified_pq": mean(quality.modified),
    }
    assert set(got) == set(case.outputs)
    for name, value in got.items():
        case.check(name, value)

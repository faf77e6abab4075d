"""Reports on maps whose numbers are known: perfect, shifted, shuffled."""

import json

import numpy as np

from jointseg_jax.evaluation.alignment import Alignment, Reconstruction, cycle
from jointseg_jax.types import VOID

NAMES = ("sky", "grass", "ball", "box")


def halves(height=16, width=16):
    """Sky above grass; no ball."""
    labels = np.zeros((2, height, width), np.int16)
    labels[:, height // 2 :] = 1
    return labels


def test_a_perfect_codec():
    measured = Reconstruction(NAMES)
    measured.add(halves(), halves().astype(np.int32))
    report = measured.report()
    assert report["reconstruction_miou"] == report["edge_miou"] == report["pixel_accuracy"] == 1.0
    assert report["per_class_iou"] == {"sky": 1.0, "grass": 1.0, "ball": None, "box": None}
    assert report["worst_class"] == {"name": "sky", "iou": 1.0}
    json.dumps(report, allow_nan=False)


def test_a_shift_of_the_boundary_is_an_error_at_edges():
    labels, decoded = halves(), halves()
    decoded[:, 8] = 0  # the boundary one row lower
    measured = Reconstruction(NAMES)
    measured.add(labels, decoded)
    report = measured.report()
    sky, grass = 8 / 9, 7 / 8
    assert report["reconstruction_miou"] == round((sky + grass) / 2, 6)
    assert report["worst_class"] == {"name": "grass", "iou": grass}
    # within 2 pixels of the boundary: 2 rows of each class, one row of grass called sky
    assert report["edge_miou"] == round((2 / 3 + 1 / 2) / 2, 6)


def test_rows_that_are_not_valid_and_void_do_not_count():
    labels, decoded = halves(), halves()
    decoded[1] = 3
    labels[0, :2], decoded[0, :2] = VOID, 3
    measured = Reconstruction(NAMES)
    measured.add(labels, decoded, np.array([True, False]))
    assert measured.report()["reconstruction_miou"] == 1.0


def test_nothing_to_measure_is_null():
    report = Reconstruction(NAMES).report()
    assert report["reconstruction_miou"] is report["worst_class"] is report["edge_miou"] is None
    report = Alignment(NAMES).report()
    assert report["alignment_miou"] is report["chance_miou"] is None


def test_chance_compares_with_other_masks():
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 4, (40, 8, 8)).astype(np.int16)
    alignment = Alignment(NAMES)
    for i, mask in enumerate(masks):
        alignment.add(mask, mask, masks[i - 1])
    report = alignment.report()
    assert report["alignment_miou"] == 1.0
    # independent uniform labels: IoU = (1/16) / (7/16); 2,560 pixels give it to about 0.01
    assert abs(report["chance_miou"] - 1 / 7) < 0.04
    assert set(report["alignment_per_class"]) == set(NAMES)


def test_void_in_a_generated_mask_is_no_agreement():
    alignment = Alignment(NAMES)
    alignment.add(np.zeros((4, 4), np.int16), np.full((4, 4), VOID, np.int16))
    assert alignment.report()["alignment_miou"] == 0.0


def test_the_cycle_leaves_no_mask_with_its_own_image():
    for count in (2, 3, 17):
        order = cycle(count, seed=5)
        assert sorted(order) == list(range(count))
        assert (order != np.roll(order, 1)).all()
        np.testing.assert_array_equal(order, cycle(count, seed=5))
    assert (cycle(17, seed=5) != cycle(17, seed=6)).any()

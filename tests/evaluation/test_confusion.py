"""The confusion matrix against counting by hand, and what each number says at its ends."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jointseg_jax.evaluation.confusion import Confusion
from jointseg_jax.types import FILE_VOID, VOID

CLASSES = 4
LABELS = st.sampled_from([VOID, *range(CLASSES)])
BATCHES = arrays.arrays(np.int16, (3, 5, 4), elements=LABELS)
SETTINGS = settings(max_examples=40, deadline=None)  # no deadline: machines differ


def counted(gt, pred):
    confusion = Confusion(CLASSES)
    confusion.add(gt, pred)
    return confusion


@SETTINGS
@given(gt=BATCHES, pred=BATCHES)
def test_iou_by_hand(gt, pred):
    confusion = counted(gt, pred)
    known = gt != VOID
    for label in range(CLASSES):
        both = ((gt == label) & (pred == label)).sum()
        either = (known & ((gt == label) | (pred == label))).sum()
        got = confusion.iou[label]
        assert np.isnan(got) if either == 0 else got == both / either
        for other in range(CLASSES):
            assert confusion.matrix[label, other] == ((gt == label) & (pred == other)).sum()
    if known.any():
        assert confusion.pixel_accuracy == pytest.approx((gt == pred)[known].mean(), rel=1e-12)


@SETTINGS
@given(gt=BATCHES, pred=BATCHES, valid=arrays.arrays(bool, 3))
def test_parts_add_up_in_any_grouping(gt, pred, valid):
    parts = Confusion(CLASSES)
    for one, other in zip(gt, pred):
        single = Confusion(CLASSES)
        single.add(one, other)
        parts.merge(single)
    np.testing.assert_array_equal(parts.matrix, counted(gt, pred).matrix)
    np.testing.assert_array_equal(parts.true, counted(gt, pred).true)
    chosen = Confusion(CLASSES)
    chosen.add(gt, pred, valid)
    np.testing.assert_array_equal(chosen.matrix, counted(gt[valid], pred[valid]).matrix)


def test_absent_classes_are_skipped_or_zero():
    gt = np.array([[0, 0, 1, VOID]], np.int16)
    confusion = counted(gt, np.array([[0, 0, 1, 2]], np.int16))
    assert confusion.miou() == 1.0 and confusion.miou(absent="zero") == 0.5
    assert np.isnan(confusion.iou[2]), "a prediction where nothing is annotated does not count"
    assert confusion.mean_accuracy == confusion.frequency_weighted_iou == 1.0


def test_a_prediction_that_is_no_class_is_wrong():
    gt = np.zeros((1, 4), np.int16)
    confusion = counted(gt, np.array([[0, VOID, FILE_VOID, CLASSES]], np.int16))
    assert confusion.iou[0] == confusion.pixel_accuracy == 0.25
    assert confusion.miou() == 0.25, "no class was predicted in its place"


def test_255_is_void_in_files_and_a_class_among_300():
    gt = np.array([[255, 3]], np.uint8)
    assert counted(gt, gt).true.sum() == 1
    many = Confusion(300)
    many.add(gt, gt)
    assert many.true[255] == 1


def test_nothing_counted_is_nan():
    confusion = counted(np.full((2, 2), VOID, np.int16), np.zeros((2, 2), np.int16))
    numbers = (confusion.miou(), confusion.pixel_accuracy, confusion.mean_accuracy)
    assert np.isnan(numbers).all() and np.isnan(confusion.frequency_weighted_iou)


def test_mistakes_are_named():
    confusion = Confusion(CLASSES)
    with pytest.raises(ValueError, match=r"true labels \[7\] given \(2 px\); they must be 0..3"):
        confusion.add(np.array([[7, 7]]), np.array([[0, 0]]))
    with pytest.raises(ValueError, match="shapes must be equal"):
        Confusion.add.__wrapped__(confusion, np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="5 classes given, here are 4"):
        confusion.merge(Confusion(5))
    with pytest.raises(ValueError, match="at least 1"):
        Confusion(0)

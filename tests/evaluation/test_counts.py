"""Mean count difference: 0 for equal histograms, 2 for disjoint ones, VOID in or out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jointseg_jax.evaluation.confusion import mcd, shares
from jointseg_jax.types import FILE_VOID, VOID

MAPS = arrays.arrays(np.int16, (2, 4, 6), elements=st.sampled_from([VOID, 0, 1, 2]))


@settings(max_examples=40, deadline=None)  # no deadline: machines differ
@given(gt=MAPS, pred=MAPS)
def test_mcd_by_hand(gt, pred):
    want = [
        sum(abs(int((a == c).sum()) - int((b == c).sum())) for c in (VOID, 0, 1, 2)) / a.size
        for a, b in zip(gt, pred)
    ]
    # a sum of at most 4 quotients: a few units in the last place of 2
    assert mcd(gt, pred, 3) == pytest.approx(np.mean(want), abs=1e-14)
    void = [abs(int((a == VOID).sum()) - int((b == VOID).sum())) / a.size for a, b in zip(gt, pred)]
    assert mcd(gt, pred, 3, void=False) == pytest.approx(np.mean(want) - np.mean(void), abs=1e-14)
    assert 0 <= mcd(gt, pred, 3, void=False) <= mcd(gt, pred, 3) <= 2
    assert mcd(gt, pred, 3) == mcd(pred, gt, 3)


def test_only_the_histogram_counts():
    labels = np.array([[0, 1, 1, 2]], np.int16)
    assert mcd(labels, labels[:, ::-1], 3) == 0
    assert mcd(np.zeros((2, 2), int), np.ones((2, 2), int), 2) == 2


def test_void_of_files_and_ids_that_are_no_category():
    labels = np.array([[0, FILE_VOID, VOID, 9]], np.int16)
    np.testing.assert_array_equal(shares(labels, 2), [0.25, 0, 0.5])
    np.testing.assert_array_equal(shares(labels[None], 2), [[0.25, 0, 0.5]])

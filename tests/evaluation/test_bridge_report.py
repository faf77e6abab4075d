"""Chance of a bridge: every map against what was made of another record's."""

import numpy as np
import pytest

from jointseg_jax.evaluation.bridge_report import _alignment


def test_chance_never_compares_a_record_with_itself():
    names = tuple("abcdefgh")
    judged = [(np.full((2, 2), i), np.full((2, 2), i)) for i in range(len(names))]
    found = _alignment(names, judged, seed=3)
    assert found.own.miou() == 1.0
    assert found.others.miou() == 0.0  # each class fills one record: any other is all wrong
    assert np.all(found.others.matrix.sum(1) == 4)  # and every record was compared once


def test_one_record_has_no_chance_level():
    one = np.zeros((2, 2), int)
    assert np.isnan(_alignment(("a", "b"), [(one, one)], seed=0).others.miou())


@pytest.mark.parametrize("seed", [0, 1])
def test_neighbours_in_a_film_are_no_measure_of_chance(seed):
    """Records in order of time look alike; the other one comes from a random circle instead."""
    names = ("road", "sky")
    rows = [np.full((1, 100), 0) for _ in range(100)]
    for i, row in enumerate(rows):
        row[0, :i] = 1  # the border moves by a pixel from record to record
    found = _alignment(names, [(row, row) for row in rows], seed)
    assert found.others.miou() < 0.7  # 0.98 with the record before

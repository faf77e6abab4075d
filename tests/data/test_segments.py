"""Segments counted, numbered anew and written the COCO way."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jointseg_jax.data.classes import Classes
from jointseg_jax.data.images import decode_segment_ids, encode_segment_ids
from jointseg_jax.data.segments import labels_of_segments, listed, numbered, parts
from jointseg_jax.types import VOID

CLASSES = Classes(names=("sky", "ball", "box"), isthing=(False, True, True))
SHAPE = (5, 7)
LABELS = arrays.arrays(np.int16, SHAPE, elements=st.integers(VOID, 2))
SEGMENTS = arrays.arrays(np.int32, SHAPE, elements=st.sampled_from([0, 1, 2, 70_000, 2**31 - 1]))


@settings(max_examples=60, deadline=None)
@given(LABELS, SEGMENTS)
def test_parts_are_the_pairs_that_occur(labels, segments):
    found = parts(labels, segments)
    np.testing.assert_array_equal(found.labels[found.codes], labels)
    np.testing.assert_array_equal(found.segments[found.codes], segments)
    pairs = [*zip(found.labels.tolist(), found.segments.tolist())]
    assert pairs == sorted({*zip(labels.ravel().tolist(), segments.ravel().tolist())})
    for code, (area, first) in enumerate(zip(found.areas, found.first)):
        places = np.flatnonzero(found.codes == code)
        assert (area, first) == (len(places), places[0])


def naive_numbers(labels, segments, most):
    """The instances in raster order, the smallest (of equals the last) without a number."""
    pairs = [*zip(labels.ravel().tolist(), segments.ravel().tolist())]
    order = list(dict.fromkeys(p for p in pairs if p[1] and p[0] > 0))
    kept = sorted(order, key=lambda p: (-pairs.count(p), order.index(p)))[:most]
    names = {p: n for n, p in enumerate((p for p in order if p in kept), 1)}
    return np.array([names.get(p, 0) for p in pairs]).reshape(labels.shape)


@settings(max_examples=60, deadline=None)
@given(LABELS, SEGMENTS, st.integers(1, 6))
def test_instances_are_numbered_in_raster_order(labels, segments, most):
    numbers = numbered(labels, segments, CLASSES.isthing, most)
    np.testing.assert_array_equal(numbers, naive_numbers(labels, segments, most))
    # numbering again, or after any renaming of the ids, gives the same
    np.testing.assert_array_equal(numbered(labels, numbers, CLASSES.isthing, most), numbers)
    renamed = np.where(segments > 0, 2**31 - segments.astype(np.int64), 0)
    np.testing.assert_array_equal(numbered(labels, renamed, CLASSES.isthing, most), numbers)


@settings(max_examples=60, deadline=None)
@given(LABELS, SEGMENTS)
def test_what_is_listed_is_read_back(labels, segments):
    numbers = numbered(labels, segments, CLASSES.isthing, 99)
    ids, rows = listed(labels, numbers, CLASSES)
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        mine = ids == row["id"]
        rows_, columns = np.nonzero(mine)
        left, top, width, height = row["bbox"]
        assert row["area"] == mine.sum()
        assert (top, top + height - 1) == (rows_.min(), rows_.max())
        assert (left, left + width - 1) == (columns.min(), columns.max())
        assert (labels[mine] == row["category_id"]).all()
        assert row["isthing"] == (row["category_id"] > 0)
        assert row["iscrowd"] == (row["isthing"] and not numbers[mine].any())
    keys = ("id", "category_id", "iscrowd", "area")
    table = np.array([[row[k] for k in keys] for row in rows], np.int32).reshape(-1, 4)
    stored = decode_segment_ids(encode_segment_ids(ids), "a.png")
    again, kept = labels_of_segments(stored, table, "a.png")
    np.testing.assert_array_equal(again, labels)
    np.testing.assert_array_equal(numbered(again, kept, CLASSES.isthing, 99), numbers)


def test_ids_that_do_not_fit_are_refused():
    labels = np.ones((1, 2), np.int16)
    with pytest.raises(ValueError, match="instance numbers up to 65536 given"):
        listed(labels, np.array([[1, 65536]], np.int32), CLASSES)

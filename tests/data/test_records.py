"""The record check: every broken record is refused with a sentence."""

import pickle

import numpy as np
import pytest

from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import BadSample, check_record
from jointseg_jax.types import VOID

CLASSES = Classes(names=("sky", "car", "road"))


def record(**changes):
    good = {
        "id": "a/1",
        "image": np.zeros((4, 6, 3), np.uint8),
        "labels": np.zeros((4, 6), np.int16),
        "captions": ("a car",),
    }
    return good | changes


def labels(*values):
    array = np.zeros((4, 6), np.int16)
    array.flat[: len(values)] = values
    return array


def test_good_records_pass():
    check_record(record(), CLASSES)
    check_record(record(labels=labels(VOID, 2), captions=()), CLASSES)
    check_record(record(segments=np.ones((4, 6), np.int32)), CLASSES)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"labels": labels(21, 21, 37)},
            r"labels 21 \(2 px\), 37 \(1 px\) out of range",
        ),
        ({"labels": labels(-7)}, r"labels -7 \(1 px\)"),
        ({"labels": np.zeros((4, 6), np.uint8)}, r"labels is uint8 \(4, 6\); it must be a int16"),
        ({"labels": np.zeros((6, 4), np.int16)}, "labels is 4x6 .*; its image is 6x4"),
        ({"image": np.zeros((4, 6, 4), np.uint8)}, "3 channels"),
        ({"image": np.zeros((4, 6, 3), np.float32)}, "image is float32"),
        ({"image": None}, "image is NoneType"),
        ({"segments": np.zeros((4, 5), np.int32)}, "segments is 5x4"),
        ({"segments": np.zeros((4, 6), np.int64)}, "segments is int64"),
        ({"captions": "a car"}, "captions are a tuple"),
    ],
)
def test_broken_records_are_refused(changes, text):
    with pytest.raises(BadSample, match=text) as caught:
        check_record(record(**changes), CLASSES)
    assert str(caught.value).startswith("ERROR [data] a/1: ")


def test_many_wrong_values_are_counted_not_listed():
    with pytest.raises(BadSample, match=r"17 \(1 px\) and 4 more values out of range"):
        check_record(record(labels=labels(*range(10, 22))), CLASSES)


def test_bad_sample_names_the_file_and_survives_pickle():
    error = BadSample("voc/1.png", "labels 21", "21 classes (0-20)", "Mend the mask.")
    assert str(error) == "ERROR [data] voc/1.png: labels 21; 21 classes (0-20). Mend the mask."
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and copy.remedy == "Mend the mask."
    with pytest.raises(BadSample, match=r"somewhere\.png"):
        check_record(record(labels=labels(9)), CLASSES, where="somewhere.png")

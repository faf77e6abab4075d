import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jointseg_jax.data.classes import Classes
from jointseg_jax.data.images import encode_png
from jointseg_jax.data.labels import LabelRule, encode_labels, parse, stored_rule
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import VOID

THREE = Classes(names=("sky", "road", "tree"))


def read(rule, rows, classes=THREE):
    return rule.read(encode_png(np.array(rows, np.uint16)), "masks/a.png", classes).tolist()


def test_plain_indices_and_void():
    assert read(LabelRule(), [[0, 1], [2, 255]]) == [[0, 1], [2, VOID]]
    assert read(LabelRule(void=(0, 9), shift=1), [[0, 1], [3, 9]]) == [[VOID, 0], [2, VOID]]


def test_a_stated_void_that_is_a_class_is_refused():
    with pytest.raises(ValueError, match="file value 1 is void and also the value of class 1"):
        read(LabelRule(void=(1,)), [[0, 1, 2]])


def test_a_class_wins_over_the_default_void():
    assert read(LabelRule(table=((0, 0), (255, 1))), [[0, 255]]) == [[0, 1]]
    many = Classes(names=tuple(map(str, range(300))))
    assert read(LabelRule(), [[0, 255, 299]], many) == [[0, 255, 299]]
    assert read(LabelRule(shift=254), [[254, 255, 256]]) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [0, VOID]),
        ({"label_map": {"0": "sky", "255": "tree"}}, [0, 2]),
        ({"label_map": {"0": "sky", "255": None}}, [0, VOID]),
        ({"label_map": {"0": "sky", "255": "tree"}, "ignore_label": None}, [0, 2]),
        ({"label_map": {"0": "sky", "255": "tree"}, "ignore_label": 7}, [0, 2]),
    ],
)
def test_what_a_class_file_makes_of_255(keys, expected):
    classes, rule = parse({"classes": list(THREE.names), **keys})
    assert read(rule, [[0, 255]], classes) == [expected]


@pytest.mark.parametrize(
    "keys",
    [
        {"label_map": {"0": "sky", "255": "tree"}, "ignore_label": 255},
        {"ignore_label": [255, 2]},
        {"ignore_label": 2, "first_label": 1},
    ],
)
def test_a_class_file_that_contradicts_itself_is_refused(keys):
    with pytest.raises(ValueError, match="is void and also the value of class"):
        parse({"classes": list(THREE.names), **keys})


def test_a_table_of_values():
    rule = LabelRule(void=(), table=((7, 0), (26, 2), (300, 1), (0, VOID)))
    assert read(rule, [[7, 26], [300, 0]]) == [[0, 2], [1, VOID]]
    with pytest.raises(
        BadSample, match=r"labels 8 \(1 px\) out of range; .* of the label map, 4 in"
    ):
        read(rule, [[8, 7]])


@pytest.mark.parametrize(
    "rule, rows, text",
    [  # D7
        (
            LabelRule(),
            [[21, 37], [37, 255]],
            "ERROR [data] masks/a.png: labels 21 (1 px), 37 (2 px) out of range; there are 3 "
            "classes (file values 0-2) and void 255. Fix the mask, or change the class list or "
            "the label map of this source.",
        ),
        (
            LabelRule(void=(0,), shift=1),
            [[4, 3]],
            "labels 4 (1 px) out of range; there are 3 classes",
        ),
        (
            LabelRule(shift=1),
            [[0, 1]],
            "labels 0 (1 px) out of range; there are 3 classes (file va",
        ),
        (LabelRule(void=()), [[65_535, 0]], "labels 65535 (1 px) out of range"),  # -1 as int16
        (LabelRule(), [list(range(10, 30))], "17 (1 px) and 12 more values out of range"),
    ],
)
def test_values_that_stand_for_nothing(rule, rows, text):
    with pytest.raises(BadSample) as caught:
        read(rule, rows)
    assert text in str(caught.value)


@given(st.integers(1, 400), st.integers(0, 10**6))
def test_stored_labels_come_back(count, seed):
    labels = np.random.default_rng(seed).integers(VOID, count, (5, 7)).astype(np.int16)
    labels.flat[:2] = VOID, count - 1
    classes = Classes(names=tuple(f"c{i}" for i in range(count)))
    out = stored_rule(count).read(encode_labels(labels, count), "x", classes)
    np.testing.assert_array_equal(out, labels)
    assert out.dtype == np.int16


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"void": (70_000,)}, "they lie in 0..65535"),
        ({"shift": 1, "table": ((1, 0),)}, "a table says everything"),
    ],
)
def test_refused_rules(fields, text):
    with pytest.raises(ValueError, match=text):
        LabelRule(**fields)


def test_a_table_beyond_the_classes():
    with pytest.raises(ValueError, match="table maps 5 to 3; classes: 3"):
        read(LabelRule(table=((5, 3),)), [[5]])

"""Class lists: counts, order, colours, left/right pairs."""

import pickle

import numpy as np
import pytest

from jointseg_jax.data import class_lists
from jointseg_jax.data.class_lists import CLASS_LISTS
from jointseg_jax.data.classes import VOID_COLOUR, Classes, voc_palette


def test_voc_palette_is_the_published_one():
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]
    assert list(voc_palette(6)) == expected
    assert voc_palette(21)[15] == (192, 128, 128)  # person
    assert voc_palette(21)[20] == (0, 64, 128)  # tvmonitor
    assert voc_palette(256)[255] == VOID_COLOUR
    assert len(set(voc_palette(256))) == 256
    with pytest.raises(ValueError, match="257 colours"):
        voc_palette(257)


@pytest.mark.parametrize(
    ("name", "count", "things", "anchors"),
    [
        ("voc", 21, 20, {0: "background", 8: "cat", 15: "person", 20: "tvmonitor"}),
        (
            "ade20k",
            150,
            100,
            {0: "wall", 12: "person", 66: "flower", 90: "airplane", 126: "animal", 149: "flag"},
        ),
        ("coco", 80, 80, {0: "person", 11: "stop sign", 56: "chair", 79: "toothbrush"}),
        ("coco_panoptic", 133, 80, {79: "toothbrush", 80: "banner", 132: "rug-merged"}),
        (
            "coco_stuff",
            171,
            80,
            {
                0: "person",
                79: "toothbrush",
                80: "banner",
                126: "net",
                145: "sky-other",
                170: "wood",
            },
        ),
        ("cityscapes", 19, 8, {0: "road", 10: "sky", 11: "person", 18: "bicycle"}),
        ("celeba_mask", 19, 0, {0: "background", 4: "l_eye", 13: "hair", 18: "cloth"}),
    ],
)
def test_known_lists(name, count, things, anchors):
    classes = CLASS_LISTS[name]
    assert len(classes) == count == len(set(classes.names)) == len(classes.palette)
    assert len(classes.things) == things
    assert {i: classes.names[i] for i in anchors} == anchors
    assert sorted(classes.things + classes.stuff) == list(range(count))


def test_raw_ids_of_coco_and_cityscapes():
    raw = class_lists.COCO_PANOPTIC_IDS
    names = dict(zip(raw, class_lists.COCO_PANOPTIC.names, strict=True))
    assert len(raw) == 133 and list(raw) == sorted(set(raw))
    anchors = {1: "person", 13: "stop sign", 67: "dining table", 90: "toothbrush", 92: "banner"}
    anchors |= {130: "light", 149: "road", 178: "water-other", 187: "sky-other-merged"}
    anchors |= {200: "rug-merged"}
    assert {i: names[i] for i in anchors} == anchors
    stuff = dict(zip(class_lists.COCO_STUFF_IDS, class_lists.COCO_STUFF.names, strict=True))
    anchors = {0: "person", 12: "stop sign", 66: "dining table", 89: "toothbrush", 91: "banner"}
    anchors |= {129: "light", 148: "road", 156: "sky-other", 177: "water-other", 181: "wood"}
    assert {i: stuff[i] for i in anchors} == anchors
    gaps = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
    assert list(stuff) == [i for i in range(182) if i not in gaps]
    # One numbering of categories: what both sets call the same is one apart in the files.
    assert all(stuff[i - 1] == name for i, name in names.items() if "merged" not in name)
    city = dict(zip(class_lists.CITYSCAPES_IDS, class_lists.CITYSCAPES.names, strict=True))
    assert (city[7], city[23], city[33]) == ("road", "sky", "bicycle")


def test_cityscapes_has_its_own_colours():
    colours = dict(zip(class_lists.CITYSCAPES.names, class_lists.CITYSCAPES.palette, strict=True))
    assert len(set(colours.values())) == 19
    anchors = {"road": (128, 64, 128), "vegetation": (107, 142, 35), "sky": (70, 130, 180)}
    anchors |= {"person": (220, 20, 60), "car": (0, 0, 142), "bicycle": (119, 11, 32)}
    assert {name: colours[name] for name in anchors} == anchors


def test_ade20k_things_and_stuff():
    ade = class_lists.ADE20K
    assert {ade.names[i] for i in ade.stuff} >= {"sky", "floor", "sea", "lake", "house", "tower"}
    assert {ade.names[i] for i in ade.things} >= {"bed", "windowpane", "car", "person", "flag"}


def test_swap_table_exchanges_left_and_right_and_is_its_own_inverse():
    celeba = class_lists.CELEBA_MASK
    table = celeba.swap_table
    assert [celeba.names[table[i]] for i in (4, 7, 8)] == ["r_eye", "l_brow", "r_ear"]
    np.testing.assert_array_equal(table[table], np.arange(19))
    moved = {celeba.names[i] for i in np.flatnonzero(table != np.arange(19))}
    assert moved == {"l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear"}


def test_defaults_lookups_and_pickling():
    classes = Classes(names=("sky", "car"), isthing=(False, True))
    assert classes.palette == voc_palette(2)
    assert classes.index("car") == 1 and classes.things == (1,) and classes.stuff == (0,)
    assert classes.colours.dtype == np.uint8
    assert pickle.loads(pickle.dumps(classes)) == classes
    assert hash(classes) == hash(Classes(names=("sky", "car"), isthing=(False, True)))
    with pytest.raises(KeyError, match="no class 'bus'; the 2 classes are sky, car"):
        classes.index("bus")
    assert len(Classes(names=tuple(f"c{i}" for i in range(300)))) == 300


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"names": ()}, "empty"),
        ({"names": ("a", "b", "a")}, "holds a twice"),
        ({"names": ("a", "void")}, "also a class name"),
        ({"names": ("a", "b"), "isthing": (True,)}, "isthing has 1 entries for 2 names"),
        ({"names": ("a",), "palette": ((0, 0, 300),)}, "0..255"),
        ({"names": ("a", "b"), "swaps": ((0, 2),)}, "0..1"),
        ({"names": ("a", "b"), "swaps": ((0, 0),)}, "different indices"),
    ],
)
def test_wrong_classes_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        Classes(**fields)

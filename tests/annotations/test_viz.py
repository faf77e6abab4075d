"""Pictures: label values survive PNG files, sheets hold their cells where they should be."""

import io

import numpy as np
import pytest
from PIL import Image

from jointseg_jax.annotations import viz
from jointseg_jax.data.classes import VOID_COLOUR, Classes
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.types import FILE_VOID, VOID

CLASSES = Classes(names=("sky", "car", "road"), palette=((9, 8, 7), (200, 0, 0), (0, 0, 250)))
LABELS = np.array([[0, 0, 1], [VOID, 2, 1]], np.int16)


def flat(height, width, colour):
    return np.full((height, width, 3), colour, np.uint8)


def test_colourise_paints_classes_and_void():
    colours = viz.colourise(LABELS, CLASSES)
    assert colours.shape == (2, 3, 3) and colours.dtype == np.uint8
    assert tuple(colours[0, 2]) == (200, 0, 0) and tuple(colours[1, 0]) == VOID_COLOUR
    np.testing.assert_array_equal(viz.colourise(np.stack([LABELS] * 2), CLASSES)[1], colours)
    with pytest.raises(ValueError, match=r"labels \[3\] given \(1 px\); they must be 0..2 or -1"):
        viz.colourise(np.array([[3]]), CLASSES)


def test_borders_lie_between_different_labels():
    expected = [[True, True, False], [True, True, False]]
    np.testing.assert_array_equal(viz.borders(LABELS), expected)
    assert not viz.borders(np.zeros((4, 4), int)).any()


def test_overlay_blends_and_leaves_void_alone():
    image = flat(2, 3, 100)
    half = viz.overlay(image, LABELS, CLASSES, alpha=0.5, outlines=False)
    assert tuple(half[0, 2]) == (150, 50, 50) and tuple(half[1, 0]) == (100, 100, 100)
    full = viz.overlay(image, LABELS, CLASSES, alpha=1.0, outlines=False)
    known = LABELS != VOID
    np.testing.assert_array_equal(full[known], viz.colourise(LABELS, CLASSES)[known])
    none = viz.overlay(image, LABELS, CLASSES, alpha=0.0, outlines=True)
    np.testing.assert_array_equal((none == 255).all(-1), viz.borders(LABELS))
    with pytest.raises(ValueError, match="same height and width"):
        viz.overlay(flat(3, 3, 0), LABELS, CLASSES)


def test_overlays_outline_instances_too():
    image, labels = flat(4, 6, 100), np.ones((4, 6), int)
    segments = np.array([[1, 1, 2, 2, 2, 3]] * 4)
    mixed = viz.overlay(image, labels, CLASSES, segments=segments)
    np.testing.assert_array_equal((mixed == 255).all(-1), viz.borders(segments))
    both = labels.copy()
    both[2:] = 2
    mixed = viz.overlay(image, both, CLASSES, segments=segments)
    drawn = viz.borders(segments) | viz.borders(both)
    np.testing.assert_array_equal((mixed == 255).all(-1), drawn)
    sheet, marked = (
        viz.pair_sheet([image], [labels], CLASSES, scale=8, segments=s) for s in (None, [segments])
    )
    assert sheet.shape == marked.shape
    assert (marked != sheet).any(-1).sum() == 2 * 4 * 8  # two lines down 32 pixels


def test_palette_png_keeps_every_value_and_255_for_void(tmp_path):
    path = tmp_path / "a.png"
    viz.save_palette_png(path, LABELS, CLASSES)
    with Image.open(path) as image:
        assert image.mode == "P" and not image.info  # nothing but pixels and palette
        np.testing.assert_array_equal(np.asarray(image), np.where(LABELS == VOID, 255, LABELS))
        painted = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(painted, viz.colourise(LABELS, CLASSES))
    assert path.read_bytes() == viz.palette_png_bytes(LABELS.astype(np.int32), CLASSES)


def test_palette_png_holds_255_classes_and_not_more():
    names = tuple(f"c{i}" for i in range(FILE_VOID))
    values = np.arange(FILE_VOID, dtype=np.int32).reshape(15, 17)
    data = viz.palette_png_bytes(values, Classes(names=names))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), values)
    with pytest.raises(ValueError, match="at most 255"):
        viz.palette_png_bytes(values, Classes(names=(*names, "one more")))


def test_png_is_lossless_and_repeatable(tmp_path):
    image = Scenes(size=32)[0]["image"]
    viz.save_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)
    assert viz.png_bytes(image) == (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match="give uint8"):
        viz.png_bytes(image.astype(np.float32))


def test_contact_sheet_holds_every_cell_enlarged():
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255)]]
    rows = [[flat(3, 4, colour) for colour in row] for row in colours]
    sheet = viz.contact_sheet(rows, scale=5)
    for colour in [*colours[0], *colours[1]]:
        where = np.argwhere((sheet == colour).all(-1))
        assert len(where) == 15 * 20
        np.testing.assert_array_equal(np.ptp(where, axis=0) + 1, (15, 20))
    with pytest.raises(ValueError, match="empty row"):
        viz.contact_sheet([[]])
    with pytest.raises(ValueError, match="scale 0"):
        viz.contact_sheet(rows, scale=0)


def test_captions_titles_and_legends_take_room_and_change_with_their_text():
    cell = [[flat(40, 90, 10)]]
    plain = viz.contact_sheet(cell)
    one = viz.contact_sheet(cell, captions=[["a ball"]])
    long = viz.contact_sheet(cell, captions=[["a ball on grass under a sky " * 9]])
    assert plain.shape[0] < one.shape[0] < long.shape[0]
    assert long.shape[0] - one.shape[0] == 2 * 15  # at most three lines of 15 pixels
    other = viz.contact_sheet(cell, captions=[["a box"]])
    assert one.shape == other.shape and (one != other).any()
    titled = viz.contact_sheet(cell, captions=[["a ball"]], title="epoch 3")
    assert titled.shape[0] > one.shape[0]


def test_legend_shows_each_class_in_its_colour():
    strip = viz.legend_strip(CLASSES, 200, [1, 2, VOID])
    painted = {tuple(c) for c in strip.reshape(-1, 3).tolist()}
    assert {(200, 0, 0), (0, 0, 250), VOID_COLOUR} <= painted and (9, 8, 7) not in painted
    assert viz.legend_strip(CLASSES, 60).shape[0] > strip.shape[0]  # wraps


def test_pair_sheet_shows_picture_map_and_overlay():
    source = Scenes(size=32)
    records = [source[i] for i in range(5)]
    images, labels = [r["image"] for r in records], [r["labels"] for r in records]
    captions = [r["captions"][0] for r in records]
    sheet = viz.pair_sheet(images, labels, source.classes, captions=captions, columns=2)
    assert sheet.dtype == np.uint8 and sheet.shape[1] > 2 * 3 * 128
    first = sheet[12 : 12 + 128, 12 : 12 + 128]  # the frame is 12 pixels wide
    np.testing.assert_array_equal(first[::4, ::4], images[0])
    second = sheet[12 : 12 + 128, 12 + 130 : 12 + 258][::4, ::4]
    np.testing.assert_array_equal(second, viz.colourise(labels[0], source.classes))
    with pytest.raises(ValueError, match="one map per picture"):
        viz.pair_sheet(images, labels[:2], source.classes)

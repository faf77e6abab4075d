"""Measures of generated scenes on pictures whose numbers are known."""

import json

import numpy as np
import pytest

from jointseg_jax.data.sources import scene_drawing
from jointseg_jax.data.sources.scenes import HUES, THINGS, Scenes
from jointseg_jax.evaluation.evaluate import scalars
from jointseg_jax.evaluation.scene_fit import fit
from jointseg_jax.evaluation.scene_report import (
    agreement,
    components,
    glance,
    measure,
    pairs_scenes,
    real_scenes,
)
from jointseg_jax.evaluation.scene_table import scene_line, scene_tables
from jointseg_jax.types import VOID

SCENES = Scenes(size=32, max_things=2, thing_size=(0.4, 0.6), texture=0.3, split="val")
NAMES = SCENES.classes.names


def region(kind, x, y, radius, angle=0.0, shape=(32, 32)):
    """Draws a thing; position and radius in pixels."""
    rows, columns = (np.arange(n, dtype=np.float32) + 0.5 for n in shape)
    dx, dy = (columns[None] - x) / radius, (rows[:, None] - y) / radius
    return scene_drawing.SHAPES[kind](*scene_drawing.turned(dx, dy, angle)) > 0


def picture(labels):
    """Paints labels in flat colours."""
    return np.array(SCENES.classes.palette, np.uint8)[labels]


def landscape(*things, ground="grass"):
    """A label map: a sky of 16 rows above a ground, and (kind, region) upon them."""
    labels = np.full((32, 32), NAMES.index("sky"))
    labels[16:] = NAMES.index(ground)
    for kind, where in things:
        labels[where] = NAMES.index(kind)
    return labels


def measured(*labels, prompts, masks=None):
    labels = np.stack(labels)
    return measure(picture(labels), labels if masks is None else masks, prompts, SCENES)


BALL = region("ball", 10, 16, 7)
STAR = region("star", 23, 24, 7.5, 0.3)


@pytest.mark.thorough_but(9)
@pytest.mark.parametrize("kind", THINGS)
@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (24, 40), (150, 150)])
def test_a_drawn_thing_fits_its_template(kind, shape):
    side = min(shape)
    rng = np.random.default_rng(0)
    poses = rng.uniform((0.4, 0.4, 0.2, -0.5), (0.6, 0.6, 0.3, 0.5), (6, 4)) * (side, side, side, 1)
    regions = np.stack([region(kind, *pose, shape) for pose in poses])
    fits = fit(regions, kind)
    assert fits.max() <= 1
    # the search ends a few pixels of the border away
    assert fits.min() > 0.85 and fits.mean() > 0.93


def test_the_fit_of_half_a_thing_and_of_a_blob_is_what_geometry_says():
    ball = region("ball", 16, 16, 8)
    half = ball & (np.arange(32) < 16)
    quarter = half & (np.arange(32)[:, None] < 16)
    fits = fit(np.stack([ball, half, quarter]), "ball")
    assert fits[0] > 0.97
    # the largest disc in a half disc has half its radius and half its area; better ones stick out
    assert 0.5 < fits[1] < 0.75
    # a square in a disc, and a disc in a square: pi / 4 at least, and never all of it
    square = region("box", 16, 16, 10)
    assert np.pi / 4 - 0.05 < fit(square[None], "ball")[0] < 0.93
    assert fit(square[None], "box")[0] > 0.97
    # a ring in a disc leaves out the hole, of 0.38 the radius
    ring = fit(region("ring", 16, 16, 9)[None], "ball")[0]
    assert ring == pytest.approx(1 - 0.38**2, abs=0.03)


def test_the_fit_of_a_region_does_not_depend_on_the_others():
    regions = np.stack([BALL, STAR, BALL | STAR, np.zeros_like(BALL)])
    together = fit(regions, "star")
    np.testing.assert_array_equal(together, [fit(one[None], "star")[0] for one in regions])
    assert together[3] == 0
    assert fit(regions[:0], "star").shape == (0,)


def test_a_faithful_picture_has_everything():
    report = measured(
        landscape(("ball", BALL), ("star", STAR)),
        prompts=["a ball and a star on grass under a sky"],
    )
    ones = ("obedience", "recall", "precision", "recall_things", "precision_things")
    for name in (*ones, "right_counts", "alignment_miou", "named_by_shape"):
        assert report[name] == 1.0, name
    assert report["fragments"] == report["fragments_all"] == 0
    assert report["things_image"] == report["things_mask"] == report["named"] == 2
    assert report["shape_image"] == report["shape_mask"] > 0.93
    assert report["fitting_image"] == 1.0
    assert report["shape_per_class_image"]["box"] is None
    json.dumps(report, allow_nan=False)


def test_a_missing_thing_lowers_recall_by_its_word_alone():
    prompts = ["a ball and a star on grass under a sky", "a ball on grass under a sky"]
    report = measured(
        landscape(("ball", BALL)), landscape(("ball", BALL)), prompts=prompts
    )  # seven words, three of them things
    assert report["recall"] == pytest.approx(6 / 7, abs=1e-6)
    assert report["recall_things"] == pytest.approx(2 / 3, abs=1e-6)
    assert report["precision"] == report["precision_things"] == report["obedience"] == 1.0
    assert report["right_counts"] == 0.5


def test_an_unasked_thing_lowers_precision_and_obedience():
    labels = landscape(("ball", BALL), ("star", STAR))
    report = measured(labels, prompts=["a ball on grass under a sky"])
    assert report["precision"] == 3 / 4 and report["precision_things"] == 1 / 2
    assert report["recall"] == report["recall_things"] == 1.0
    star = np.count_nonzero(labels == NAMES.index("star"))
    assert report["obedience"] == pytest.approx(1 - star / 1024, abs=1e-6)
    assert report["right_counts"] == 0.0


@pytest.mark.parametrize(("pixels", "seen"), [(10, 0), (11, 1)])  # of 1,024; 1 % are 10.24
def test_a_class_is_seen_from_one_percent_on(pixels, seen):
    spots = np.zeros((32, 32), bool)
    spots[1::4, 1::4].flat[:pixels] = True
    report = measured(landscape(("heart", spots)), prompts=["a heart on grass and a sky above"])
    assert report["recall_things"] == seen


def test_confetti_are_fragments_and_no_things():
    spots = np.zeros((32, 32), bool)
    spots[2:30:4, 2:30:4] = True  # 49 single pixels, none touching another
    spots[20:22, 20:22] = True  # one of them becomes a square of four
    report = measured(landscape(("ring", spots)), prompts=["a ring on grass under a sky"])
    assert report["fragments"] == 49 and report["things_image"] == 0
    assert report["shape_image"] is None and report["named_by_shape"] is None
    assert report["right_counts"] == 0.0
    puddles = np.zeros((32, 32), bool)
    puddles[20, ::8] = True
    report = measured(landscape(("water", puddles)), prompts=[""])
    assert report["fragments"] == 0 and report["fragments_all"] == 4


def test_corners_connect_and_maps_do_not():
    stairs = np.eye(32, dtype=bool)
    labels = np.stack([landscape(("box", stairs)), landscape(("box", stairs))])
    found = components(labels, len(NAMES))
    mine = np.flatnonzero(found.kind == NAMES.index("box"))
    assert found.area[mine].tolist() == [32, 32] and found.picture[mine].tolist() == [0, 1]
    np.testing.assert_array_equal(found.masks(mine), np.stack([stairs, stairs]))
    assert components(np.full((2, 4, 4), VOID), len(NAMES)).area.size == 0


def test_a_merged_blob_is_one_thing_of_low_shape():
    near = region("ball", 9, 16, 6) | region("ball", 20, 16, 6)
    apart = region("ball", 9, 16, 6) | region("ball", 23, 16, 6)
    prompts = ["two balls on grass under a sky"]
    one = measured(landscape(("ball", near)), prompts=prompts)
    two = measured(landscape(("ball", apart)), prompts=prompts)
    assert (one["things_image"], one["right_counts"]) == (1, 0.0)
    assert (two["things_image"], two["right_counts"]) == (2, 1.0)
    assert one["shape_image"] < 0.8 < 0.95 < two["shape_image"]


def test_image_and_mask_are_measured_apart():
    clean, torn = landscape(("ball", BALL)), landscape(("ball", BALL & (np.arange(32) % 3 > 0)))
    prompts = ["a ball on grass under a sky"]
    report = measured(clean, prompts=prompts, masks=torn[None])
    assert report["shape_image"] > 0.97 and report["shape_mask"] < 0.6
    assert report["fitting_image"] == 1.0 and report["fitting_mask"] == 0.0
    assert report["alignment_miou"] < 1
    swapped = measured(torn, prompts=prompts, masks=clean[None])
    assert swapped["shape_mask"] == report["shape_image"]
    assert swapped["shape_image"] == report["shape_mask"]


def test_things_are_named_by_their_shape_whatever_their_colour():
    labels = landscape(("star", region("ball", 10, 16, 7)), ("heart", region("box", 23, 16, 9)))
    report = measured(labels, prompts=["a star and a heart on grass under a sky"])
    assert report["recall"] == 1.0 and report["named_by_shape"] == 0.0


def test_without_masks_and_prompts_their_measures_are_left_out():
    report = measure(picture(landscape(("ball", BALL)))[None], None, None, SCENES)
    assert report["shape_image"] > 0.97 and report["fragments"] == 0
    assert not {"recall", "obedience", "shape_mask", "alignment_miou"} & set(report)


@pytest.mark.thorough
def test_real_renders_are_near_one_and_hidden_things_keep_them_below():
    records = [SCENES[i] for i in range(48)]
    images, labels = (np.stack([r[k] for r in records]) for k in ("image", "labels"))
    prompts = [r["captions"][0] for r in records]
    report = measure(images, labels, prompts, SCENES)
    assert report["obedience"] > 0.99 and report["recall"] > 0.97 and report["precision"] == 1.0
    assert report["fragments"] < 0.1 and report["right_counts"] > 0.75
    assert 0.9 < report["shape_image"] < 0.97
    assert report["named_by_shape"] > 0.85
    seen = components(labels, len(NAMES))
    shuffled = agreement(labels, seen, prompts[1:] + prompts[:1], SCENES)
    assert shuffled["recall_things"] < 0.5 and shuffled["obedience"] < 0.8


def test_chance_are_the_prompts_and_masks_of_other_pictures():
    """Two pictures without a class in common, but for the sky: it is all that chance finds."""
    labels = np.stack([landscape(("ball", BALL)), landscape(("star", STAR), ground="sand")])
    prompts = ["a ball on grass under a sky", "a star on sand under a sky"]
    report = pairs_scenes(picture(labels), labels, prompts, SCENES, seed=0)
    chance = report["scenes_chance"]
    assert report["scenes"]["recall"] == report["scenes"]["alignment_miou"] == 1.0
    assert chance["recall"] == chance["precision"] == pytest.approx(1 / 3, abs=1e-6)
    assert chance["recall_things"] == chance["precision_things"] == chance["right_counts"] == 0.0
    sky = np.count_nonzero(labels == 0)
    assert chance["obedience"] == pytest.approx(sky / labels.size, abs=1e-6)
    both = np.count_nonzero((labels == 0).all(0))
    # of five classes the sky alone lies on itself: both ways round
    assert chance["alignment_miou"] == pytest.approx(2 * both / (2 * (sky - both)) / 5, abs=1e-6)
    assert chance["named_by_shape"] == pytest.approx(1 / 7, abs=1e-6)
    one = pairs_scenes(picture(labels[:1]), labels[:1], prompts[:1], SCENES, seed=0)
    assert one["scenes_chance"] == {}


def test_real_renders_are_those_of_the_source():
    source = Scenes(size=16, count=3, things=("ball",), max_things=1, thing_size=(0.5, 0.6))
    found = real_scenes(source, 8)["scenes_real"]
    assert found["pictures"] == 3 and found["right_counts"] == found["obedience"] == 1.0
    assert real_scenes(source, 2)["scenes_real"]["pictures"] == 2
    bare = real_scenes(source, 2, pairs=False)["scenes_real"]
    assert "recall" not in bare and bare["shape_image"] > 0.8


REPORT = {
    "step": 7,
    "pairs": 4,
    "judge": "oracle",
    "scenes": {"recall": 0.5, "shape_image": None, "shape_per_class_image": {"ball": 0.5}},
    "scenes_chance": {"recall": 0.25},
    "scenes_real": {"recall": 1.0, "shape_image": 0.93},
}


def test_the_table_has_generated_real_and_chance_side_by_side():
    head, recall, shape = scene_tables(REPORT).splitlines()
    assert head.split()[-4:] == ["generated", "real", "renders", "chance"]
    assert recall.split()[-3:] == ["0.500", "1.000", "0.250"] and recall.startswith("words")
    assert shape.split()[-3:] == ["-", "0.930", "-"]
    assert scene_tables({"step": 7, "alignment_miou": None}) == ""


def test_numbers_of_steps_have_a_table_each():
    rows = [{"steps": n, "scenes": {"recall": n / 10}} for n in (1, 5)]
    lines = scene_tables({"table": rows, "scenes_real": {"recall": 1.0}}).splitlines()
    assert lines[0].startswith("solver steps: 1 ") and lines[2].startswith("solver steps: 5 ")
    assert lines[3].split()[-3:] == ["0.500", "1.000", "-"]


def test_the_numbers_of_a_report_become_curves():
    found = scalars(REPORT)
    assert found == {
        "evaluation/pairs": 4,
        "evaluation/scenes/recall": 0.5,
        "evaluation/scenes_chance/recall": 0.25,
        "evaluation/scenes_real/recall": 1.0,
        "evaluation/scenes_real/shape_image": 0.93,
    }
    one = scalars({"step": 7, "table": [{"steps": 25, "diversity": 0.1, "scenes": {"shape": 1.0}}]})
    assert one == {"evaluation/diversity": 0.1, "evaluation/scenes/shape": 1.0}


def test_hues_and_shapes_name_the_same_things():
    assert set(THINGS) == set(scene_drawing.SHAPES) < set(HUES)


def test_a_glance_is_the_part_of_the_measures_that_takes_no_shapes():
    labels = np.stack([landscape(("ball", BALL)), landscape(("star", STAR), ground="sand")])
    masks = np.stack([labels[0], landscape()])
    prompts = ["a ball on grass under the sky", "a ring on sand under the sky"]
    seen = glance(picture(labels), masks, prompts, SCENES)
    whole = measure(picture(labels), masks, prompts, SCENES)
    assert seen == {k: whole[k] for k in seen}
    assert seen["recall_things"] == seen["precision_things"] == 0.5
    assert {"alignment_miou", "obedience", "fragments"} < seen.keys()
    assert set(glance(picture(labels), None, None, SCENES)) == {"fragments", "fragments_all"}
    # what there is nothing of is left out
    empty = glance(picture(landscape()[None]), None, ["grass under the sky"], SCENES)
    assert "recall_things" not in empty and empty["recall"] == 1


def test_a_line_says_the_measures_it_knows():
    seen = {"alignment_miou": 0.414, "fragments": 3.0, "recall_things": 0.5}
    expected = "mask fits image 0.41, things: 0.50 of those asked for are there"
    assert scene_line(seen) == expected
    assert scene_line({}) == ""

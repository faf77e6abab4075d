"""The sheet of samples: pairs, or the half that a run makes."""

import numpy as np
import pytest

from jointseg_jax.annotations import viz
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.training.preview import sheet
from jointseg_jax.types import UserError

FACTS = DatasetInfo(Classes(names=("sky", "road", "car")), (), ())
RNG = np.random.default_rng(0)
IMAGES = list(RNG.integers(0, 256, (10, 64, 64, 3), dtype=np.uint8))
LABELS = list(RNG.integers(-1, 3, (10, 64, 64), dtype=np.int32))


def test_pairs_are_drawn_as_triplets():
    got = sheet({"image": np.stack(IMAGES), "labels": np.stack(LABELS)}, FACTS)
    np.testing.assert_array_equal(got, viz.pair_sheet(IMAGES, LABELS, FACTS.classes))


def test_images_alone_are_drawn_in_rows():
    got = sheet({"image": np.stack(IMAGES)}, FACTS)
    rows = [IMAGES[:8], IMAGES[8:]]
    scale = viz.READABLE // 64
    np.testing.assert_array_equal(got, viz.contact_sheet(rows, scale=scale))


def test_maps_without_images_are_drawn_on_black():
    got = sheet({"labels": np.stack(LABELS)}, FACTS)
    black = list(np.zeros_like(IMAGES))
    np.testing.assert_array_equal(got, viz.pair_sheet(black, LABELS, FACTS.classes))


def test_latents_alone_cannot_be_drawn():
    with pytest.raises(UserError, match=r"latents alone, .* set config\.preview\.every=0"):
        sheet({}, FACTS)

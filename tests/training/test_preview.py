"""When samples are drawn, and their sheet: pairs, or the half that a run makes."""

import numpy as np
import pytest

from jointseg_jax.annotations import viz
from jointseg_jax.config import PreviewConfig, RunConfig
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.training.opening import opening
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


@pytest.mark.parametrize(
    ("every", "first", "expected"),
    [
        (600, 75, [75, 150, 300, 600, 1200, 1400]),
        (600, 100, [100, 200, 400, 600, 1200, 1400]),
        (600, 600, [600, 1200, 1400]),
        (600, 1000, [600, 1200, 1400]),
        (600, 0, [600, 1200, 1400]),
        (5000, 400, [400, 800, 1400]),
        (0, 75, []),
    ],
)
def test_samples_are_drawn_at_steps_that_double_and_then_every(every, first, expected):
    preview = PreviewConfig(every=every, first=first)
    assert [step for step in range(1, 1401) if preview.due(step, 1400)] == expected


def test_a_config_that_does_not_know_early_samples_has_none():
    assert PreviewConfig(every=600, count=8).early(10**6) == []


def run_of(**changes):
    values = {"steps": 1400, "batch": 16, "optimizer": {}, "system": {"name": "joint"}}
    values |= {"data": {"train": {}, "val": {}}, "preview": {"every": 600, "first": 75}}
    return RunConfig.parse(values | changes)


def test_a_launch_says_what_comes_and_where_to_look(tmp_path):
    said = opening(run_of(finish={"num": 256}), tmp_path, 0)
    assert said.startswith("1,400 updates, 16 rows each")
    assert (
        f"pictures: {tmp_path / 'samples'}, after step 75, 150, 300, 600, every 600, and the"
        in said
    )
    assert f"{tmp_path / 'metrics.jsonl'}" in said and "at the end 256 pairs" in said


def test_a_launch_that_goes_on_says_what_is_to_come(tmp_path):
    said = opening(run_of(), tmp_path, 300)
    assert said.startswith("goes on at step 300 of 1,400")
    assert "after step 600, every 600, and the last" in said and "at the end" not in said
    assert "samples, after the last\n" in opening(run_of(steps=50), tmp_path, 0)
    assert "pictures" not in opening(run_of(preview={"every": 0}), tmp_path, 0)

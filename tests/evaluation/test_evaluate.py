"""The evaluation of a workdir, its parts on pairs whose numbers are known."""

import dataclasses
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from jointseg_jax.annotations import viz
from jointseg_jax.codecs.bits import Bits, PanopticBits
from jointseg_jax.codecs.pixels import Pixels
from jointseg_jax.config import RunConfig
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.evaluation.alignment import find_judge, oracle
from jointseg_jax.evaluation.codec_report import codec_report
from jointseg_jax.evaluation.held_out import references, validation_batches
from jointseg_jax.evaluation.pair_report import (
    Pair,
    PairFolder,
    label_stream,
    pairs_folder,
    pairs_report,
)
from jointseg_jax.evaluation.scene_report import scene_source
from jointseg_jax.systems.system import Stream
from jointseg_jax.training.workdir import Run
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import Cosine
from jointseg_jax.types import VOID, UserError

SIZE = 32
SCENES = Scenes(size=SIZE, split="val", count=20)
CODEC = Bits(classes=len(SCENES.classes))
PROCESS = Process(schedule=Cosine(), predicts="velocity")


@pytest.fixture
def run(tmp_path):
    """A joint run of which only the annotation codec, the data and the config are looked at."""
    source = {"name": "scenes", "size": SIZE, "split": "val", "count": len(SCENES)}
    config = {
        "steps": 1,
        "batch": 1,
        "optimizer": {},
        "system": {"name": "joint", "size": (SIZE, SIZE)},
        "data": {"train": source, "val": source, "threads": 1},
        "evaluate": {"judge": "oracle", "transforms": {}},
    }
    streams = {
        "image": Stream(field="image", codec=Pixels(), process=PROCESS),
        "mask": Stream(field="labels", codec=CODEC, process=PROCESS),
    }
    system = SimpleNamespace(streams=streams)
    info = DatasetInfo.of(SCENES, captions=1)
    return Run(tmp_path, RunConfig.parse(config), info, system, {}, {}, 7, "digest")


def true_pairs(count=20):
    return [Pair(SCENES[i]["image"], SCENES[i]["labels"]) for i in range(count)]


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("limit", [None, 3, 70])
def test_every_validation_record_counts_once(run, limit):
    report = codec_report(run, CODEC, {}, "labels", limit)
    assert report["validation_records"] == min(limit or 20, 20)
    assert report["reconstruction_miou"] == report["edge_miou"] == report["pixel_accuracy"] == 1.0
    latents = np.asarray(CODEC.encode({}, np.stack([p.mask for p in true_pairs()][:limit])))
    # the moments are means of float32 row means; 1e-5 is far above their rounding
    assert report["latent_std"] == pytest.approx(latents.std(dtype=np.float64), abs=1e-5)
    json.dumps(report, allow_nan=False)


def test_validation_labels_may_have_a_size_of_their_own(run):
    run = dataclasses.replace(
        run,
        config=run.config.replace(
            {"evaluate.transforms": {"resize": {"name": "resize", "size": (16, 24)}}}
        ),
    )
    (batch,) = validation_batches(run, 4, 3, "codec")
    assert batch["labels"].shape == (4, 16, 24)
    np.testing.assert_array_equal(batch["valid"], [True, True, True, False])


def test_pooling_loses_edges_first(run):
    pooled = dataclasses.replace(CODEC, pool=4)
    report = codec_report(run, pooled, {}, "labels", None)
    assert report["edge_miou"] < report["reconstruction_miou"] < 1.0
    worst = report["worst_class"]
    present = {k: v for k, v in report["per_class_iou"].items() if v is not None}
    assert worst == {"name": min(present, key=present.get), "iou": min(present.values())}


@pytest.mark.thorough
def test_panoptic_codecs_are_measured_by_their_segments_too(run):
    run = dataclasses.replace(run, config=run.config.replace({"data.panoptic": True}))
    codec = PanopticBits(classes=len(SCENES.classes), instance_bits=3)
    report = codec_report(run, codec, {}, "panoptic", None)
    assert report["reconstruction_miou"] == report["reconstruction_pq"] == 1.0
    assert report["reconstruction_mcd"] == 0.0
    pooled = codec_report(run, dataclasses.replace(codec, pool=4), {}, "panoptic", None)
    assert 0 < pooled["reconstruction_pq"] < pooled["reconstruction_sq"] < 1.0
    assert 0 < pooled["reconstruction_mcd_without_void"] <= pooled["reconstruction_mcd"]
    stream = Stream(field="panoptic", codec=codec, process=PROCESS)
    run.system.streams["mask"] = stream
    assert label_stream(run) == ("mask", stream)
    _, _, real = references(run, 5)
    assert pairs_report(run, true_pairs(), real, None, seed=0)["mcd"] == 0.0


def test_real_pairs_align_and_shuffled_ones_do_not(run):
    prompts, _, real = references(run, 5)
    assert prompts == [SCENES[i]["captions"][0] for i in range(20)]
    report = pairs_report(run, true_pairs(), real, find_judge(run), seed=0)
    assert report["alignment_miou"] > 0.95  # the oracle is right on >= 99 % of the pixels
    assert report["chance_miou"] < 0.4
    assert report["mcd"] == report["mcd_without_void"] == 0.0
    assert report["pairs"] == 20 and report["judge"] == "oracle"
    again = pairs_report(run, true_pairs(), real, find_judge(run), seed=0)
    assert again == report


def test_masks_of_other_captions_and_void_ones_have_other_counts(run):
    _, _, real = references(run, 20)
    shifted = true_pairs()[1:] + true_pairs()[:1]
    report = pairs_report(run, shifted, real, find_judge(run), seed=0)
    assert 0.1 < report["mcd"] <= 2 and report["alignment_miou"] > 0.95
    empty = [Pair(p.image, np.full_like(p.mask, VOID)) for p in true_pairs()]
    report = pairs_report(run, empty, real, find_judge(run), seed=0)
    assert (report["mcd"], report["mcd_without_void"]) == (2.0, 1.0)
    assert report["alignment_miou"] == 0.0


def test_more_pairs_than_captions_start_over(run):
    _, _, real = references(run, 20)
    report = pairs_report(run, true_pairs() * 2, real, None, seed=3)
    assert report["mcd"] == 0.0


def test_without_a_judge_the_fields_are_null_and_the_log_says_why(run, caplog):
    run = dataclasses.replace(run, config=run.config.replace({"evaluate.judge": ""}))
    with caplog.at_level(logging.INFO, logger="jointseg_jax"):
        assert find_judge(run) is None
    assert "config.evaluate.judge is empty" in caplog.text
    _, _, real = references(run, 5)
    report = pairs_report(run, true_pairs(), real, None, seed=0)
    fields = ("judge", "alignment_miou", "chance_miou", "alignment_per_class")
    assert [report[f] for f in fields] == [None] * 4
    assert report["mcd"] == 0.0


def test_one_pair_has_no_chance_level(run):
    _, _, real = references(run, 1)
    report = pairs_report(run, true_pairs(1), real, find_judge(run), seed=0)
    assert report["chance_miou"] is None and report["alignment_miou"] > 0.9


def test_judges_that_cannot_judge(run):
    run = dataclasses.replace(run, config=run.config.replace({"evaluate.judge": "orakel"}))
    with pytest.raises(UserError, match="'orakel' is unknown"):
        find_judge(run)
    with pytest.raises(UserError, match=r"2 classes are none of these \(road, car\)"):
        oracle(("sky", "road", "car"))


def test_scenes_are_measured_where_the_oracle_judges_them(run, tmp_path):
    assert scene_source(run.config) == SCENES
    cached = run.config.replace({"data.cache": str(tmp_path)})
    assert scene_source(cached) == SCENES
    others = [{"evaluate.judge": ""}, {"data.val": {"name": "folders", "root": str(tmp_path)}}]
    for change in others:
        assert scene_source(run.config.replace(change)) is None


def test_a_run_without_annotations(run):
    del run.system.streams["mask"]
    with pytest.raises(UserError, match="no stream of this run is an annotation"):
        label_stream(run)


def test_folders_of_pairs(run):
    assert pairs_folder(run, 3, 20) == run.workdir / "evaluation" / "pairs-7-seed3"
    assert pairs_folder(run, 3, 600).name == "pairs-7-seed3-prompts600"


def test_pairs_are_read_as_they_were_written(tmp_path):
    pair = true_pairs(1)[0]
    mask = pair.mask.copy()
    mask[:3] = VOID
    viz.save_png(tmp_path / "i.png", pair.image)
    viz.save_palette_png(tmp_path / "m.png", mask, SCENES.classes)
    line = json.dumps({"image": "i.png", "annotation": "m.png"}) + "\n"
    (tmp_path / "manifest.jsonl").write_text(line * 3)
    pairs = PairFolder(tmp_path, 2)
    assert len(pairs) == 2
    np.testing.assert_array_equal(pairs[1].image, pair.image)
    np.testing.assert_array_equal(pairs[1].mask, mask)

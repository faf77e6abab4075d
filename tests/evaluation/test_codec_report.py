"""Images measured against what came back for them, on errors whose numbers are known."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jointseg_jax.codecs.image_tiny import ImageTiny
from jointseg_jax.codecs.palette import Palette
from jointseg_jax.codecs.pixels import Pixels, normalise
from jointseg_jax.config import RunConfig
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.evaluation.codec_report import (
    IDENTICAL,
    ImageReconstruction,
    autoencoder_report,
    codec_report,
    psnr,
)
from jointseg_jax.systems.autoencode import Autoencode
from jointseg_jax.training.workdir import Run

SIZE = 32
SCENES = Scenes(size=SIZE, split="val", count=20)


def images(rows=3):
    return np.random.default_rng(0).integers(20, 236, (rows, 8, 6, 3), dtype=np.uint8)


def test_known_errors():
    measured, x = ImageReconstruction(), images()
    others = x + np.uint8([0, 1, 20]).reshape(3, 1, 1, 1)
    measured.add(x[:2], normalise(others[:2]))
    measured.add(x, normalise(others), np.array([False, False, True]))
    want = [IDENTICAL, 10 * np.log10(255**2), 10 * np.log10(255**2 / 400)]
    np.testing.assert_allclose(psnr(x, others), want, rtol=1e-12)
    report = measured.report()
    assert report["psnr"] == pytest.approx(np.mean(want), abs=1e-6)
    assert report["worst_psnr"] == pytest.approx(want[2], abs=1e-6)
    assert report["mean_absolute_error"] == pytest.approx(7.0, abs=1e-6)


def test_what_leaves_the_range_is_measured_as_it_is_written():
    x = np.full((1, 4, 4, 3), 255, np.uint8)
    measured = ImageReconstruction()
    measured.add(x, np.full((1, 4, 4, 3), 7.0, np.float32))
    assert measured.report()["mean_absolute_error"] == 0.0


def test_nothing_measured_is_null():
    assert set(ImageReconstruction().report().values()) == {None}


def run_of(system, params):
    source = {"name": "scenes", "size": SIZE, "split": "val", "count": len(SCENES)}
    config = {
        "steps": 1,
        "batch": 1,
        "optimizer": {},
        "system": {"name": "joint", "size": (SIZE, SIZE)},
        "data": {"train": source, "val": source, "threads": 1},
        "evaluate": {"judge": "", "transforms": {}},
    }
    return Run(
        Path("nowhere"),
        RunConfig.parse(config),
        DatasetInfo.of(SCENES, captions=1),
        system,
        params,
        {},
        7,
        "digest",
    )


def test_pixels_are_perfect_and_every_record_counts_once():
    report = codec_report(run_of(SimpleNamespace(), {}), Pixels(), {}, "image", None)
    assert report["psnr"] == IDENTICAL and report["mean_absolute_error"] == 0.0
    assert report["validation_records"] == 20
    latents = normalise(np.stack([SCENES[i]["image"] for i in range(20)]))
    # means of float32 row means; 1e-5 is far above their rounding
    assert report["latent_std"] == pytest.approx(latents.std(dtype=np.float64), abs=1e-5)
    json.dumps(report, allow_nan=False)


@pytest.mark.thorough
def test_a_codec_with_a_palette_reports_labels_too():
    system = Autoencode(
        codec=Pixels(),
        size=(SIZE, SIZE),
        field="image",
        palette=Palette(classes=len(SCENES.classes)),
    )
    report = autoencoder_report(run_of(system, {}), 0, 0, ())
    assert report["psnr"] == IDENTICAL
    assert report["chain"]["reconstruction_miou"] == 1.0
    assert report["chain"]["validation_records"] == 20
    alone = Autoencode(codec=Pixels(), size=(SIZE, SIZE), field="image")
    assert "chain" not in autoencoder_report(run_of(alone, {}), 0, 0, ())


@pytest.mark.thorough
def test_an_untrained_codec_is_measured():
    codec = ImageTiny(widths=(4, 4), blocks=(1, 0), up_widths=(4, 4), up_blocks=(0, 1))
    params = jax.jit(codec.init)(jax.random.key(0))
    report = codec_report(run_of(SimpleNamespace(), params), codec, params, "image", 5)
    assert 0 < report["worst_psnr"] <= report["psnr"] < 20  # it knows nothing of images
    assert 20 < report["mean_absolute_error"] < 255 and report["validation_records"] == 5

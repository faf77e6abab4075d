"""Pairs as arrays are those of the folder; a bridge reads images of any size."""

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from jointseg_jax import build
from jointseg_jax.cli import define_seed_flag
from jointseg_jax.config import RunConfig
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.evaluation.evaluate import evaluate
from jointseg_jax.generation.filters import Filters
from jointseg_jax.generation.in_memory import InMemory, sample_pairs, segment
from jointseg_jax.generation.sample import SampleOptions, sample
from jointseg_jax.training.workdir import Run
from jointseg_jax.types import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = Classes(names=("sky", "road", "car"))


def untrained(name, workdir):
    """A run of a config at 8 px, with parameters drawn by numpy, which compiles nothing."""
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]("smoke").to_dict()
    config["system"]["size"] = (8, 8)
    config["system"]["denoiser"] |= {"width": 8, "depth": 1, "heads": 1}
    config["system"]["solver"]["steps"] = 2
    if config["system"].get("text"):
        config["system"]["text"] |= {"width": 8, "length": 4}
    info = DatasetInfo(CLASSES, ("a", "car"), ("a car",))
    config = RunConfig.parse(config)
    system = build.system(config.system, info)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(system.init, jax.random.key(0))
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), shapes)
    return Run(workdir, config, info, system, params, frozen={}, step=0, digest="0")


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    return untrained("quickstart", tmp_path_factory.mktemp("joint"))


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    return untrained("semflow", tmp_path_factory.mktemp("bridge"))


def read(path):
    values = np.asarray(Image.open(path)).astype(np.int32)
    return np.where(values == 255, -1, values) if values.ndim == 2 else values


@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 5])
def test_a_seed_of_more_than_32_bits_is_refused_before_anything_is_read(seed, tmp_path):
    with pytest.raises(UserError, match=f"--seed = {seed}; .* 0 to 4294967295"):
        SampleOptions(seed=seed)
    with pytest.raises(UserError, match=f"--seed = {seed}; .* 0 to 4294967295"):
        evaluate(tmp_path, seed=seed)


def test_the_flag_takes_all_seeds_of_32_bits_and_no_other():
    values = flags.FlagValues()
    seed = define_seed_flag(values)
    values(["sample", f"--seed={2**32 - 1}"])
    assert seed.value == 2**32 - 1
    for wrong in (-1, 2**32, 2**32 + 5):
        with pytest.raises(flags.IllegalFlagValueError, match="0, 4294967295"):
            values(["sample", f"--seed={wrong}"])


@pytest.mark.thorough
def test_pairs_are_those_of_the_folder(joint, tmp_path):
    options = SampleOptions(num=10, prompts=("a car", "a"), seed=3, per_device=1, absorb=2)
    sample(joint, tmp_path, options)
    pairs = sample_pairs(joint, options)
    assert pairs["index"].tolist() == list(range(10))
    for i in range(10):
        np.testing.assert_array_equal(pairs["image"][i], read(tmp_path / f"images/{i:08d}.png"))
        labels = read(tmp_path / f"annotations/{i:08d}.png")
        np.testing.assert_array_equal(pairs["labels"][i], labels)


def test_filters_leave_pairs_out_and_the_others_as_they_are(joint):
    options = SampleOptions(num=8, per_device=1)
    all_pairs = sample_pairs(joint, options)
    confidence = all_pairs["confidence"].mean(axis=(1, 2), dtype=np.float64)
    limit = float(np.median(confidence))
    kept = sample_pairs(
        joint, SampleOptions(num=8, per_device=1, filters=Filters(min_confidence=limit))
    )
    assert kept["index"].tolist() == np.flatnonzero(confidence >= limit).tolist()
    np.testing.assert_array_equal(kept["image"], all_pairs["image"][kept["index"]])
    nothing = Filters(min_classes=3, min_confidence=1.0)
    assert sample_pairs(joint, SampleOptions(num=2, per_device=1, filters=nothing)) == {}


def test_a_bridge_reads_images_of_any_size(bridge, tmp_path):
    rng = np.random.default_rng(0)
    shapes = ((8, 8, 3), (12, 9, 3), (30, 40, 3))
    images = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
    labels = segment(bridge, images)
    assert labels.shape == (3, 8, 8) and set(np.unique(labels)) <= {-1, 0, 1, 2}
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    from jointseg_jax.data.given import given_images

    options = SampleOptions(condition=given_images(tmp_path))
    np.testing.assert_array_equal(labels, sample_pairs(bridge, options)["labels"])


@pytest.mark.thorough
def test_arrays_are_told_apart(bridge, tmp_path):
    maps = [np.full((8, 8), value, np.int32) for value in (0, 2)]
    first, second = (InMemory(kind="labels", rows=rows) for rows in (maps, maps[::-1]))
    assert first.fingerprint() != second.fingerprint()
    report = sample(bridge, tmp_path, SampleOptions(condition=first, per_device=1))
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert report["pairs"] == 2 and [line["id"] for line in lines] == ["00000000", "00000001"]

"""What commit d193541 wrote is read today: a workdir, its pairs, a cache and packed shards.

`tests/old` was made with that commit, on one CPU device (the paths in Orbax's own markers were made
relative afterwards; nothing reads them):

  python launch/train.py --config configs/quickstart.py:smoke --workdir run \\
      --config.system.denoiser.width=16 --config.system.denoiser.depth=1 --config.finish.num=0 \\
      --config.preview.every=0 --config.checkpoint.keep=1 --config.optimizer.name=adamw
  python launch/sample.py --workdir run --out pairs --num 4
  python launch/encode.py --config configs/quickstart.py:smoke --latents=mask --keep=image \\
      --batch=4 --limit=6 --out cache                          (and --limit=4 --split=val)
  python launch/prepare.py --source scenes --split val --out shards --set size=32 --limit 6
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jaxlib
import numpy as np
import PIL
import pytest
from PIL import Image

from jointseg_jax import build
from jointseg_jax.config import RunConfig, from_plain
from jointseg_jax.data.cached.reader import Cache
from jointseg_jax.data.sources.arrayrecord import ArrayRecords
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.training.loop import train
from jointseg_jax.training.workdir import load_run

ROOT = Path(__file__).parents[1]
OLD = Path(__file__).parent / "old"
DIGEST = "2887353db2939afded937877380782de"
"""Of the state, as that commit logged it."""


def config_of_then(**changes):
    """The config of that run, which was the quickstart's, with top-level values changed."""
    return from_plain(json.loads((OLD / "run/config.json").read_text())) | changes


@pytest.fixture
def workdir(tmp_path):
    return Path(shutil.copytree(OLD / "run", tmp_path / "run"))


def test_the_run_is_the_same_to_the_bit(workdir):
    run = load_run(workdir)
    assert (run.step, run.digest) == (4, DIGEST)


@pytest.mark.thorough
def test_the_same_command_goes_on_from_it(workdir):
    config = config_of_then(steps=6)
    assert train(RunConfig.parse(config), workdir, allow=["^steps$"]) == 0
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps[:2] == [2, 4] and steps[-1] == 6
    assert load_run(workdir).step == 6


def machine():
    """What the bits of a float and the bytes of a PNG depend on, besides the code."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "jaxlib": jaxlib.__version__,
        "pillow": PIL.__version__,
    }


@pytest.mark.thorough
def test_it_samples_the_same_pairs(workdir, tmp_path):
    """To the byte where these were made; elsewhere XLA may round the last bits otherwise."""
    out = tmp_path / "pairs"
    words = [f"--workdir={workdir}", f"--out={out}", "--num=4"]
    plain = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # optimized, as those were
    done = subprocess.run(
        [sys.executable, "launch/sample.py", *words],
        cwd=ROOT,
        env=plain | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    old, new = (
        [json.loads(x) for x in (folder / "manifest.jsonl").read_text().splitlines()]
        for folder in (OLD / "pairs", out)
    )
    assert [x["prompt"] for x in new] == [x["prompt"] for x in old]
    assert [x.keys() for x in new] == [x.keys() for x in old]
    settings = [json.loads((f / "settings.json").read_text()) for f in (OLD / "pairs", out)]
    assert settings[1] == settings[0]
    for line in old:
        images, labels = (
            [np.asarray(Image.open(folder / line[kind])) for folder in (OLD / "pairs", out)]
            for kind in ("image", "annotation")
        )
        apart = np.abs(images[0].astype(int) - images[1]).max(-1)
        assert apart.max() <= 1 and (labels[0] == labels[1]).mean() >= 0.999
    if machine() == json.loads((OLD / "machine.json").read_text()):
        files = sorted(p.relative_to(OLD / "pairs") for p in (OLD / "pairs").rglob("*.*"))
        assert len(files) == 10
        for file in files:
            assert (out / file).read_bytes() == (OLD / "pairs" / file).read_bytes(), file


@pytest.mark.parametrize(("split", "count"), [("train", 6), ("val", 4)])
def test_the_cache_opens_with_its_config_and_every_row_is_whole(split, count):
    config = config_of_then()
    config["data"]["cache"] = str(OLD / "cache")
    cache = build.source(RunConfig.parse(config), split)
    assert isinstance(cache, Cache) and len(cache) == count and cache.damage() == []


def test_packed_shards_are_read():
    packed, scenes = ArrayRecords(folder=str(OLD / "shards"), split="val"), Scenes(split="val")
    assert len(packed) == 6 and packed.classes.names == scenes.classes.names
    for i in range(6):
        old, now = packed[i], scenes[i]
        assert tuple(old["captions"]) == tuple(now["captions"])
        np.testing.assert_array_equal(old["image"], now["image"])
        np.testing.assert_array_equal(old["labels"], now["labels"])

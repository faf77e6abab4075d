"""One launch of each launcher, as README has them; all else about them is in the tier `cli`.

`launch/prepare.py` packs what the encoder's config would read; `launch/compile.py` needs libtpu.
"""

import importlib.util
import json
import os

import numpy as np
import pytest
from PIL import Image

from jointseg_jax.data.cached.reader import Cache
from jointseg_jax.data.sources.arrayrecord import ArrayRecords
from jointseg_jax.training.writers import read_records

SMOKE = "--config=configs/quickstart.py:smoke"


def test_train(launched):
    assert {"alignment_miou", "chance_miou", "grid", "seconds"} <= set(launched.json)
    assert len(launched.digest) == 32
    assert (launched.workdir / "metrics.jsonl").stat().st_size > 0
    assert os.path.getsize(launched.json["grid"]) > 1000
    assert f"everything is in {launched.workdir}" in launched.out
    assert {"scenes", "scenes_real", "scenes_chance"} <= set(launched.json)
    assert "real renders" in launched.out
    shown = launched.workdir / "samples/00000004.png"
    assert f"step 4/4 | preview {shown}: mask fits image" in launched.out and shown.exists()
    assert f"pictures: {shown.parent}" in launched.error
    records = read_records(launched.workdir / "metrics.jsonl")
    (preview,) = [record for record in records if "preview/alignment_miou" in record]
    assert preview["step"] == 4 and 0 <= preview["preview/obedience"] <= 1
    last = records[-1]
    assert last["step"] == 4
    assert last["evaluation/alignment_miou"] == launched.json["alignment_miou"]
    assert last["evaluation/scenes/recall"] == launched.json["scenes"]["recall"]


def test_sample(launch, trained, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a ball on grass under the sky\ntwo boxes on sand and sky above\n")
    done = launch(
        "sample", f"--workdir={trained}", f"--out={out}", "--num=5", f"--prompts={prompts}",
        "--seed=7", "--steps=3", "--guidance=2.0", "--per_device=8",
    )  # fmt: skip
    assert done.json["pairs"] == 5
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line["prompt"][:5] for line in lines] == ["a bal", "two b", "a bal", "two b", "a bal"]
    for line in lines:
        labels = Image.open(out / line["annotation"])
        assert labels.mode == "P" and labels.size == (line["width"], line["height"])
        assert set(np.unique(np.asarray(labels))) <= {*range(12), 255}
        assert Image.open(out / line["image"]).mode == "RGB"
        assert 0 <= line["confidence"] <= 1
    assert (out / "grid.png").exists()


def test_evaluate(launch, trained):
    done = launch("evaluate", f"--workdir={trained}", "--num=8")
    report = done.json
    assert report["scenes"]["pictures"] == report["scenes_real"]["pictures"] == 8
    assert report["scenes"]["alignment_miou"] == report["alignment_miou"]
    assert report["scenes_chance"]["alignment_miou"] == report["chance_miou"]
    assert "real renders" in done.out
    assert report["step"] == 4 and report["judge"] == "oracle"
    assert 0 <= report["alignment_miou"] <= 1


def test_encode(launch, tmp_path):
    out = tmp_path / "cache"
    words = (SMOKE, "--latents=mask", "--batch=4", f"--out={out}", "--limit=6")
    done = launch("encode", *words)
    found, source = done.json, Cache(root=str(out), split="train")
    assert found["records"] == len(source) == 6 and found["out"] == str(out)
    assert set(found["fields"]) == {"latents/mask", "image", "text"}
    assert {f.name for f in source.fields} == {"latents/mask", "image"}
    assert f"writing {out}, split train:\n" in done.out
    assert f"--config.data.cache={out}" in done.out and "Traceback" not in done.error


def test_prepare(launch, tmp_path):
    words = ("--source=scenes", "--split=val", "--set=size=32", "--limit=6")
    done = launch("prepare", *words, f"--out={tmp_path}")
    assert done.json == {"out": str(tmp_path), "good": 6, "bad": 0}
    assert len(ArrayRecords(folder=str(tmp_path), split="val")) == 6


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_compile(launch):
    done = launch("compile", SMOKE, "--topology=v5e:2x2", "--batch_per_chip=2")
    assert "v5e" in done.out and "Traceback" not in done.error


def test_benchmark(launch):
    done = launch(
        "benchmark", "--what=masks", "--size=64", "--repetitions=2", "--calls=1", "--warmups=0"
    )
    *page, _ = done.out.splitlines()
    assert done.json["all_exact"] and done.json["what"] == "masks"
    assert done.json["size"] == [64, 64]
    assert done.json["times"]["noisy plain"]["repetitions"] == 2
    assert page[0] == "masks of label maps" and any("times as fast" in line for line in page)

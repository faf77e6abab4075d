"""From images to labels and back with one bridge; from label maps of a user's own."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def bridge(launch, tmp_path_factory):
    """A workdir of the bridge's smoke run."""
    workdir = tmp_path_factory.mktemp("bridge")
    config = (
        "--config=configs/semflow.py:smoke",
        "--config.finish.num=0",
        "--config.preview.every=0",
    )
    launch("train", *config, f"--workdir={workdir}")
    return workdir


@pytest.fixture(scope="module")
def pairs(launch, trained, tmp_path_factory):
    """A folder of five pairs, to be read only."""
    out = tmp_path_factory.mktemp("pairs")
    launch("sample", f"--workdir={trained}", f"--out={out}", "--num=5", "--steps=1")
    return out


def read(path):
    return np.asarray(Image.open(path))


def test_images_are_segmented(launch, bridge, pairs, tmp_path):
    options = (f"--workdir={bridge}", f"--given=images={pairs / 'images'}", "--direction=segment")
    done = launch("sample", *options, f"--out={tmp_path / 'a'}", "--seed=1")
    assert done.json["pairs"] == 5
    launch("sample", *options, f"--out={tmp_path / 'b'}", "--seed=2", "--per_device=2")
    for i in range(5):
        name = f"{i:08d}.png"  # that of the given image
        np.testing.assert_array_equal(
            read(tmp_path / "a/images" / name), read(pairs / "images" / name)
        )
        np.testing.assert_array_equal(
            read(tmp_path / "a/annotations" / name), read(tmp_path / "b/annotations" / name)
        )
        assert read(tmp_path / "a/overlay" / name).shape == (32, 32, 3)
        assert read(tmp_path / "a/confidence" / name).shape == (32, 32)


def test_images_are_made_from_maps_and_differ_by_the_perturbation(launch, bridge, pairs, tmp_path):
    given = f"--given=annotations={pairs / 'annotations'}"
    options = (f"--workdir={bridge}", given, f"--out={tmp_path}", "--per_device=4")
    done = launch("sample", *options, "--num=7")
    assert done.json["made_now"] == 7
    assert launch("sample", *options, "--num=10").json["made_now"] == 3
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines[4:6]] == ["00000004", "00000000-2"]
    assert lines[5]["given"] == "00000000"
    for i in range(5):
        first, second = lines[i], lines[i + 5]
        wanted = read(pairs / first["annotation"])
        np.testing.assert_array_equal(read(tmp_path / first["annotation"]), wanted)
        np.testing.assert_array_equal(read(tmp_path / second["annotation"]), wanted)
        assert (read(tmp_path / first["image"]) != read(tmp_path / second["image"])).any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give exactly one of `image` and `labels`"),
        (("--given=pictures=x",), "give annotations=DIR or images=DIR"),
        (("--given=images=x", "--direction=synthesize"), "needs --given annotations=DIR"),
        (("--given=annotations=x", "--guidance=2"), "x"),
        (("--given=images=x", "--write=depth"), "known are overlay, confidence"),
    ],
)
def test_what_a_bridge_cannot_start_from(launch, bridge, tmp_path, options, said):
    done = launch("sample", f"--workdir={bridge}", f"--out={tmp_path}", *options, status=2)
    assert said in done.error
    assert "Traceback" not in done.error


def test_a_table_over_steps(launch, bridge):
    done = launch("evaluate", f"--workdir={bridge}", "--num=8", "--steps=1,2")
    assert [row["steps"] for row in done.json["table"]] == [1, 2]
    for row in done.json["table"]:
        assert row["segmentation_other_seed"] == 0 < row["diversity"]
        assert read(row["grid"]).ndim == 3
    assert done.json["judge"] == "oracle"
    assert 0 < done.json["one_step_of_best"] <= 1

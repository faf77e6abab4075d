"""Pairs on disk: what the manifest says is what the files hold, and both are verified."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jointseg_jax.data.images import decode_segment_ids
from jointseg_jax.data.scenes import Scenes
from jointseg_jax.data.segments import labels_of_segments
from jointseg_jax.generation.writer import PairWriter
from jointseg_jax.types import UserError

SCENES = Scenes(size=32, count=3)


def write(folder, count=3, panoptic=True):
    writer = PairWriter(folder, SCENES.classes, {"seed": 0})
    for i in range(writer.done, count):
        r = SCENES[i]
        segments = r["segments"] if panoptic else None
        writer.write(i, r["captions"][0], r["image"], r["labels"], {"seed": 0}, segments)
    writer.close()
    return writer


def test_segments_are_written_with_their_list(tmp_path):
    writer = write(tmp_path)
    for i, line in enumerate(writer.lines):
        path = tmp_path / line["panoptic"]
        assert line["panoptic"] == f"panoptic/{i:08d}.png"
        ids = decode_segment_ids(path.read_bytes(), str(path))
        keys = ("id", "category_id", "iscrowd", "area")
        rows = np.array([[row[k] for k in keys] for row in line["segments_info"]], np.int32)
        labels, _ = labels_of_segments(ids, rows, str(path))  # refuses any disagreement
        np.testing.assert_array_equal(labels, SCENES[i]["labels"])
        np.testing.assert_array_equal(ids & 0xFFFF, SCENES[i]["segments"])


@pytest.mark.parametrize("name", ["panoptic", "annotations", "images"])
def test_a_file_that_is_not_whole_is_made_again(tmp_path, name):
    before = write(tmp_path).lines
    path = tmp_path / name / "00000001.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert PairWriter(tmp_path, SCENES.classes, {"seed": 0}).done == 1
    assert write(tmp_path).lines == before and path.read_bytes() == whole


def test_without_segments_there_is_no_panoptic_folder(tmp_path):
    (line, *_) = write(tmp_path, panoptic=False).lines
    assert "panoptic" not in line and "segments_info" not in line
    assert not (tmp_path / "panoptic").exists()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of three whole pairs and its manifest."""
    folder = tmp_path_factory.mktemp("pairs")
    write(folder, panoptic=False)
    return folder, (folder / "manifest.jsonl").read_bytes()


@settings(max_examples=100, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_manifest_is_cut_where_it_is_damaged(pairs, place, value, cut):
    folder, whole = pairs
    at = int(place * len(whole))
    damaged = whole[:at] + (b"" if cut else bytes([value]) + whole[at + 1 :])
    (folder / "manifest.jsonl").write_bytes(damaged)
    writer = PairWriter(folder, SCENES.classes, {"seed": 0})
    lines = whole.splitlines(keepends=True)
    before = np.searchsorted(np.cumsum([len(line) for line in lines]), at, side="right")
    assert writer.lines[:before] == [json.loads(line) for line in lines[:before]]
    if cut:
        assert writer.done == before
        assert (folder / "manifest.jsonl").read_bytes() == b"".join(lines[:before])


@pytest.mark.parametrize("line", ["5", "[]", "null", '{"index": 1}', '{"index": true}'])
def test_lines_that_are_no_pairs(pairs, line):
    folder, whole = pairs
    first = whole.splitlines(keepends=True)[0]
    (folder / "manifest.jsonl").write_bytes(first + line.encode() + b"\n")
    assert PairWriter(folder, SCENES.classes, {"seed": 0}).done == 1


@pytest.mark.parametrize("place", ["../secret.png", "/dev/zero", "a\0b", 7, None])
def test_a_manifest_names_files_of_its_folder_only(tmp_path, place):
    """D15: what lies elsewhere is not even read (/dev/zero has no end)."""
    folder = tmp_path / "pairs"
    (tmp_path / "secret.png").write_bytes(b"")
    (line, *_) = write(folder, count=1, panoptic=False).lines
    (folder / "manifest.jsonl").write_text(json.dumps(line | {"image": place}) + "\n")
    assert PairWriter(folder, SCENES.classes, {"seed": 0}).done == 0


def test_prompts_may_hold_any_character(tmp_path):
    writer = PairWriter(tmp_path, SCENES.classes, {"seed": 0})
    prompt = "a\u2028b\x85c\rd\ne \N{SNOWMAN}"  # line breaks to Unicode, but not to JSON lines
    for i in range(2):
        r = SCENES[i]
        writer.write(i, prompt, r["image"], r["labels"], {})
    again = PairWriter(tmp_path, SCENES.classes, {"seed": 0})
    assert again.done == 2 and again.lines[1]["prompt"] == prompt


@pytest.mark.parametrize("content", [b"", b"[]", b'{"seed"', b"\xff\xfe"])
def test_damaged_settings_are_told(tmp_path, content):
    write(tmp_path, count=1, panoptic=False)
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(UserError, match=r"settings\.json: damaged"):
        PairWriter(tmp_path, SCENES.classes, {"seed": 0})

"""Pairs on disk: what the manifest says is what the files hold, and both are verified."""

import errno
import json
import os

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jointseg_jax.data.images import decode_segment_ids
from jointseg_jax.data.segments import labels_of_segments
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.generation.pair_writer import PairWriter
from jointseg_jax.generation.rounds import RoundWriter
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
def test_a_file_that_is_not_whole_is_made_again(tmp_path, name):  # G4
    before = write(tmp_path).lines
    path = tmp_path / name / "00000001.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    found = PairWriter(tmp_path, SCENES.classes, {"seed": 0})
    assert found.done == 1 and list(found.kept) == [2]
    assert write(tmp_path).lines == before and path.read_bytes() == whole


def test_only_what_is_not_whole_is_made_again(tmp_path):
    """G4: the others are not even touched, and the manifest is the same."""
    write(tmp_path)
    manifest = (tmp_path / "manifest.jsonl").read_bytes()
    (tmp_path / "images/00000000.png").unlink()
    last = tmp_path / "images/00000002.png"
    written = last.stat().st_mtime_ns
    writer = RoundWriter(tmp_path, SCENES.classes, {"seed": 0})
    assert (writer.start, writer.there) == (0, 2)
    assert writer.needed(np.arange(5)).tolist() == [True, False, False, True, True]
    r = SCENES[0]
    facts = {"seed": 0}
    assert writer.write(0, r["captions"][0], r["image"], r["labels"], facts, r["segments"]) == 1
    writer.pairs.close()
    assert (tmp_path / "manifest.jsonl").read_bytes() == manifest
    assert last.stat().st_mtime_ns == written


def test_a_line_out_of_order_ends_the_manifest(tmp_path):
    write(tmp_path, panoptic=False)
    path = tmp_path / "manifest.jsonl"
    first, second, third = path.read_text().splitlines(keepends=True)
    path.write_text(first + third + second)
    writer = PairWriter(tmp_path, SCENES.classes, {"seed": 0})
    assert writer.done == 1 and writer.kept == {}


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only(*_):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (no_space, r"images/00000001.png: cannot be written \(No space left on device\): \d+ bytes "
         r"needed, \d+ free. Free some space; the pairs listed in manifest.jsonl are whole"),
        (read_only, r"\(Read-only file system\). Choose another --out, or mend its permissions; "),
    ],
)  # fmt: skip
def test_what_the_file_system_refuses_is_a_sentence(tmp_path, monkeypatch, fails, said):
    """G7."""
    write(tmp_path, count=1, panoptic=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(UserError, match=r"ERROR \[generation\] .*" + said):
            write(tmp_path, count=2, panoptic=False)
    assert not list(tmp_path.rglob("*.tmp"))
    assert write(tmp_path, panoptic=False).done == 3


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot be written \(Not a directory\). Choose another --o"
    ):
        PairWriter(tmp_path / "file" / "out", SCENES.classes, {})


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

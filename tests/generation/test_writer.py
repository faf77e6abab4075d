"""Panoptic pairs on disk: what the manifest says is what the files hold, and they are verified."""

import numpy as np
import pytest

from jointseg_jax.data.images import decode_segment_ids
from jointseg_jax.data.scenes import Scenes
from jointseg_jax.data.segments import labels_of_segments
from jointseg_jax.generation.writer import PairWriter

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

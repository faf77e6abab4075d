import json

import numpy as np
import pytest

from jointseg_jax.data.prepare import prepare
from jointseg_jax.data.sources.arrayrecord import ArrayRecords
from jointseg_jax.data.sources.folders import Folders
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.types import UserError


def folders(disk):
    return Folders(root=str(disk.root), split="train", strict=False)


def test_the_shards_hold_the_source(disk, tmp_path):
    out = tmp_path / "out"
    report = prepare(folders(disk), out, split="train", shards=2, threads=2)
    source, shards = folders(disk), ArrayRecords(folder=str(out), split="train")
    assert len(shards) == 6 == len(report.good) and shards.words() == source.words()
    for index in range(6):
        for key in ("image", "labels"):
            np.testing.assert_array_equal(shards[index][key], source[index][key])
        assert shards[index]["captions"] == source[index]["captions"]
    stored = (out / "train-00000-of-00002.arrayrecord").read_bytes()
    assert disk.image("a0").read_bytes() in stored  # the JPEG as it was
    assert json.loads((out / "report.json").read_text())["train"]["good"] == 6


def test_the_class_file_reads_back(disk, tmp_path):
    prepare(folders(disk), tmp_path / "out", split="train")
    again = Folders(root=str(disk.root), split="train", classes=str(tmp_path / "out/classes.json"))
    assert again.classes == folders(disk).classes


def test_a_second_split_joins_the_first(tmp_path):
    for split in ("train", "val"):
        prepare(Scenes(size=16, count=3, split=split), tmp_path, split=split)
    assert set(json.loads((tmp_path / "report.json").read_text())) == {"train", "val"}
    with pytest.raises(UserError, match="split 'val' is there already, with 3 records"):
        prepare(Scenes(size=16, count=3), tmp_path, split="val")
    prepare(Scenes(size=16, count=2), tmp_path, split="val", overwrite=True)
    assert len(ArrayRecords(folder=str(tmp_path), split="val")) == 2
    record = ArrayRecords(folder=str(tmp_path), split="train")[1]
    expected = Scenes(size=16, count=3)[1]
    np.testing.assert_array_equal(record["segments"], expected["segments"])


def test_strict_writes_nothing(disk, tmp_path):
    disk.labels("a3").unlink()
    disk.image("a1").write_bytes(b"junk")
    with pytest.raises(UserError) as caught:
        prepare(folders(disk), tmp_path / "out", split="train", strict=True)
    assert "problems: 2, records looked at: 6; --strict accepts none" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_nothing_good(disk, tmp_path):
    for key in disk.ids:
        disk.image(key).write_bytes(b"")
    with pytest.raises(UserError, match="set/train: none of 6 records can be used"):
        prepare(folders(disk), tmp_path / "out", split="train")


def test_files_that_change_while_they_are_read(disk, tmp_path):
    def show(report):
        disk.image("a2").write_bytes(b"")

    with pytest.raises(UserError, match="record 2 was good when it was checked; the files changed"):
        prepare(folders(disk), tmp_path / "out", split="train", show=show)
    assert not (tmp_path / "out/dataset.json").exists()

import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jointseg_jax.config import ReadConfig
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.pipeline import batches
from jointseg_jax.data.records import BadSample
from jointseg_jax.data.sources.arrayrecord import ArrayRecords, pack, unpack, write_shards
from jointseg_jax.data.sources.folders import Folders
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.types import UserError

READ = ReadConfig()

SCENES = Scenes(size=(16, 20), count=11)


def write(source, folder, *, shards=3, split="train", **options):
    packed = (pack(source[i], len(source.classes)) for i in range(len(source)))
    options = {"classes": source.classes, "words": source.words(), **options}
    return write_shards(packed, folder, split=split, count=len(source), shards=shards, **options)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        np.testing.assert_array_equal(value, right[key])
        assert getattr(value, "dtype", None) == getattr(right[key], "dtype", None)


def test_records_come_back_without_loss(tmp_path):
    write(SCENES, tmp_path)
    source = ArrayRecords(folder=str(tmp_path), split="train")
    assert len(source) == 11 and [n for _, n in source.shards] == [4, 4, 3]
    assert source.classes == SCENES.classes and source.words() == SCENES.words()
    for index in (0, 3, 4, 7, 10):
        assert_same(source[index], SCENES[index])
    for index in (-1, 11):
        with pytest.raises(IndexError):
            source[index]


def test_many_classes_and_odd_captions():
    classes = Classes(names=tuple(f"c{i}" for i in range(300)))
    record = {
        "id": "ü/1",
        "image": np.zeros((2, 3, 3), np.uint8),
        "labels": np.array([[0, 299, -1], [255, 256, 1]], np.int16),
        "captions": ("שלום", "🐈"),
    }
    assert_same(unpack(pack(record, 300), classes, "x"), record)


def test_image_files_are_kept_when_they_are_the_image(disk):
    source = Folders(root=str(disk.root), split="train")
    jpeg = disk.image("a1").read_bytes()
    kept = pack(source[1], 4, jpeg)
    assert jpeg in kept and jpeg not in pack(source[1], 4)
    assert_same(unpack(kept, source.classes, "x"), source[1])
    # Not the image of the record (another file, a turned one): then it is stored as PNG.
    other = disk.image("a2").read_bytes()
    assert other not in pack(source[1], 4, other)
    assert b"junk" not in pack(source[1], 4, b"junk")


def test_pickled_and_threaded_reading(tmp_path):
    write(SCENES, tmp_path)
    source = ArrayRecords(folder=str(tmp_path), split="train")
    source[2]
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(copy.__getitem__, [*range(11)] * 6))
    for index, record in zip([*range(11)] * 6, records):
        np.testing.assert_array_equal(record["image"], SCENES[index]["image"])


def test_splits_share_a_folder(tmp_path):
    write(SCENES, tmp_path)
    write(Scenes(size=16, count=2, split="val"), tmp_path, split="val", shards=1)
    assert len(ArrayRecords(folder=str(tmp_path), split="train")) == 11
    assert ArrayRecords(folder=str(tmp_path), split="val")[1]["image"].shape == (16, 16, 3)
    with pytest.raises(UserError, match="no split 'test'; there are: train, val"):
        ArrayRecords(folder=str(tmp_path), split="test")
    with pytest.raises(UserError, match=r"split 'val' is there already, with 2 records; .*--overw"):
        write(Scenes(size=16, count=2), tmp_path, split="val", shards=1)
    other = Scenes(size=16, count=2, things=("ball",))
    with pytest.raises(UserError, match="holds splits of other classes"):
        write(other, tmp_path, split="more", shards=1)


def test_overwriting_leaves_nothing_of_the_old(tmp_path):
    write(SCENES, tmp_path)
    first = ArrayRecords(folder=str(tmp_path), split="train").fingerprint()
    (tmp_path / "train-00000-of-00009.arrayrecord.tmp").write_bytes(b"left by a killed run")
    write(SCENES, tmp_path, shards=2, overwrite=True)
    names = sorted(p.name for p in tmp_path.iterdir())
    shards = [f"train-0000{i}-of-00002.arrayrecord" for i in (0, 1)]
    assert names == ["dataset.json", *shards]
    assert ArrayRecords(folder=str(tmp_path), split="train").fingerprint() != first


def test_a_run_that_dies_leaves_the_old_split(tmp_path):
    write(SCENES, tmp_path)

    def dying():
        yield pack(SCENES[0], 12)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        options = {"classes": SCENES.classes, "words": (), "count": 9, "shards": 2}
        write_shards(dying(), tmp_path, split="train", overwrite=True, **options)
    assert_same(ArrayRecords(folder=str(tmp_path), split="train")[10], SCENES[10])


def test_shards_are_the_same_every_time(tmp_path):
    write(SCENES, tmp_path / "a"), write(SCENES, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_missing_and_truncated_shards_are_listed_at_the_start(tmp_path):  # D18
    write(SCENES, tmp_path)
    first, second, third = (f"train-0000{i}-of-00003.arrayrecord" for i in range(3))
    (tmp_path / first).unlink()
    (tmp_path / second).write_bytes(b"")
    data = (tmp_path / third).read_bytes()
    (tmp_path / third).write_bytes(data[:-1])
    with pytest.raises(UserError) as caught:
        ArrayRecords(folder=str(tmp_path), split="train")
    text = str(caught.value)
    for part in (f"{first}: missing;", f"{second}: 0 bytes;", f"{third}: {len(data) - 1} bytes;"):
        assert part in text
    assert "3 of 3 shards are not as written. Copy them again" in text


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_damage_while_running_names_shard_and_record(tmp_path, damage):  # D18
    write(SCENES, tmp_path)
    source = ArrayRecords(folder=str(tmp_path), split="train")
    path = tmp_path / "train-00001-of-00003.arrayrecord"
    data = bytearray(path.read_bytes())
    place = data.index(b"JSR1", data.index(b"JSR1") + 1) + 300  # inside its second record
    data[place] ^= 1
    path.write_bytes(
        {"flip": bytes(data), "truncate": bytes(data[:900]), "empty": b""}.get(damage, b"")
    )
    if damage == "remove":
        path.unlink()
    with pytest.raises(BadSample) as caught:
        source[5]
    text = f"ERROR [data] {path}: record 1: the shard is damaged ("
    assert str(caught.value).startswith(text) and "run launch/prepare.py again" in str(caught.value)
    assert_same(source[3], SCENES[3]), assert_same(source[8], SCENES[8])
    if damage == "flip":  # the other records of the shard are still good
        assert_same(source[6], SCENES[6])


def test_damaged_records_are_replaced_in_training(tmp_path):
    write(SCENES, tmp_path, shards=1)
    path = tmp_path / "train-00000-of-00001.arrayrecord"
    data = bytearray(path.read_bytes())
    data[data.index(b"JSR1") + 300] ^= 1
    path.write_bytes(data)
    source = ArrayRecords(folder=str(tmp_path), split="train")
    with batches(source, READ, batch=11, seed=0, transforms=()) as stream:
        batch, (report,) = next(stream), stream.drain()
    assert sorted(batch["index"]) == [1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert re.search(r"00000-of-00001.arrayrecord: record 0: the shard is damaged", report["error"])


def test_folders_of_something_else(tmp_path):
    with pytest.raises(UserError, match=r"dataset.json: the file is missing.*made by launch/prep"):
        ArrayRecords(folder=str(tmp_path), split="train")
    (tmp_path / "dataset.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(UserError, match=r"version 99 of the shard format; this release reads ver"):
        ArrayRecords(folder=str(tmp_path), split="train")


def test_more_shards_than_records(tmp_path):
    with pytest.raises(UserError, match=r"shards=12 given for 11 records; 1\.\.11"):
        write(SCENES, tmp_path, shards=12)

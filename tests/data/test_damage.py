"""Any byte of a data set may be wrong: readers give what was written or a complaint, no third."""

import itertools
import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from jointseg_jax.config import ReadConfig
from jointseg_jax.data.pipeline import batches
from jointseg_jax.data.records import BadSample, check_record
from jointseg_jax.data.sources.arrayrecord import ArrayRecords, pack, write_shards
from jointseg_jax.data.sources.folders import Folders
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.types import UserError

READ = ReadConfig()

SCENES = Scenes(size=16, count=3)
FUZZ = settings(max_examples=60, deadline=None)


def outcome(open_source):
    """The records that can be read, None for those that are complained about."""
    try:
        source = open_source()
    except UserError as error:
        assert "ERROR [data]" in str(error)
        return None
    found = []
    for index in range(len(source)):
        try:
            record = source[index]
            check_record(record, source.classes)
            found.append(record)
        except BadSample as error:
            assert str(error).startswith("ERROR [data] ")
            found.append(None)
    return found


def spoilt(data, place, value, cut):
    at = int(place * len(data))
    return data[:at] + (b"" if cut else bytes([value]) + data[at + 1 :])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    packed = (pack(SCENES[i], len(SCENES.classes)) for i in range(len(SCENES)))
    options = {"classes": SCENES.classes, "words": SCENES.words()}
    write_shards(packed, folder, split="train", count=len(SCENES), shards=1, **options)
    return folder


@FUZZ
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_a_shard(shards, place, value, cut):  # D18
    path = shards / "train-00000-of-00001.arrayrecord"
    whole = path.read_bytes()
    try:
        path.write_bytes(spoilt(whole, place, value, cut))
        found = outcome(lambda: ArrayRecords(folder=str(shards), split="train"))
    finally:
        path.write_bytes(whole)
    for index, record in enumerate(found or []):  # checksums: never other pixels
        if record is not None:
            np.testing.assert_array_equal(record["image"], SCENES[index]["image"])
            np.testing.assert_array_equal(record["labels"], SCENES[index]["labels"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    for name in ("images/train", "annotations/train", "captions"):
        (root / name).mkdir(parents=True)
    lines = []
    for i in range(len(SCENES)):
        Image.fromarray(SCENES[i]["image"]).save(root / f"images/train/{i}.png")
        labels = SCENES[i]["labels"].astype(np.uint8)
        Image.fromarray(labels).save(root / f"annotations/train/{i}.png")
        lines.append(json.dumps({"id": str(i), "caption": f"picture {i}"}))
    (root / "captions/train.jsonl").write_text("\n".join(lines) + "\n")
    content = {"classes": list(SCENES.classes.names), "ignore_label": 255}
    (root / "classes.json").write_text(json.dumps(content))
    return root


FILES = ("captions/train.jsonl", "classes.json", "images/train/1.png", "annotations/train/1.png")


@FUZZ
@given(
    name=st.sampled_from(FILES),
    place=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
    cut=st.booleans(),
)
def test_files_of_a_folder(folder, name, place, value, cut):  # D1, D3, D4, D13
    path = folder / name
    whole = path.read_bytes()
    try:
        path.write_bytes(spoilt(whole, place, value, cut))
        found = outcome(lambda: Folders(root=str(folder), split="train", strict=False))
    finally:
        path.write_bytes(whole)
    if found is not None:
        assert len(found) == 3
        if name.endswith(".png"):
            assert found[0] is not None and found[2] is not None


def test_a_single_record_fills_every_batch(tmp_path):  # D17
    with batches(Scenes(size=16, count=1), READ, batch=3, seed=0, transforms=()) as stream:
        seen = list(itertools.islice(stream, 2))
    assert [b["index"].tolist() for b in seen] == [[0, 0, 0]] * 2

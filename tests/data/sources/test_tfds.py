import io
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jointseg_jax.config import ReadConfig
from jointseg_jax.data.images import encode_segment_ids
from jointseg_jax.data.pipeline import batches
from jointseg_jax.data.records import BadSample
from jointseg_jax.data.sources.tfds import TFDS
from jointseg_jax.data.transforms import Resize
from jointseg_jax.types import VOID, UserError

READ = ReadConfig()

MASK = np.array([[1, 2, 3, 255], [1, 1, 2, 2]], np.uint8)
IDS = np.array([[0, 9, 9, 600], [0, 9, 600, 600]], np.int32)


def encoded(picture, kind):
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()


def palette_mask(values):
    """A mask as PASCAL VOC keeps them: indices with colours beside."""
    picture = Image.fromarray(values).convert("P")
    picture.putpalette([(37 * i) % 256 for i in range(768)])
    return encoded(picture, "PNG")


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Three records with a palette mask, a panoptic picture and captions."""

    VERSION = tfds.core.Version("1.2.0")
    code_path = None  # else TFDS looks for checksums beside the test, with a package it lacks

    def _info(self):
        objects = {"id": np.int64, "label": np.int64, "is_crowd": np.bool_, "area": np.int64}
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
            "panoptic_image": tfds.features.Image(shape=(None, None, 3)),
            "panoptic_objects": tfds.features.Sequence(objects),
            "file_name": tfds.features.Text(),
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
        }
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            image = Image.fromarray(np.full((2, 4, 3), 40 * i, np.uint8))
            segments = [
                {"id": 9, "label": 2, "is_crowd": False, "area": 3},
                {"id": 600, "label": 0, "is_crowd": True, "area": 3},
            ]
            yield (
                i,
                {
                    "image": encoded(image, "JPEG"),
                    "segmentation_mask": palette_mask(MASK if i else MASK + (MASK < 99)),
                    "panoptic_image": encode_segment_ids(IDS),
                    "panoptic_objects": segments,
                    "file_name": f"f{i}",
                    "captions": [{"text": f"number {i}"}, {"text": "more\0 words"}],
                },
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    builder = Tiny(data_dir=str(tmp_path_factory.mktemp("tfds")), file_format="array_record")
    builder.download_and_prepare()
    path = tmp_path_factory.mktemp("classes") / "classes.json"
    path.write_text(json.dumps({"classes": ["a", "b", "c"]}))
    return str(builder.data_dir), str(path)


def source(folder, **fields):
    path, classes = folder
    fields = {"split": "train", "first_label": 1, "id": "file_name", **fields}
    return TFDS(folder=path, classes=classes, **fields)


def by_id(data):
    return {record["id"]: record for record in (data[i] for i in range(len(data)))}


def test_palette_masks_are_indices(folder):
    data = source(folder, captions="captions/text")
    assert len(data) == 3 and data.name == "tiny:1.2.0/train"
    record = by_id(source(folder, captions="captions/text", split="train[:100%]", void=(255, 4)))[
        "f1"
    ]
    assert record["labels"].tolist() == [[0, 1, 2, VOID], [0, 0, 1, 1]]
    assert record["labels"].dtype == np.int16 and (record["image"] == 40).all()
    assert record["captions"] == ("number 1", "more words")
    assert data.words() == ("more", "number", "words")
    assert "tensorflow" not in sys.modules


def test_labels_out_of_range_name_the_record(folder):
    data = source(folder)
    index = [data._features(i)["file_name"] for i in range(3)].index(b"f0")
    with pytest.raises(BadSample) as caught:
        data[index]
    text = (
        f"{folder[0]}: train record {index} (f0): labels 4 (1 px) out of range; there are 3 classes"
    )
    assert text in str(caught.value)


def test_panoptic_objects(folder):
    data = source(folder, labels="panoptic_image", objects="panoptic_objects")
    record = data[0]
    assert record["labels"].tolist() == [[VOID, 2, 2, 0], [VOID, 2, 0, 0]]
    assert record["segments"].tolist() == [[0, 9, 9, 0], [0, 9, 0, 0]]
    assert record["captions"] == ("a picture of a, c",)


def test_pickled_sources_feed_batches(folder):
    data = source(folder, void=(4, 255))
    copy = pickle.loads(pickle.dumps(data))
    assert copy.fingerprint() == data.fingerprint()
    assert copy.fingerprint() != source(folder).fingerprint()
    with batches(copy, READ, batch=3, seed=0, transforms=(Resize(size=(2, 4)),)) as stream:
        assert sorted(next(stream)["index"]) == [0, 1, 2]


def test_damaged_shards(folder, tmp_path):  # D18
    shutil.copytree(folder[0], tmp_path / "copy")
    (shard,) = (tmp_path / "copy").glob("*array_record*")
    data = bytearray(shard.read_bytes())
    data[data.index(b"\xff\xd8") + 100] ^= 1
    shard.write_bytes(data)
    spoilt = source((str(tmp_path / "copy"), folder[1]), void=(4, 255))
    problems = []
    for index in range(3):
        try:
            spoilt[index]
        except BadSample as problem:
            problems.append(str(problem))
    assert problems and all(
        "copy: train record " in p and "shard is damaged" in p for p in problems
    )


@pytest.mark.parametrize(
    "fields, text",
    [  # D19
        ({"version": "2.0.0"}, r"is version 1\.2\.0; version 2\.0\.0 was asked for"),
        ({"split": "val"}, "no split 'val'; there are: train"),
        (
            {"labels": "mask"},
            "no feature 'mask'; it has: captions, file_name, image, pan",
        ),
    ],
)
def test_refused_settings(folder, fields, text):
    with pytest.raises(UserError, match=text):
        source(folder, **fields)


def test_folders_of_something_else(folder, tmp_path):
    with pytest.raises(UserError, match=r"no features\.json in it; the folder of one prep"):
        source((str(tmp_path), folder[1]))

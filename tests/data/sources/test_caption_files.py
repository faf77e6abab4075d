"""Captions are found under every usual name, and a name that is nearly one is told."""

import json

import pytest

from jointseg_jax.data.audit import scan
from jointseg_jax.data.sources.folders import Folders
from jointseg_jax.types import UserError

IDS = tuple(f"a{i}" for i in range(6))


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


WAYS = {
    "captions/train.json": {"captions/train.json": json.dumps({k: [f"cat {k}"] for k in IDS})},
    "captions.jsonl": {"captions.jsonl": jsonl({"id": k, "caption": f"cat {k}"} for k in IDS)},
    "captions.json of splits": {
        "captions.json": json.dumps({f"train/{k}.jpg": f"cat {k}" for k in IDS} | {"val/x": "dog"})
    },
    "metadata.jsonl": {
        "images/train/metadata.jsonl": jsonl(
            {"file_name": f"{k}.jpg", "text": f"cat {k}"} for k in IDS
        )
    },
    "ID.txt": {f"images/train/{k}.txt": f"cat {k}\r\n" for k in IDS},
    "captions/train/ID.txt": {f"captions/train/{k}.txt": f"cat {k}" for k in IDS},
}


def written(disk, contents):
    disk.captions.unlink(missing_ok=True)
    for name, text in contents.items():
        path = disk.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["folders", "mmseg", "voc"])
def test_usual_names(disk, way, layout):
    written(disk, WAYS[way])
    if layout == "mmseg":
        (disk.root / "img_dir").symlink_to("images")
        (disk.root / "ann_dir").symlink_to("annotations")
    if layout == "voc":
        if "images/" in next(iter(WAYS[way])):
            (disk.root / "images/train").rename(disk.root / "JPEGImages")
        else:
            (disk.root / "JPEGImages").symlink_to("images/train")
        (disk.root / "SegmentationClass").symlink_to("annotations/train")
        (disk.root / "ImageSets/Segmentation").mkdir(parents=True)
        (disk.root / "ImageSets/Segmentation/train.txt").write_text("\n".join(IDS))
    source = Folders(root=str(disk.root), split="train", layout=layout)
    assert [source[i]["captions"] for i in range(6)] == [(f"cat {k}",) for k in IDS]


def test_metadata_of_nested_folders(disk):
    for kind, ending in (("images", ".jpg"), ("annotations", ".png")):
        (disk.root / kind / "train/bonn").mkdir()
        for key in ("a4", "a5"):
            path = disk.root / kind / "train" / f"{key}{ending}"
            path.rename(path.parent / "bonn" / path.name)
    rows = [{"file_name": f"{k}.jpg", "text": ["one", "two"]} for k in IDS]
    contents = {"images/train/metadata.jsonl": jsonl(rows[:4])}
    written(disk, contents | {"images/train/bonn/metadata.jsonl": jsonl(rows[4:])})
    source = Folders(root=str(disk.root), split="train")
    assert [e.captions for e in source.entries] == [("one", "two")] * 6


def test_pictures_without_a_text_file_get_a_made_caption_and_are_counted(disk):
    written(disk, {"images/train/a1.txt": "a cat\n\na dog\n", "images/train/a2.txt": "\n"})
    source = Folders(root=str(disk.root), split="train")
    assert source[1]["captions"] == ("a cat", "a dog")
    assert source[0]["captions"][0].startswith("a picture of")
    report = scan(source)
    assert len(report.good) == 6 and "made from the labels: 5" in report.table()


@pytest.mark.parametrize(
    "name",
    [
        *("images/train/metadata.json1", "images/train/metadata.csv", "captions/train.txt"),
        *("captions.csv", "caption.jsonl", "captions/train.jsonlines", "captions/captions.jsonl"),
    ],
)
def test_names_that_are_nearly_right_are_told(disk, name):
    written(disk, {name: "x"})
    text = f"{disk.root}/{name}: looks like captions and is under no name that is read"
    with pytest.raises(UserError) as caught:
        Folders(root=str(disk.root), split="train")
    assert text in str(caught.value) and "captions/train.jsonl" in str(caught.value)


def test_captions_in_two_places_are_refused(disk):
    (disk.root / "captions.jsonl").write_text(disk.captions.read_text())
    where = r"captions in captions\.jsonl and in captions/train\.jsonl; one of them is used"
    with pytest.raises(UserError, match=where):
        Folders(root=str(disk.root), split="train", strict=False)

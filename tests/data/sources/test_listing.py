"""What is under a folder is read or named: links, kinds of files, forms of a name."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from jointseg_jax.data.audit import scan
from jointseg_jax.data.given import given_images
from jointseg_jax.data.prepare import prepare
from jointseg_jax.data.sources.folders import Folders
from jointseg_jax.types import VOID, UserError


def problems(disk, **fields):
    source = Folders(root=str(disk.root), split="train", strict=False, **fields)
    found = [*source.problems, *(e.problem for e in source.entries if e.problem)]
    return source, "\n".join(map(str, found))


def moved(disk, city, to):
    """Moves two ids into a folder elsewhere and links it into both sides."""
    for kind, ending in (("images", ".jpg"), ("annotations", ".png")):
        elsewhere = to / kind / city
        elsewhere.mkdir(parents=True)
        for key in ("a4", "a5"):
            (disk.root / f"{kind}/train/{key}{ending}").rename(elsewhere / f"{key}{ending}")
        os.symlink(elsewhere, disk.root / f"{kind}/train/{city}")
    disk.captions.unlink()


def test_linked_folders_inside_the_root_are_entered(disk):
    moved(disk, "bonn", disk.root / "second_disk")
    source, text = problems(disk)
    assert text == "" and [e.id for e in source.entries] == [
        *(f"a{i}" for i in range(4)),
        "bonn/a4",
        "bonn/a5",
    ]
    assert source[4]["labels"].shape == (12, 16)


def test_linked_folders_out_of_the_root_are_named_and_counted(disk, tmp_path):
    moved(disk, "bonn", tmp_path / "elsewhere")
    source, text = problems(disk)
    assert len(source) == 4
    for kind in ("images", "annotations"):
        link = disk.root / kind / "train/bonn"
        assert f"{link}: a link to {tmp_path}/elsewhere/{kind}/bonn; files lie inside" in text
    with pytest.raises(UserError, match="problems in its listing: 2"):
        Folders(root=str(disk.root), split="train")
    report = prepare(source, tmp_path / "out", split="train")
    assert f"{disk.root}/images/train/bonn" in report.table() and len(report.bad) == 2


def test_loops_and_broken_links_are_named(disk):
    os.symlink("..", disk.root / "images/train/up")
    os.symlink(".", disk.root / "images/train/here")
    os.symlink("nowhere", disk.root / "annotations/train/gone")
    source, text = problems(disk)
    assert len(source) == 6
    assert "images/train/here: a link to" in text and "which holds the link itself" in text
    assert "annotations/train/gone: a link to" in text and "which does not exist" in text


@pytest.mark.parametrize("kind", [".gif", ".heic", ".AVIF"])
def test_pictures_of_kinds_that_are_not_read_are_named(disk, kind):
    for key in ("a1", "a2"):
        disk.image(key).rename(disk.image(key).with_suffix(kind))
        disk.labels(key).rename(disk.labels(key).with_suffix(kind))
    source, text = problems(disk)
    assert len(source) == 6
    for key in ("a1", "a2"):
        where = disk.image(key).with_suffix(kind)
        assert f"{where}: the image is a {kind}, which is not read; kinds that are read" in text
    with pytest.raises(UserError, match=f"the image is a {kind}, which is not read"):
        given_images(disk.root / "images/train")


def test_tiff_and_webp_are_read(disk):
    for key, kind in (("a1", ".tif"), ("a2", ".TIFF"), ("a3", ".webp")):
        picture = Image.open(disk.image(key))
        disk.image(key).unlink()
        picture.save(disk.image(key).with_suffix(kind), "WEBP" if kind == ".webp" else "TIFF")
    labels = np.asarray(Image.open(disk.labels("a1")))
    Image.fromarray(labels).save(disk.labels("a1").with_suffix(".tif"))
    disk.labels("a1").unlink()
    source = Folders(root=str(disk.root), split="train")
    wanted = np.where(labels == 255, VOID, labels.astype(np.int16))
    np.testing.assert_array_equal(source[1]["labels"], wanted)
    assert source.kinds() == {".jpg": 3, ".tif": 1, ".TIFF": 1, ".webp": 1}
    assert "files       .jpg (3), .TIFF (1)" in scan(source).table()
    assert [source[i]["image"].shape for i in (1, 2, 3)] == [(12, 16, 3)] * 3


def test_names_that_differ_in_unicode_form_are_one(disk):
    composed, decomposed = (unicodedata.normalize(form, "Zürich/é") for form in ("NFC", "NFD"))
    for kind, ending, name in (("images", ".jpg", decomposed), ("annotations", ".png", composed)):
        path = disk.root / kind / "train" / f"{name}{ending}"
        path.parent.mkdir()
        shutil.copy(disk.root / f"{kind}/train/a0{ending}", path)
    with disk.captions.open("a") as file:
        file.write(f'{{"id": "{decomposed}", "caption": "a town"}}\n')
    source = Folders(root=str(disk.root), split="train")
    (index,) = (i for i, e in enumerate(source.entries) if e.id == composed)
    assert len(source) == 7 and source[index]["captions"] == ("a town",)


LINES = {
    "ids": "{}",
    "file names": "{}.jpg",
    "two paths": "/JPEGImages/{}.jpg /SegmentationClass/{}.png",
    "two paths from above": "VOC/JPEGImages/{}.jpg\tVOC/SegmentationClass/{}.png",
    "relative paths": "./JPEGImages/{}.jpg",
    "an id and a flag": "{}  1",
    "an id and no": "{} -1",
}


def voc(disk, lines):
    (disk.root / "images/train").rename(disk.root / "JPEGImages")
    (disk.root / "annotations/train").rename(disk.root / "SegmentationClass")
    (disk.root / "ImageSets/Segmentation").mkdir(parents=True)
    (disk.root / "ImageSets/Segmentation/train.txt").write_text("\n".join(lines))
    disk.captions.unlink()
    return lambda: Folders(root=str(disk.root), split="train", layout="voc")


@pytest.mark.parametrize("kind", LINES)
def test_lists_of_other_conventions_are_read(disk, kind):
    source = voc(disk, [LINES[kind].format(key, key) for key in ("a1", "a3")])()
    assert [entry.id for entry in source.entries] == ["a1", "a3"]


def test_lists_of_other_files_than_are_read_are_refused(disk):
    source = voc(disk, ["a1", "/JPEGImages/a2.jpg /SegmentationClass/a3.png"])
    where = r"train\.txt:2: '/SegmentationClass/a3\.png' is in the list; files of id 'a2' in this"
    with pytest.raises(UserError, match=where):
        source()


def test_ids_with_blanks_and_missing_files_are_what_the_list_says(disk):
    source = voc(disk, ["my photo 1", "nowhere.jpg"])
    for name in ("JPEGImages/a1.jpg", "SegmentationClass/a1.png"):
        path = disk.root / name
        path.rename(path.with_name(path.name.replace("a1", "my photo 1")))
    with pytest.raises(UserError, match=r"problems in its listing: 1\.") as caught:
        source()
    assert "the image of id 'nowhere' is missing" in str(caught.value)

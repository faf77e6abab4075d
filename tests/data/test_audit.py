import json
import shutil
from collections import Counter

import numpy as np
from PIL import Image

from jointseg_jax.data.audit import scan
from jointseg_jax.data.sources.folders import Folders
from jointseg_jax.data.sources.scenes import Scenes


def folders(disk):
    return Folders(root=str(disk.root), split="train", strict=False)


def test_statistics_are_those_of_the_records(disk):
    source = folders(disk)
    report = scan(source, threads=3)
    labels = np.stack([source[i]["labels"] for i in range(6)])
    assert report.count == 6 and report.good == (0, 1, 2, 3, 4, 5) and report.bad == ()
    assert report.pixels == tuple(int((labels == c).sum()) for c in range(4))
    assert report.records == tuple(int((labels == c).any((1, 2)).sum()) for c in range(4))
    assert report.void == (labels == -1).sum() and report.void_share == 6 * 6 / labels.size
    assert report.sizes == (((12, 16), 6),) and report.captions == (6, 4, 4.0, 4)
    assert report.unseen == () and report.duplicates == () and report.empty == ()


def test_classes_never_seen_void_records_and_equal_images(disk):
    for key in disk.ids:
        labels = np.asarray(Image.open(disk.labels(key))).copy()
        labels[labels == 3] = 1
        Image.fromarray(labels if key != "a2" else 0 * labels + 255).save(disk.labels(key))
    shutil.copy(disk.image("a0"), disk.image("a4"))
    report = scan(folders(disk))
    assert report.unseen == ("right eye",) and report.empty == ("a2",)  # D20
    assert report.duplicates == (("a0", "a4"),)
    text = report.table()
    for part in (
        "set/train: 6 of 6 records are good",
        "never seen  right eye",
        "records void all over: 1 (a2)",
        "groups of equal images: 1 (a0 = a4)",
        "16x12 (6)  (width x height)",
    ):
        assert part in text


def test_bad_samples_are_all_told(disk):
    disk.image("a1").write_bytes(b"")
    disk.labels("a3").unlink()
    with disk.captions.open("a") as file:
        file.write("{\n")
    report = scan(folders(disk))
    assert [index for index, _ in report.bad] == [1, 3, -1] and report.good == (0, 2, 4, 5)
    content = json.loads(json.dumps(report.content()))
    assert content["bad"][0] == {
        "index": 1,
        "file": str(disk.image("a1")),
        "cause": "the file is empty",
        "expected": "an image file",
        "remedy": "Copy it again.",
    }
    assert content["good"] == 4 and content["records"] == 6
    for _, problem in report.bad:
        assert str(problem) in report.table()


def test_limit_and_progress():
    shown = []

    def progress(iterable, *, total, desc):
        shown.append((total, desc))
        return iterable

    report = scan(Scenes(size=16), limit=5, progress=progress)
    assert report.count == 5 and shown == [(5, "reading scenes")]
    things = [int((Scenes(size=16)[i]["labels"] >= 5).any()) for i in range(5)]
    assert Counter(things)[1] == 5  # every scene shows a thing

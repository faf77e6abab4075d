"""``launch/prepare.py`` on good data, and on a copy with one fault of each common kind."""

import json

import numpy as np
import pytest
from PIL import Image

from jointseg_jax.data.sources.arrayrecord import ArrayRecords


@pytest.fixture
def root(tmp_path):
    """Six pairs of 12x16 pixels, three classes."""
    root = tmp_path / "streets"
    for folder in ("images/train", "annotations/train"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(6):
        image = rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)
        Image.fromarray(image).save(root / f"images/train/s{i}.jpg")
        labels = rng.integers(0, 3, (12, 16)).astype(np.uint8)
        Image.fromarray(labels).save(root / f"annotations/train/s{i}.png")
    (root / "classes.json").write_text('{"classes": ["sky", "road", "car"], "ignore_label": 255}')
    return root


def spoil(root):
    """Puts in a truncated JPEG, a missing mask, a label out of range and an RGB mask.

    Returns:
      What must be said of each: file, cause and remedy.
    """
    jpeg, masks = root / "images/train/s0.jpg", root / "annotations/train"
    jpeg.write_bytes(jpeg.read_bytes()[:-100])
    (masks / "s1.png").unlink()
    labels = np.zeros((12, 16), np.uint8)
    labels[3, :5] = 21
    Image.fromarray(labels).save(masks / "s2.png")
    Image.fromarray(np.full((12, 16, 3), (128, 64, 128), np.uint8)).save(masks / "s3.png")
    return [
        (f"ERROR [data] {jpeg}: the file is truncated", "a whole file. Copy it again from its"),
        (
            f"{masks / 's1.png'}: the label file of id 's1' is missing",
            "Restore the file, or take its id out",
        ),
        (
            f"{masks / 's2.png'}: labels 21 (5 px) out of range; there are 3 classes (file values "
            "0-2) and void 255",
            "Fix the mask, or change the class list or the label map of this source.",
        ),
        (
            f"{masks / 's3.png'}: labels painted in RGB (different colours: 1, such as (128, 64, "
            "128))",
            "Save indices, or give a colour map (colours=...).",
        ),
    ]


def test_good_data(launch, root, tmp_path):
    arguments = ("--source=folders", f"--root={root}", "--split=train", f"--out={tmp_path / 'out'}")
    done = launch("prepare", *arguments, "--shards=2", "--strict")
    assert done.json == {"out": str(tmp_path / "out"), "good": 6, "bad": 0}
    assert "streets/train: 6 of 6 records are good" in done.out and "Traceback" not in done.error
    assert len(ArrayRecords(folder=str(tmp_path / "out"), split="train")) == 6
    again = launch("prepare", *arguments, status=2)
    assert "split 'train' is there already, with 6 records" in again.error
    both = launch("prepare", *arguments, "--overwrite", "--set=void=[255,0]", status=2)
    assert "file value 0 is void and also the value of class 0" in both.error
    launch("prepare", *arguments, "--overwrite", "--limit=2", "--set=void=[255,9]")
    assert len(ArrayRecords(folder=str(tmp_path / "out"), split="train")) == 2


def test_each_fault_is_named_with_file_cause_and_remedy(launch, root, tmp_path):
    expected = spoil(root)
    arguments = ("--source=folders", f"--root={root}", "--split=train", f"--out={tmp_path / 'out'}")
    done = launch("prepare", *arguments)
    assert done.json["good"] == 2 and done.json["bad"] == 4
    assert "streets/train: 2 of 6 records are good" in done.out
    strict = launch("prepare", *arguments, "--strict", "--overwrite", status=2)
    assert strict.out == "" and "streets/train: problems: 4, records looked at: 6;" in strict.error
    for text in (done.out, strict.error):
        for line, parts in zip(faults(text), expected, strict=True):
            assert all(part in line for part in parts)
    stored = json.loads((tmp_path / "out/report.json").read_text())["train"]
    assert stored["good"] == 2 and len(stored["bad"]) == 4
    shards = ArrayRecords(folder=str(tmp_path / "out"), split="train")
    assert [shards[i]["id"] for i in range(2)] == ["s4", "s5"]


def faults(text):
    """Returns the lines about single samples."""
    return [x for x in text.splitlines() if x.startswith("ERROR [data]") and "problems: " not in x]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("--source=folders", "--out=o"), "needs --root, its folder"),
        (("--source=scenes", "--out=o", "--set=sizes=9"), "did you mean 'size'?"),
        (("--source=scenes", "--out=o", "--set=size"), "give FIELD=VALUE"),
    ],
)
def test_mistakes_get_one_block_and_status_2(launch, tmp_path, arguments, text):
    arguments = [x.replace("--out=o", f"--out={tmp_path / 'o'}") for x in arguments]
    done = launch("prepare", "--split=train", *arguments, status=2)
    assert text in done.error
    assert "Traceback" not in done.error


def test_help_teaches(launch):
    done = launch("prepare", "--help", status=1)  # absl's status for --help
    assert "python launch/prepare.py --source voc" in done.out and "--[no]strict" in done.out

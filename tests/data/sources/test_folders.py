import itertools
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from jointseg_jax.config import ReadConfig
from jointseg_jax.data import files
from jointseg_jax.data.class_lists import CLASS_LISTS, COCO_PANOPTIC_IDS
from jointseg_jax.data.images import encode_segment_ids
from jointseg_jax.data.pipeline import batches
from jointseg_jax.data.records import BadSample, check_record
from jointseg_jax.data.sources.folders import Folders
from jointseg_jax.data.transforms import Resize
from jointseg_jax.types import VOID, UserError

READ = ReadConfig()


def folders(disk, **fields):
    return Folders(root=str(disk.root), split="train", **fields)


def refused(disk, *parts, **fields):
    """Checks that the source refuses to start with each of ``parts`` in its message."""
    with pytest.raises(UserError) as caught:
        folders(disk, **fields)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def test_records_are_what_the_files_hold(disk, paint):
    source = folders(disk)
    assert len(source) == 6 and source.name == "set/train"
    for index, record in enumerate(source[i] for i in range(6)):
        check_record(record, source.classes)
        image, labels = paint(index)
        assert record["id"] == f"a{index}" and record["captions"] == (f"number a{index} of some",)
        np.testing.assert_array_equal(record["labels"], np.where(labels == 255, VOID, labels))
        # 12: a smooth 12x16 picture at JPEG quality 95 with subsampled colour.
        assert abs(record["image"].astype(int) - image).mean() < 12
    assert source.classes.names == ("sky", "road", "left eye", "right eye")
    assert source.classes.swaps == ((2, 3),)
    assert source.words() == tuple(sorted({"number", "a", "of", "some"}))


def test_captions_are_made_from_labels_when_there_are_none(disk):
    disk.captions.unlink()
    source = folders(disk)
    assert source[0]["captions"][0].startswith("a picture of ")
    assert {"a", "picture", "of", "left", "eye", "nothing"} <= set(source.words())


def test_pickled_sources_read_the_same_without_listing_again(disk):
    source = folders(disk)
    data = pickle.dumps(source)
    shutil.rmtree(disk.root / "captions")
    copy = pickle.loads(data)
    assert copy == source and copy.fingerprint() == source.fingerprint()
    np.testing.assert_array_equal(copy[3]["image"], source[3]["image"])


def test_fingerprints_tell_other_data(disk):
    first = folders(disk).fingerprint()
    assert first == folders(disk).fingerprint() and json.loads(json.dumps(first)) == first
    assert folders(disk, void=(255, 9)).fingerprint() != first
    disk.labels("a3").unlink(), disk.image("a3").unlink()
    changed = folders(disk).fingerprint()
    assert changed["listing"] != first["listing"] and changed["count"] == 5


def test_the_listing_shows_all_problems_at_once(disk):  # D5, D14
    disk.labels("a1").unlink()
    disk.image("a2").unlink()
    shutil.copy(disk.image("a3"), disk.image("a3").with_suffix(".png"))
    shutil.copy(disk.image("a4"), disk.image("A4"))
    shutil.copy(disk.labels("a4"), disk.labels("A4"))
    lines = disk.captions.read_text().splitlines()
    disk.captions.write_text("\n".join([*lines[:5], '{"id": "A4", "caption": "x"}']))
    text = refused(
        disk, "set/train: problems in its listing: 6. Fix them, or set config.data.*.strict"
    )
    for part in (
        f"{disk.labels('a1')}: the label file of id 'a1' is missing; every id needs its",
        f"{disk.image('a2')}: the image of id 'a2' is missing",
        "id 'a3' has 2 files: images/train/a3.jpg, images/train/a3.png; one image per id. Remove",
        "ids 'A4', 'a4' are the same or differ by case only (images/train/A4.jpg, images/train/a4",
        f"{disk.image('a5')}: has no caption; where there is a caption file it has every id",
    ):
        assert part in text
    lenient = folders(disk, strict=False)
    found = [e.id for e in lenient.entries if e.problem is None]
    assert found == ["a0"] and len(lenient) == 7
    with pytest.raises(BadSample, match=r"label file of id 'a1' is missing"):
        lenient[[e.id for e in lenient.entries].index("a1")]


def test_bad_caption_lines_are_told(disk):  # D13
    with disk.captions.open("ab") as file:
        file.write(b'{"id": "a0", "caption": "\xff"}\n')
    refused(disk, f"{disk.captions}:7: byte 0xff is not UTF-8", "problems in its listing: 1.")
    assert folders(disk, strict=False)[0]["captions"] == ("number a0 of some",)


def test_links_out_of_the_root(disk, tmp_path):  # D15
    outside = tmp_path / "secret.png"
    disk.labels("a1").rename(outside)
    disk.labels("a1").symlink_to(outside)
    text = f"{disk.labels('a1')}: a link to {outside}; files lie inside {disk.root}"
    refused(disk, text)
    shutil.move(disk.root / "images/train", tmp_path / "elsewhere")
    (disk.root / "images/train").symlink_to(tmp_path / "elsewhere")
    refused(disk, f"{disk.root}/images/train: a link to {tmp_path}/elsewhere")


def test_links_inside_the_root_are_followed(disk):
    disk.labels("a1").rename(disk.root / "kept.png")
    disk.labels("a1").symlink_to(disk.root / "kept.png")
    assert folders(disk)[1]["labels"].shape == (12, 16)


def test_a_root_may_itself_be_a_link(disk, tmp_path):
    (tmp_path / "alias").symlink_to(disk.root)
    assert len(Folders(root=str(tmp_path / "alias"), split="train")) == 6


def test_fifos_are_never_opened(disk):  # D15
    disk.labels("a1").unlink()
    os.mkfifo(disk.labels("a1"))
    with pytest.raises(BadSample, match=r"a1.png: not a regular file"):
        folders(disk)[1]


def test_files_that_vanish_after_the_listing(disk):
    source = folders(disk)
    disk.image("a1").unlink()
    with pytest.raises(BadSample, match=r"a1.jpg: the file is missing"):
        source[1]


def test_contents_are_held_against_a_list_of_sums(disk):  # D2
    names = [disk.image("a1"), disk.labels("a1"), disk.labels("a2")]
    lines = [f"{files.sha256(p)} *./{p.relative_to(disk.root)}" for p in names]
    (disk.root / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    source = pickle.loads(pickle.dumps(folders(disk)))
    assert [source[i]["labels"].shape for i in range(6)] == [(12, 16)] * 6
    for key in ("a1", "a3"):  # other pictures, as valid as before; the second is not listed
        Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(disk.image(key))
    wanted = lines[0][:12]
    text = rf"a1.jpg: the contents have changed \(SHA-256 \w+...\); SHA256SUMS says {wanted}..."
    with pytest.raises(BadSample, match=text):
        source[1]
    assert not source[3]["image"].any()


def test_a_list_of_sums_that_is_none(disk):
    (disk.root / "SHA256SUMS").write_text(f"{'0' * 64}  a\nabc  b\n")
    with pytest.raises(BadSample, match=r"SHA256SUMS:2: 'abc  b' is no sum of a file; lines are"):
        folders(disk)


def test_sizes_must_agree(disk):  # D6
    Image.fromarray(np.zeros((12, 15), np.uint8)).save(disk.labels("a1"))
    text = f"{disk.labels('a1')}: labels is 15x12 (width x height); its image is 16x12"
    with pytest.raises(BadSample, match=re.escape(text)):
        folders(disk)[1]


def test_labels_out_of_range(disk):  # D7
    labels = np.zeros((12, 16), np.uint8)
    labels[0, :2], labels[1, 1] = 21, 37
    Image.fromarray(labels).save(disk.labels("a1"))
    text = (
        f"ERROR [data] {disk.labels('a1')}: labels 21 (2 px), 37 (1 px) out of range; there are 4"
    )
    with pytest.raises(BadSample, match=re.escape(text)):
        folders(disk)[1]


def test_turned_pictures_are_refused_unless_told(disk):  # D10
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(disk.image("a1")).save(disk.image("a1"), exif=exif)
    with pytest.raises(BadSample, match="EXIF orientation 3"):
        folders(disk)[1]
    left = folders(disk, orientation="ignore")[1]["image"]
    turned = folders(disk, orientation="apply")[1]["image"]
    np.testing.assert_array_equal(turned, left[::-1, ::-1])


def test_label_rules_can_be_given(disk, paint):
    labels = paint(1)[1]
    with pytest.raises(ValueError, match="file value 3 is void and also the value of class 3"):
        folders(disk, void=(255, 3))
    source = folders(disk, label_map=((0, 3), (1, 2), (2, 1), (3, VOID)))
    expected = np.array([3, 2, 1, VOID])[np.where(labels == 255, 3, labels)]
    np.testing.assert_array_equal(source[1]["labels"], expected)
    colours = np.zeros((12, 16, 3), np.uint8)
    colours[3:] = (128, 0, 0)
    Image.fromarray(colours).save(disk.labels("a1"))
    with pytest.raises(BadSample, match="labels painted in RGB"):
        folders(disk)[1]
    source = folders(disk, colour_map=(((0, 0, 0), 2), ((128, 0, 0), 255)))
    assert set(np.unique(source[1]["labels"])) == {2, VOID}


def test_classes_can_be_named(disk):
    (disk.root / "classes.json").rename(disk.root / "mine.json")
    refused(disk, "classes.json: missing, so the labels have no names", "celeba_mask")
    assert folders(disk, classes="voc").classes is CLASS_LISTS["voc"]
    assert len(folders(disk, classes=str(disk.root / "mine.json")).classes) == 4


@pytest.mark.parametrize(
    ("keys", "file_values"),  # of classes 0, 1, 2
    [
        ({}, (0, 1, 2)),
        ({"first_label": 1}, (1, 2, 3)),
        ({"label_map": {"7": "a", "255": "b", "3": "c"}}, (7, 255, 3)),
        ({"label_map": {"0": "b", "1": "a", "2": "c"}, "ignore_label": 3}, (1, 0, 2)),
    ],
)
@pytest.mark.parametrize("layout", ["folders", "mmseg", "voc"])
def test_a_named_class_file_rules_label_values_too(tmp_path, layout, keys, file_values):
    places = {"folders": ("images/s", "annotations/s"), "mmseg": ("img_dir/s", "ann_dir/s")}
    image, labels = places.get(layout, ("JPEGImages", "SegmentationClass"))
    save(tmp_path / image / "1.jpg", np.zeros((1, 3, 3)))
    save(tmp_path / labels / "1.png", np.array([file_values]))
    if layout == "voc":
        lists = tmp_path / "ImageSets/Segmentation"
        lists.mkdir(parents=True)
        (lists / "s.txt").write_text("1\n")
    # another rule beside the data, which the named file goes before
    (tmp_path / "classes.json").write_text('{"classes": ["x"], "first_label": 9}')
    named = tmp_path / "mine.json"
    named.write_text(json.dumps({"classes": ["a", "b", "c"], **keys}))
    source = Folders(root=str(tmp_path), split="s", layout=layout, classes=str(named))
    assert source[0]["labels"].tolist() == [[0, 1, 2]]


def test_a_label_map_wins_over_a_void_that_nobody_stated(disk, paint):
    source = folders(disk, label_map=((0, 0), (1, 1), (2, 2), (3, 3), (255, 0)))
    assert not (source[1]["labels"] == VOID).any()
    with pytest.raises(ValueError, match="file value 255 is void and also the value of class 0"):
        folders(disk, void=(255,), label_map=((0, 1), (255, 0)))


@pytest.mark.parametrize(
    "content, text",
    [
        ("{", "classes.json:1: not JSON"),
        ("[]", "classes.json: no 'classes' in it"),
        ('{"classes": ["a", "a"]}', "holds a twice"),
        ('{"classes": ["a"], "ignore": 3}', "unknown keys ignore; known: classes, ignore_label"),
        ('{"classes": ["a"], "ignore_label": 99999}', "they lie in 0..65535"),
        ('{"classes": ["a"], "label_map": {"1": "b"}}', "no class 'b'"),
    ],
)
def test_bad_class_files(disk, content, text):
    (disk.root / "classes.json").write_text(content)
    refused(disk, text, 'A classes.json holds {"classes": ["sky", "road"], "ignore_label": 255}')


def test_class_files_in_full(disk):
    content = {
        "classes": [
            {"name": "sky", "colour": [1, 2, 3]},
            {"name": "car", "isthing": True, "colour": [4, 5, 6]},
        ],
        "label_map": {"0": "car", "1": "sky", "2": None, "3": "sky"},
        "ignore_label": [255, 254],
    }
    (disk.root / "classes.json").write_text(json.dumps(content))
    source = folders(disk)
    assert source.classes.palette == ((1, 2, 3), (4, 5, 6)) and source.classes.things == (1,)
    assert source.rule.void == (255, 254)
    assert set(np.unique(source[0]["labels"])) == {VOID, 0, 1}


@pytest.mark.parametrize("split, text", [("val", "no such folder"), ("empty", "is empty")])
def test_splits_that_are_not_there(disk, split, text):  # D17
    for folder in ("images/empty", "annotations/empty"):
        (disk.root / folder).mkdir()
    with pytest.raises(UserError, match=text) as caught:
        Folders(root=str(disk.root), split=split)
    assert "config.data.*.split" in str(caught.value)


def test_other_refusals(disk, tmp_path):
    with pytest.raises(UserError, match=r"no such folder\. Check config\.data\.\*\.root"):
        Folders(root=str(tmp_path / "nowhere"), split="train")
    with pytest.raises(ValueError, match="one of: folders, mmseg, voc, ade20k, ade20k_other, coco"):
        folders(disk, layout="cityscape")


@pytest.mark.thorough
def test_workers_change_nothing_not_even_the_reports(disk):
    data = disk.image("a3").read_bytes()
    disk.image("a3").write_bytes(data[: len(data) // 2])
    # Two workers, resumed, as the second of two hosts: all at once, because starting is slow.
    options = {"batch": 4, "seed": 0, "transforms": (Resize(size=12, random_scale=(1.0, 2.0)),)}
    options |= {"host": 1, "hosts": 2, "start_step": 3}
    seen = []
    for workers in (0, 2):
        with batches(folders(disk), ReadConfig(workers=workers), **options) as stream:
            seen.append(([next(stream) for _ in range(6)], stream.drain(), stream.step))
    (plain, reports, step), (worked, *others) = seen
    assert others == [reports, step] == [reports, 9]
    for one, other in zip(plain, worked, strict=True):
        assert one.keys() == other.keys() == {"image", "labels", "index"}
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key])
            assert type(other[key]) is np.ndarray  # not memory shared with a worker
    (report,) = reports
    assert report["index"] == 3 and report["replaced_by"] == 4
    assert f"{disk.image('a3')}: the file is truncated" in report["error"]


@pytest.mark.thorough
def test_bad_samples_stop_the_run_through_a_worker(disk):
    disk.image("a3").write_bytes(b"")
    options = {"batch": 6, "seed": 0, "transforms": (Resize(size=12),)}
    stream = batches(folders(disk), ReadConfig(bad="stop", workers=1), **options)
    with stream, pytest.raises(BadSample, match="the file is empty") as caught:
        next(stream)
    assert caught.value.path == str(disk.image("a3"))


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def test_voc(tmp_path):
    grey = np.zeros((4, 6, 3))
    for name in ("b", "a", "c"):
        save(tmp_path / f"JPEGImages/{name}.jpg", grey)
    values = np.kron([[0, 20, 255], [1, 2, 3]], np.ones((2, 2))).astype(np.uint8)
    palette = Image.fromarray(values).convert("P")
    palette.putpalette([c for colour in CLASS_LISTS["voc"].palette for c in colour])
    (tmp_path / "SegmentationClass").mkdir()
    palette.save(tmp_path / "SegmentationClass/a.png")
    palette.save(tmp_path / "SegmentationClass/b.png")
    save(tmp_path / "SegmentationClassAug/b.png", np.full((4, 6), 7))
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("b\na\n\n")
    source = Folders(root=str(tmp_path), split="val", layout="voc")
    first, second = source[0], source[1]
    assert (first["id"], second["id"]) == ("a", "b")
    assert first["labels"][0].tolist() == [0, 0, 20, 20, VOID, VOID]
    assert first["labels"][2].tolist() == [1, 1, 2, 2, 3, 3]
    assert set(np.unique(second["labels"])) == {7}  # the augmented file goes first
    assert second["captions"] == ("a picture of car",)
    (tmp_path / "ImageSets/Caption").mkdir()
    (tmp_path / "ImageSets/Caption/val.json").write_text('{"a": "x", "b": ["y", "z"]}')
    assert Folders(root=str(tmp_path), split="val", layout="voc")[1]["captions"] == ("y", "z")
    for names, text in {  # D15
        "../../a": "the name leaves the data set folder; names are relative, without '..'",
        "/etc/passwd": "the name leaves the data set folder",
        "a\na": "ids 'a', 'a' are the same or differ by case only",
        "d": "the image of id 'd' is missing",
        "c": "the label file of id 'c' is missing",
    }.items():
        (lists / "odd.txt").write_text(names)
        with pytest.raises(UserError, match=re.escape(text)):
            Folders(root=str(tmp_path), split="odd", layout="voc")
    with pytest.raises(UserError, match="no such split; there are: odd, val"):
        Folders(root=str(tmp_path), split="train", layout="voc")


@pytest.mark.parametrize("split", ["training", "train"])
def test_ade20k(tmp_path, split):
    save(tmp_path / "images/training/ADE_train_1.jpg", np.zeros((2, 3, 3)))
    save(tmp_path / "annotations/training/ADE_train_1.png", [[0, 1, 150], [2, 3, 0]])
    text = tmp_path / "annotations_caption/training.json"
    text.parent.mkdir()
    text.write_text('{"ADE_train_1.jpg": "a room"}')
    source = Folders(root=str(tmp_path), split=split, layout="ade20k")
    assert source[0]["labels"].tolist() == [[VOID, 0, 149], [1, 2, VOID]]
    assert source[0]["captions"] == ("a room",) and len(source.classes) == 150
    other = Folders(root=str(tmp_path), split=split, layout="ade20k_other")
    assert other[0]["labels"].tolist() == [[0, 1, 150], [2, 3, 0]]
    assert other.classes.names[:2] == ("other", "wall") and len(other.classes) == 151


def test_mmseg(tmp_path, paint):
    image, labels = paint(0)
    save(tmp_path / "img_dir/val/x/1.png", image)
    save(tmp_path / "ann_dir/val/x/1.png", labels)
    (tmp_path / "classes.json").write_text('{"classes": ["a", "b", "c", "d"]}')
    source = Folders(root=str(tmp_path), split="val", layout="mmseg")
    assert source[0]["id"] == "x/1"
    np.testing.assert_array_equal(source[0]["image"], image)


@pytest.fixture
def coco(tmp_path):
    """Writes a panoptic set of one picture: a thing, a crowd of it, a stuff region, and void."""
    ids = np.array([[0, 26, 26, 70_000], [512, 512, 26, 70_000]], np.int32)
    folder = tmp_path / "annotations/panoptic_val2017"
    folder.mkdir(parents=True)
    (folder / "000000000139.png").write_bytes(encode_segment_ids(ids))
    save(tmp_path / "val2017/000000000139.jpg", np.zeros((2, 4, 3)))
    names = CLASS_LISTS["coco_panoptic"].names
    things = CLASS_LISTS["coco_panoptic"].isthing
    rows = zip(COCO_PANOPTIC_IDS, names, things)
    content = {
        "images": [{"id": 139, "file_name": "000000000139.jpg"}],
        "annotations": [
            {
                "image_id": 139,
                "file_name": "000000000139.png",
                "segments_info": [
                    {"id": 26, "category_id": 1, "iscrowd": 0, "area": 3},
                    {"id": 512, "category_id": 200, "iscrowd": 0, "area": 2},
                    {"id": 70_000, "category_id": 90, "iscrowd": 1, "area": 2},
                ],
            }
        ],
        "categories": [{"id": i, "name": n, "isthing": int(t)} for i, n, t in reversed([*rows])],
    }
    path = tmp_path / "annotations/panoptic_val2017.json"

    def build(change=lambda content: None, **fields):
        change(content)
        path.write_text(json.dumps(content))
        return Folders(root=str(tmp_path), split="val2017", layout="coco_panoptic", **fields)

    return build


def test_coco_panoptic(coco, tmp_path):
    source = coco()
    assert source.classes.names == CLASS_LISTS["coco_panoptic"].names
    assert source.classes.isthing == CLASS_LISTS["coco_panoptic"].isthing
    record = source[0]
    assert record["labels"].tolist() == [[VOID, 0, 0, 79], [132, 132, 0, 79]]
    assert record["segments"].tolist() == [[0, 26, 26, 0], [512, 512, 26, 0]]
    assert record["captions"] == ("a picture of person, toothbrush, rug-merged",)
    text = json.dumps({"annotations": [{"image_id": 139, "caption": c} for c in ("p", "q")]})
    (tmp_path / "annotations/captions_val2017.json").write_text(text)
    assert coco()[0]["captions"] == ("p", "q")
    assert pickle.loads(pickle.dumps(coco()))[0]["segments"].tolist()[0] == [0, 26, 26, 0]


def rename(image="000000000139.jpg", label="000000000139.png", image_id=139, listed=True):
    """Gives the two files of the set other names in its JSON."""

    def change(content):
        content["images"] = [{"id": image_id, "file_name": image}] if listed else []
        content["annotations"][0] |= {"image_id": image_id, "file_name": label}

    return change


LEFT, FINE = "a_1_leftImg8bit.png", "a_1_gtFine_panoptic.png"


@pytest.mark.parametrize(
    ("image", "label", "named"),
    [
        ("139.jpg", "139_mask.png", {}),
        (LEFT, FINE, {}),
        (f"aachen/{LEFT}", FINE, {"image": LEFT}),  # as createPanopticImgs names them
        (f"aachen/{LEFT}", f"aachen/{FINE}", {}),
        ("139.png", "139_mask.png", {"image": "139.jpg"}),  # converted after the JSON was made
        ("a.jpg", "a.png", {"listed": False}),
        ("a.jpg", "b.png", {"image_id": 0}),
        ("a.jpg", "b.png", {"image_id": "a"}),
    ],
)
def test_panoptic_images_are_joined_by_image_id(coco, tmp_path, image, label, named):
    for folder, old, new in (
        ("val2017", "139.jpg", image),
        ("annotations/panoptic_val2017", "139.png", label),
    ):
        path = tmp_path / folder / new
        path.parent.mkdir(exist_ok=True)
        (tmp_path / folder / f"000000000{old}").rename(path)
    record = coco(rename(**{"image": image, "label": label} | named))[0]
    assert record["labels"].tolist() == [[VOID, 0, 0, 79], [132, 132, 0, 79]]


def test_the_image_of_another_stem_is_not_taken(coco, tmp_path):
    # 139 and 140 are swapped: by stem alone each would get the other's picture
    save(tmp_path / "val2017/140.jpg", np.full((2, 4, 3), 200))
    record = coco(rename(image="140.jpg"))[0]
    assert record["image"].min() > 150


def test_missing_panoptic_files_are_named_one_by_one(coco, tmp_path):
    def more(content):
        for key in ("a", "b"):
            content["images"].append({"id": key, "file_name": f"{key}_image.jpg"})
            content["annotations"].append(
                {"image_id": key, "file_name": f"{key}_mask.png", "segments_info": []}
            )

    save(tmp_path / "val2017/a_image.jpg", np.zeros((2, 4, 3)))
    (tmp_path / "annotations/panoptic_val2017/b_mask.png").write_bytes(b"")
    source = coco(more, strict=False)
    problems = {str(entry.problem).split(": ")[0] for entry in source.entries if entry.problem}
    names = ("annotations/panoptic_val2017/a_mask.png", "val2017/b_image.jpg")
    assert len(source) == 3 and len(problems) == 2
    assert all(any(name in text for text in problems) for name in names)
    assert source[0]["id"] == "000000000139"


def segment(index, **change):
    return lambda c: c["annotations"][0]["segments_info"][index].update(change)


@pytest.mark.parametrize(
    "change, text",
    [  # D16
        (
            segment(0, id=27),
            "segment 26 (3 px) is not in the JSON; segment 27 of the JSON has no pix",
        ),
        (
            segment(1, area=9),
            "segment 512 has 2 px, the JSON says 9; the PNG and the segments_info",
        ),
    ],
)
def test_panoptic_png_and_json_that_disagree(coco, change, text):
    with pytest.raises(BadSample, match=re.escape(text)):
        coco(change)[0]


def test_panoptic_json_that_is_none(coco):
    with pytest.raises(UserError, match="no 'categories' in it; a COCO panoptic JSON has"):
        coco(lambda c: c.pop("categories"))


def test_panoptic_labels_have_their_own_rule(coco):
    with pytest.raises(ValueError, match="takes its labels from segments or parts; void,"):
        coco(void=(0,))


def test_every_record_of_a_shuffled_epoch(disk):
    with batches(folders(disk), READ, batch=3, seed=0, transforms=(Resize(size=8),)) as stream:
        seen = [int(i) for batch in itertools.islice(stream, 2) for i in batch["index"]]
    assert sorted(seen) == list(range(6))

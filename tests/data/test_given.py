"""Known input for a sampler: label maps and images of a folder, and what is wrong with them."""

import json
import os
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from jointseg_jax.data.class_lists import CLASS_LISTS
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.files import read
from jointseg_jax.data.given import given_images, given_labels
from jointseg_jax.data.images import encode_segment_ids
from jointseg_jax.data.records import BadSample
from jointseg_jax.data.sources.folders import Folders
from jointseg_jax.data.transforms import Resize
from jointseg_jax.types import VOID, UserError

FOUR = Classes(names=("sky", "road", "left eye", "right eye"))


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


def rows(seed, height=10, width=14):
    labels = np.random.default_rng(seed).integers(0, 4, (height, width))
    labels[0, :3] = 255
    return labels


@pytest.fixture
def maps(tmp_path):
    """Three label maps, one of them deeper and with a palette."""
    root = tmp_path / "maps"
    save(root / "b.png", rows(0))
    save(root / "a.png", rows(1))
    deep = Image.fromarray(rows(2).astype(np.uint8)).convert("P")
    deep.putpalette(list(range(256)) * 3)
    (root / "deep").mkdir()
    deep.save(root / "deep/c.png")
    return root


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name in ("b.jpg", "a.png", "deep/c.JPEG"):
        save(root / name, rng.integers(0, 256, (10, 14, 3)))
    return root


def refused(call, *parts):
    with pytest.raises(UserError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["crop", "stretch"])
@pytest.mark.parametrize("size", [8, (6, 12), (10, 14)])
def test_labels_are_what_evaluation_would_see(maps, mode, size):
    given = given_labels(maps, FOUR, mode=mode)
    assert given.ids == ("a", "b", "deep/c") and given.captions == ((), (), ()) and len(given) == 3
    for index, seed in enumerate((1, 0, 2)):
        labels = np.where(rows(seed) == 255, VOID, rows(seed)).astype(np.int16)
        record = {"id": "x", "labels": labels, "image": np.zeros((10, 14, 3), np.uint8)}
        expected = Resize(size=size, mode=mode)(record, np.random.default_rng(1), False)["labels"]
        found = given.load(index, size)
        assert found.dtype == np.int16
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["crop", "stretch"])
@pytest.mark.parametrize("size", [8, (6, 12), (10, 14)])
def test_images_are_what_evaluation_would_see(photos, mode, size):
    given = given_images(photos, mode=mode)
    assert given.ids == ("a", "b", "deep/c")
    for index, name in enumerate(("a.png", "b.jpg", "deep/c.JPEG")):
        image = np.asarray(Image.open(photos / name))
        record = {"id": "x", "labels": np.zeros((10, 14), np.int16), "image": image}
        expected = Resize(size=size, mode=mode)(record, np.random.default_rng(1), False)["image"]
        found = given.load(index, size)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


def test_turned_photos_are_turned(photos):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    pixels = np.asarray(Image.open(photos / "a.png"))
    Image.fromarray(pixels).save(photos / "a.png", exif=exif)
    found = given_images(photos).load(0, (14, 10))
    np.testing.assert_array_equal(found, np.rot90(pixels, -1))


def test_captions(maps):
    lines = [{"id": key, "caption": f"{key} {n}"} for key in ("a", "b", "deep/c") for n in (1, 2)]
    path = maps / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert given_labels(maps, FOUR).captions[2] == ("deep/c 1", "deep/c 2")
    path.write_text("\n".join(map(json.dumps, lines[:4])))
    refused(lambda: given_labels(maps, FOUR), f"{maps}/deep/c.png: has no caption", "problems: 1,")


def test_pickled_it_reads_the_same(maps):
    given = given_labels(maps, FOUR)
    copy = pickle.loads(pickle.dumps(given))
    assert copy == given
    np.testing.assert_array_equal(copy.load(1, 8), given.load(1, 8))


def test_fingerprints_tell_other_input(maps, photos, tmp_path):
    first = given_labels(maps, FOUR).fingerprint()
    assert json.loads(json.dumps(first)) == first and first["count"] == 3
    maps.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(maps)
    assert given_labels(maps, FOUR).fingerprint() == first
    seen = [first, given_labels(maps, FOUR, mode="stretch").fingerprint()]
    seen.append(given_images(photos).fingerprint())
    pixels = rows(1)
    pixels[[0, 1]] = pixels[[1, 0]]
    save(maps / "a.png", pixels)
    seen.append(given_labels(maps, FOUR).fingerprint())
    (maps / "a.png").rename(maps / "z.png")
    seen.append(given_labels(maps, FOUR).fingerprint())
    content = {"classes": list(FOUR.names), "ignore_label": [255, 9]}
    (maps / "classes.json").write_text(json.dumps(content))
    seen.append(given_labels(maps, FOUR).fingerprint())
    assert len({json.dumps(value) for value in seen}) == len(seen)


def test_all_problems_of_a_folder_at_once(maps, tmp_path):
    save(maps / "rgb.png", np.full((4, 4, 3), (128, 0, 0)))
    save(maps / "photo.jpg", np.zeros((4, 4)))
    save(maps / "half.png", rows(5))
    data = (maps / "half.png").read_bytes()
    (maps / "half.png").write_bytes(data[: len(data) // 2])
    (maps / "empty.png").write_bytes(b"")
    (maps / "text.png").write_text("no picture")
    save(maps / "twice.png", rows(5))
    save(maps / "twice.bmp", rows(5))
    save(maps / "A.png", rows(5))
    os.mkfifo(maps / "pipe.png")
    save(tmp_path / "outside.png", rows(5))
    (maps / "link.png").symlink_to(tmp_path / "outside.png")
    refused(
        lambda: given_labels(maps, FOUR),
        f"{maps}/rgb.png: labels painted in RGB (different colours: 1, such as (128, 0, 0));",
        f"{maps}/photo.jpg: labels stored as JPEG (lossy: it changes values); labels are PNG",
        f"{maps}/half.png: the file is truncated or damaged; a whole file. Copy it again",
        f"{maps}/empty.png: the file is empty",
        f"{maps}/text.png: not an image",
        "id 'twice' has 2 files: twice.bmp, twice.png; one label file per id. Remove or rename",
        "ids 'A', 'a' are the same or differ by case only (A.png, a.png)",
        f"{maps}/pipe.png: not a regular file",
        f"{maps}/link.png: a link to {tmp_path}/outside.png; files lie inside {maps}. Copy",
        f"ERROR [given] {maps}: problems: 10, labels found: 12. Fix or remove them. A data set",
    )


def test_bombs_are_refused_by_their_header(maps, photos):
    bomb = Image.new("1", (9_000, 9_000))
    for folder, call in ((maps, lambda: given_labels(maps, FOUR)), (photos, None)):
        bomb.save(folder / "bomb.png")
        refused(
            call or (lambda: given_images(photos)),
            f"{folder}/bomb.png: 9000x9000 = 81000000 pixels; the limit is 64000000 pixels",
        )


def test_images_that_are_none(photos):
    (photos / "x.png").write_bytes(b"\x89PNG")
    (photos / "y.jpg").write_bytes(b"")
    refused(
        lambda: given_images(photos),
        f"{photos}/x.png: ",
        f"{photos}/y.jpg: the file is empty",
        f"ERROR [given] {photos}: problems: 2, images found: 5.",
    )


def test_labels_out_of_range_are_told_when_they_are_loaded(maps):
    save(maps / "a.png", [[0, 4, 21], [21, 255, 3]])
    given = given_labels(maps, FOUR)
    text = (
        f"ERROR [data] {maps}/a.png: labels 4 (1 px), 21 (2 px) out of range; there are 4 classes "
        "(file values 0-3) and void 255. Fix the mask, or change the class list"
    )
    with pytest.raises(BadSample, match=re.escape(text)):
        given.load(0, 2)
    assert given.load(1, 2).shape == (2, 2)


def test_sixteen_bit_labels_of_many_classes(tmp_path):
    many = Classes(names=tuple(f"c{i}" for i in range(300)))
    values = np.array([[255, 299], [65535, 0]], np.uint16)
    (tmp_path / "maps").mkdir()
    Image.fromarray(values).save(tmp_path / "maps/a.png")
    found = given_labels(tmp_path / "maps", many).load(0, 2)
    assert found.tolist() == [[255, 299], [VOID, 0]]


def test_a_class_file_says_what_values_mean(maps):
    save(maps / "a.png", [[7, 8], [9, 0]])
    for name in ("b.png", "deep/c.png"):
        (maps / name).unlink()
    table = {"7": "road", "8": "left eye", "9": "sky", "0": None}
    (maps / "classes.json").write_text(
        json.dumps({"classes": list(FOUR.names), "label_map": table})
    )
    assert given_labels(maps, FOUR).load(0, 2).tolist() == [[1, 2], [0, VOID]]
    colours = {"1,2,3": 0, "4,5,6": 3}
    save(maps / "a.png", [[(1, 2, 3), (4, 5, 6)]])
    (maps / "classes.json").write_text(
        json.dumps({"classes": list(FOUR.names), "colours": colours})
    )
    assert given_labels(maps, FOUR).load(0, (1, 2)).tolist() == [[0, 3]]


@pytest.mark.parametrize(
    "names, text",
    [
        (("sky", "street", "left eye", "right eye"), "class 1 is 'street' there and 'road' in the"),
        (("sky", "road", "left eye"), "class 3 is 'absent' there and 'right eye' in the model (3"),
        (
            (*FOUR.names, "car"),
            "class 4 is 'car' there and 'absent' in the model (5 and 4 classes)",
        ),
    ],
)
def test_classes_of_another_model(maps, names, text):
    (maps / "classes.json").write_text(json.dumps({"classes": list(names)}))
    refused(lambda: given_labels(maps, FOUR), f"ERROR [given] {maps}: {text}", "a label_map {file")
    assert len(given_images(maps)) == 3  # an image has no classes


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"layout": "coco"}, ("layout 'coco' of ", "one of: plain, folders, mmseg, voc, ade20k")),
        ({"split": "val"}, ("layout 'plain' with split 'val'; the layout 'plain' is one folder",)),
        ({"layout": "voc"}, ("layout 'voc' with split ''", "needs the name of a split")),
        ({"layout": "voc", "split": "val"}, ("no such split; there are: none", "no labels can be")),
    ],
)
def test_layouts_that_do_not_fit(maps, options, parts):
    refused(lambda: given_labels(maps, FOUR, **options), *parts)


def test_folders_that_are_none(maps, tmp_path):
    refused(
        lambda: given_labels(tmp_path / "no", FOUR), f"ERROR [given] {tmp_path}/no: no such fol"
    )
    refused(lambda: given_labels(maps / "a.png", FOUR), "maps/a.png: not a folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.npy").write_bytes(b"")
    refused(
        lambda: given_labels(tmp_path / "empty", FOUR),
        "empty: no labels in it (.png); there are: .npy.",
    )
    with pytest.raises(ValueError, match="mode='fit' given; one of: crop, stretch"):
        given_labels(maps, FOUR, mode="fit")


def test_class_files_from_elsewhere_are_not_read(maps, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"classes": list(FOUR.names)}))
    (maps / "classes.json").symlink_to(tmp_path / "classes.json")
    refused(lambda: given_labels(maps, FOUR), f"{maps}/classes.json: a link to {tmp_path}/classes")


def test_a_split_of_a_data_set(disk):
    source = Folders(root=str(disk.root), split="train")
    options = {"layout": "folders", "split": "train"}
    labels = given_labels(disk.root, source.classes, **options)
    images = given_images(disk.root, **options)
    assert labels.ids == images.ids == disk.ids
    assert (
        labels.captions == images.captions == tuple((f"number {key} of some",) for key in disk.ids)
    )
    for index, record in enumerate(source[i] for i in range(6)):
        np.testing.assert_array_equal(labels.load(index, (12, 16)), record["labels"])
        np.testing.assert_array_equal(images.load(index, (12, 16)), record["image"])
    refused(
        lambda: given_labels(disk.root, CLASS_LISTS["voc"], **options), "class 0 is 'sky' there"
    )
    disk.labels("a1").unlink()
    disk.image("a2").write_bytes(read(disk.image("a2"))[:20])
    refused(
        lambda: given_images(disk.root, **options),
        "the label file of id 'a1' is missing",
        f"{disk.image('a2')}: ",
        "problems: 2, images found: 6.",
    )


def test_a_split_without_class_names_counts_as_the_models(disk):
    (disk.root / "classes.json").unlink()
    given = given_labels(disk.root, FOUR, layout="folders", split="train")
    assert given.load(0, (12, 16)).max() == 3


def test_label_conventions_of_a_layout(tmp_path):
    save(tmp_path / "images/training/a.jpg", np.zeros((2, 3, 3)))
    save(tmp_path / "annotations/training/a.png", [[0, 1, 150], [2, 3, 0]])
    classes = CLASS_LISTS["ade20k"]
    given = given_labels(tmp_path, classes, layout="ade20k", split="training")
    assert given.load(0, (2, 3)).tolist() == [[VOID, 0, 149], [1, 2, VOID]]
    save(tmp_path / "annotations/training/a.png", np.zeros((2, 3, 3)))
    with pytest.raises(UserError, match=r"a\.png: labels painted in RGB"):
        given_labels(tmp_path, classes, layout="ade20k", split="training")


def test_labels_in_segments_and_in_parts(tmp_path):
    ids = np.array([[0, 26, 26, 512]], np.int32)
    for name in ("annotations/panoptic_val2017", "val2017"):
        (tmp_path / name).mkdir(parents=True)
    save(tmp_path / "val2017/7.jpg", np.zeros((1, 4, 3)))
    path = tmp_path / "annotations/panoptic_val2017/7.png"
    path.write_bytes(encode_segment_ids(ids))
    segments = [{"id": 26, "category_id": 2}, {"id": 512, "category_id": 1}]
    content = {
        "annotations": [{"image_id": 7, "file_name": "7.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "sky"}, {"id": 2, "name": "road"}],
    }
    (tmp_path / "annotations/panoptic_val2017.json").write_text(json.dumps(content))
    two, options = Classes(names=("sky", "road")), {"layout": "coco_panoptic", "split": "val2017"}
    given = given_labels(tmp_path, two, **options)
    assert pickle.loads(pickle.dumps(given)) == given
    assert given.load(0, (1, 4)).tolist() == [[VOID, 1, 1, 0]]
    segments[0]["category_id"] = 1
    (tmp_path / "annotations/panoptic_val2017.json").write_text(json.dumps(content))
    assert given_labels(tmp_path, two, **options).fingerprint() != given.fingerprint()
    save(path, np.zeros((1, 4)))
    refused(lambda: given_labels(tmp_path, two, **options), "7.png: a PNG of mode L; segment ids")

    save(tmp_path / "CelebA-HQ-img/0.jpg", np.zeros((2, 4, 3)))
    skin = tmp_path / "CelebAMask-HQ-mask-anno/0/00000_skin.png"
    save(skin, [[[255] * 3, [0] * 3]])
    save(tmp_path / "CelebAMask-HQ-mask-anno/0/00000_hair.png", [[0, 255]])
    (tmp_path / "metas").mkdir()
    (tmp_path / "metas/val.txt").write_text("0\n")
    options = {"layout": "celebamask_hq_parts", "split": "val"}
    given = given_labels(tmp_path, CLASS_LISTS["celeba_mask"], **options)
    assert given.load(0, (2, 4)).tolist() == [[1, 1, 13, 13]] * 2
    skin.write_bytes(b"")
    refused(
        lambda: given_labels(tmp_path, CLASS_LISTS["celeba_mask"], **options),
        f"{skin}: the file is empty",
    )

"""Layouts of COCO-Stuff, Cityscapes and CelebAMask-HQ, on small folders, whole and spoilt."""

import json
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from jointseg_jax.data.class_lists import CLASS_LISTS
from jointseg_jax.data.prepare import prepare
from jointseg_jax.data.records import BadSample, check_record
from jointseg_jax.data.sources.arrayrecord import ArrayRecords
from jointseg_jax.data.sources.folders import Folders
from jointseg_jax.data.transforms import Flip
from jointseg_jax.types import VOID, UserError


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def image(root, name, height=2, width=4):
    save(root / name, np.full((height, width, 3), 90))


@pytest.fixture
def stuff(tmp_path):
    """Two COCO images with the pixel maps of COCO-Stuff."""
    rows = {"000000000009": [[0, 1, 10, 12], [89, 91, 181, 255]], "000000581929": [[24] * 4] * 2}
    for key, labels in rows.items():
        image(tmp_path, f"train2017/{key}.jpg")
        save(tmp_path / f"annotations/train2017/{key}.png", labels)

    def build(split="train2017", **fields):
        return Folders(root=str(tmp_path), split=split, layout="coco_stuff", **fields)

    return build


@pytest.mark.parametrize("split", ["train2017", "train"])
def test_coco_stuff(stuff, split):
    source = stuff(split)
    assert source.classes is CLASS_LISTS["coco_stuff"] and len(source) == 2
    record = source[0]
    check_record(record, source.classes)
    assert record["id"] == "000000000009"
    assert record["labels"].tolist() == [[0, 1, 10, 11], [79, 80, 170, VOID]]
    shown = "person, bicycle, fire hydrant, stop sign, toothbrush, banner, wood"
    assert record["captions"] == (f"a picture of {shown}",)
    assert source[1]["labels"].tolist() == [[23] * 4] * 2  # giraffe: after one gap
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()


def test_coco_stuff_captions_of_image_0(stuff, tmp_path):
    image(tmp_path, "train2017/000000000000.jpg")
    save(tmp_path / "annotations/train2017/000000000000.png", [[0] * 4] * 2)
    lines = [{"image_id": key, "caption": f"picture {key}"} for key in (0, 9, 581929)]
    path = tmp_path / "annotations/captions_train2017.json"
    path.write_text(json.dumps({"annotations": lines}))
    assert [record["captions"] for record in (stuff()[i] for i in range(2))] == [
        ("picture 0",),
        ("picture 9",),
    ]


@pytest.mark.parametrize("raw", [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90, 182])
def test_coco_stuff_gaps_are_out_of_range(stuff, tmp_path, raw):
    path = tmp_path / "annotations/train2017/000000000009.png"
    save(path, [[0, 0, raw, raw], [1, 1, 1, 255]])
    text = f"{path}: labels {raw} (2 px) out of range; there are 171 classes (file values of the"
    with pytest.raises(BadSample, match=re.escape(text)):
        stuff()[0]


def test_coco_stuff_captions_and_lists(stuff, tmp_path):
    texts = [(9, "p"), (9, "q"), (581929, "r")]
    rows = [{"image_id": key, "caption": text} for key, text in texts]
    path = tmp_path / "annotations/captions_train2017.json"
    path.write_text(json.dumps({"annotations": rows}))
    assert [stuff()[i]["captions"] for i in (0, 1)] == [("p", "q"), ("r",)]
    (tmp_path / "metas").mkdir()
    for name in ("train.txt", "train2017.txt"):
        (tmp_path / "metas" / name).write_text("000000581929\n")
        for split in ("train", "train2017"):
            assert [e.id for e in stuff(split).entries] == ["000000581929"]
    path.write_text(json.dumps({"annotations": rows[:2]}))
    with pytest.raises(UserError, match=r"000000581929\.jpg: has no caption"):
        stuff()


def test_coco_stuff_problems_are_listed(stuff, tmp_path):
    (tmp_path / "annotations/train2017/000000000009.png").unlink()
    (tmp_path / "train2017/000000581929.jpg").unlink()
    with pytest.raises(UserError) as caught:
        stuff()
    for part in (
        f"{tmp_path}/annotations/train2017/000000000009.png: the label file of id '000000000009'",
        f"{tmp_path}/train2017/000000581929.jpg: the image of id '000000581929' is missing",
        "problems in its listing: 2",
    ):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"/val2017: no such folder; .* annotations,train2017"):
        stuff("val")


@pytest.fixture
def city(tmp_path):
    """Two frames of Cityscapes with raw ids, and what lies beside them in the release."""
    frames = {"aachen/aachen_000000_000019": [[7, 8, 33, 0], [24, 31, 9, 29]]}
    frames["ulm/ulm_000000_000019"] = [[23] * 4] * 2
    for key, labels in frames.items():
        image(tmp_path, f"leftImg8bit/train/{key}_leftImg8bit.png")
        save(tmp_path / f"gtFine/train/{key}_gtFine_labelIds.png", labels)
        save(tmp_path / f"gtFine/train/{key}_gtFine_color.png", np.full((2, 4, 3), 70))
        save(tmp_path / f"gtFine/train/{key}_gtFine_instanceIds.png", labels)
        (tmp_path / f"gtFine/train/{key}_gtFine_polygons.json").write_text("{}")

    def build(**fields):
        return Folders(root=str(tmp_path), split="train", layout="cityscapes", **fields)

    return build


TRAIN_IDS = [[0, 1, 18, VOID], [11, 16, VOID, VOID]]


def test_cityscapes_raw_ids(city):
    source = city()
    assert source.classes is CLASS_LISTS["cityscapes"]
    assert [e.id for e in source.entries] == [
        "aachen/aachen_000000_000019",
        "ulm/ulm_000000_000019",
    ]
    check_record(source[0], source.classes)
    assert source[0]["labels"].tolist() == TRAIN_IDS
    assert source[1]["labels"].tolist() == [[10] * 4] * 2


def test_cityscapes_train_ids_go_before_raw_ids(city, tmp_path):
    for key in ("aachen/aachen", "ulm/ulm"):
        values = np.where(np.array(TRAIN_IDS) == VOID, 255, TRAIN_IDS)
        save(tmp_path / f"gtFine/train/{key}_000000_000019_gtFine_labelTrainIds.png", values)
    source = city()
    assert all(source[i]["labels"].tolist() == TRAIN_IDS for i in (0, 1))
    (tmp_path / "metas").mkdir()
    (tmp_path / "metas/train.txt").write_text("ulm/ulm_000000_000019\n")
    assert [e.id for e in city().entries] == ["ulm/ulm_000000_000019"]


def test_cityscapes_problems(city, tmp_path):
    path = tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png"
    save(path, [[0, 19, 18, 18], [0, 0, 0, 0]])
    other = tmp_path / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelTrainIds.png"
    with pytest.raises(UserError, match=re.escape(f"{other}: the label file of id 'ulm/ulm_000")):
        city()  # some frames have train ids, so all need them
    with pytest.raises(BadSample, match=re.escape(f"{path}: labels 19 (1 px) out of range")):
        city(strict=False)[0]
    save(path, np.full((2, 4, 3), 70))
    with pytest.raises(BadSample, match=re.escape(f"{path}: labels painted in RGB")):
        city(strict=False)[0]


FACE = [[0, 1, 4, 5], [13, 18, 8, 9]]


@pytest.fixture
def faces(tmp_path):
    """Three merged faces, two of them in the list."""
    for key in ("0", "2", "10"):
        image(tmp_path, f"CelebA-512-img/{key}.jpg")
        save(tmp_path / f"CelebAMask-HQ-mergemask/{key}.png", FACE)
    (tmp_path / "metas").mkdir()
    (tmp_path / "metas/val.txt").write_text("10\n2\n")

    def build(split="val", **fields):
        return Folders(root=str(tmp_path), split=split, layout="celebamask_hq", **fields)

    return build


def test_celebamask_hq(faces):
    source = faces()
    assert source.classes is CLASS_LISTS["celeba_mask"] and [e.id for e in source.entries] == [
        "10",
        "2",
    ]
    assert source[0]["labels"].tolist() == FACE
    flip = Flip(probability=1.0).for_classes(source.classes)
    mirrored = flip(source[0], np.random.default_rng(0), True)["labels"]
    assert mirrored.tolist() == [[4, 5, 1, 0], [8, 9, 18, 13]]


def test_celebamask_hq_problems(faces, tmp_path):
    path = tmp_path / "CelebAMask-HQ-mergemask/10.png"
    save(path, [[0, 255, 255, 0], [0, 0, 0, 19]])  # a part mask where a merged one belongs
    text = f"{path}: labels 19 (1 px), 255 (2 px) out of range; there are 19 classes (file values 0"
    with pytest.raises(BadSample, match=re.escape(text)):
        faces()[0]
    with pytest.raises(UserError, match=r"no such split; there are: val\..*seq 0 27999 > metas"):
        faces("train")
    (tmp_path / "metas/val.txt").write_text("3\n")
    with pytest.raises(UserError, match=r"CelebA-512-img/3\.jpg: the image of id '3' is missing"):
        faces()


@pytest.fixture
def parts(tmp_path):
    """Two faces of 4x8 pixels as released, their part masks of half that size in RGB."""
    masks = {
        "0/00000_skin": [[0, 255, 255, 255], [0, 255, 255, 255]],
        "0/00000_hair": [[255, 255, 0, 0], [0, 0, 0, 0]],  # over the skin
        "0/00000_l_eye": [[0, 0, 255, 0], [0, 0, 0, 0]],
        "6/12345_u_lip": [[0, 0, 0, 0], [0, 0, 0, 255]],
    }
    for key in ("0", "12345"):
        image(tmp_path, f"CelebA-HQ-img/{key}.jpg", 4, 8)
    for name, mask in masks.items():
        rgb = np.repeat(np.array(mask)[..., None], 3, -1)
        save(tmp_path / f"CelebAMask-HQ-mask-anno/{name}.png", rgb)
    (tmp_path / "metas").mkdir()
    (tmp_path / "metas/train.txt").write_text("0\n12345\n")

    def build(**fields):
        return Folders(root=str(tmp_path), split="train", layout="celebamask_hq_parts", **fields)

    return build


PAINTED = [[13, 13, 4, 1], [0, 1, 1, 1]]


def test_parts_are_painted_in_order_and_enlarged(parts, tmp_path):
    source = parts()
    assert [e.id for e in source.entries] == ["0", "12345"]
    np.testing.assert_array_equal(source[0]["labels"], np.kron(PAINTED, np.ones((2, 2))))
    assert np.argwhere(source[1]["labels"] == 11).tolist() == [[2, 6], [2, 7], [3, 6], [3, 7]]
    grey = np.array([[0, 255, 255, 255], [0, 255, 255, 255]])
    save(tmp_path / "CelebAMask-HQ-mask-anno/0/00000_skin.png", grey)
    np.testing.assert_array_equal(parts()[0]["labels"], source[0]["labels"])
    first = source.fingerprint()
    save(tmp_path / "CelebAMask-HQ-mask-anno/0/00000_nose.png", grey)
    assert parts().fingerprint()["listing"] != first["listing"]


def test_parts_are_prepared_once_and_for_all(parts, tmp_path):
    out = tmp_path / "out"
    prepare(parts(strict=False), out, split="train")
    shards = ArrayRecords(folder=str(out), split="train")
    np.testing.assert_array_equal(shards[0]["labels"], np.kron(PAINTED, np.ones((2, 2))))
    assert shards.classes == CLASS_LISTS["celeba_mask"]


def test_parts_that_are_no_parts(parts, tmp_path):
    anno = tmp_path / "CelebAMask-HQ-mask-anno"
    save(anno / "0/00000_hair.png", np.zeros((3, 4)))
    text = f"{anno}/0/00000_hair.png: a mask of 4x3 (width x height); CelebAMask-HQ-mask-anno/0/000"
    with pytest.raises(BadSample, match=re.escape(text)):
        parts()[0]
    save(anno / "0/00000_hair.png", [[[255, 0, 0]] * 4] * 2)
    with pytest.raises(BadSample, match=r"00000_hair\.png: colours \(255, 0, 0\) \(8 px\) are not"):
        parts()[0]
    with pytest.raises(ValueError, match="takes its labels from segments or parts"):
        parts(void=(0,))
    (anno / "0/00000_hair.png").rename(anno / "0/00000_beard.png")
    (anno / "1").mkdir()
    (anno / "0/00000_skin.png").rename(anno / "1/00000_l_eye.png")
    (anno / "6/12345_u_lip.png").unlink()
    with pytest.raises(UserError) as caught:
        parts()
    assert "unknown or double: CelebAMask-HQ-mask-anno/0/00000_beard.png, " in str(caught.value)
    assert "0/00000_l_eye.png, CelebAMask-HQ-mask-anno/1/00000_l_eye.png; one file for each of" in (
        str(caught.value)
    )
    assert "the label file of id '12345' is missing" in str(caught.value)


def test_missing_files_are_named_by_the_usual_ending(tmp_path):
    image(tmp_path, "CelebA-512-img/1.png")
    (tmp_path / "CelebA-512-img/notes.txt").write_text("")
    (tmp_path / "CelebAMask-HQ-mergemask").mkdir()
    (tmp_path / "metas").mkdir()
    (tmp_path / "metas/val.txt").write_text("{7}\n")
    with pytest.raises(UserError, match=re.escape("CelebA-512-img/{7}.jpg: the image of id '{7}'")):
        Folders(root=str(tmp_path), split="val", layout="celebamask_hq")


def test_hidden_folders_are_left_out(stuff, tmp_path):
    image(tmp_path, "train2017/.ipynb_checkpoints/copy.jpg")
    assert len(stuff()) == 2

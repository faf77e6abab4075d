"""Where the data sets people have keep their files: one function per layout.

| layout | images | labels | split | captions |
|---|---|---|---|---|
| folders | images/SPLIT/ID.jpg | annotations/SPLIT/ID.png | the folder | captions/SPLIT.jsonl |
| mmseg | img_dir/SPLIT/ID.jpg | ann_dir/SPLIT/ID.png | the folder | captions/SPLIT.jsonl |
| voc | JPEGImages/ID.jpg | SegmentationClassAug/ID.png, else SegmentationClass/ID.png | \
ImageSets/Segmentation/SPLIT.txt | ImageSets/Caption/SPLIT.json |
| ade20k | images/SPLIT/ID.jpg | annotations/SPLIT/ID.png | training, validation | \
annotations_caption/SPLIT.json |
| coco_panoptic | SPLIT/ID.jpg | annotations/panoptic_SPLIT/ID.png | \
annotations/panoptic_SPLIT.json | annotations/captions_SPLIT.json |
| coco_stuff | SPLIT/ID.jpg | annotations/SPLIT/ID.png | metas/SPLIT.txt, else the folder | \
annotations/captions_SPLIT.json |
| cityscapes | leftImg8bit/SPLIT/ID_leftImg8bit.png | gtFine/SPLIT/ID_gtFine_labelTrainIds.png, \
else _labelIds.png | metas/SPLIT.txt, else the folder | none |
| celebamask_hq | CelebA-512-img/ID.jpg | CelebAMask-HQ-mergemask/ID.png | metas/SPLIT.txt | none |
| celebamask_hq_parts | CelebA-HQ-img/ID.jpg | CelebAMask-HQ-mask-anno/*/ID_PART.png, ID of five \
digits | metas/SPLIT.txt | none |

Label conventions: ``folders`` and ``mmseg`` as their classes.json says; ``voc`` 0..20 and 255 void;
``ade20k`` 0 "other" is void and value n is class n - 1 (``reduce_zero_label=True`` elsewhere),
``ade20k_other`` keeps "other" as class 0; ``coco_panoptic`` the categories of the JSON in the order
of their ids (the 133 of COCO are 0..132), void where the id is 0. Segments keep their ids; a crowd
keeps its class and loses its id, for it is not one instance. ``coco_stuff`` the stuffthingmaps as
released, category id - 1 with eleven gaps, 171 classes, 255 void (for maps that hold 0..170 give
``label_map`` or the layout ``folders``). ``cityscapes`` the 19 train ids and 255 void; raw ids
without a train id are void. ``celebamask_hq`` 0..18, no void; ``celebamask_hq_parts`` paints the
part files as the data set's own tool does, background first, later parts over earlier ones, and
enlarges the 512x512 labels to the 1024x1024 of their images. Both need lists of ids, which the
release has not: 0..27999 and 28000..29999 is a usual choice. Painting opens a dozen files a
record: ``launch/prepare.py`` does it once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from jointseg_jax.data import captions, files
from jointseg_jax.data.class_file import class_list, read_classes
from jointseg_jax.data.class_lists import CITYSCAPES_IDS, CLASS_LISTS, COCO_STUFF_IDS
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.labels import LabelRule
from jointseg_jax.data.records import BadSample
from jointseg_jax.data.sources.listing import (
    Entry,
    Found,
    Listing,
    find,
    lines_of,
    listed,
    optional,
    pair,
)
from jointseg_jax.types import FILE_VOID, UserError

Layout = Callable[[Path, str], Listing]


def list_folders(root: Path, split: str, *, images: str, labels: str) -> Listing:
    """Lists images and labels of the same name in two folders."""
    pictures = find(root, f"{images}/{split}", ".jpg")
    masks = find(root, f"{labels}/{split}", ".png")
    texts, problems = optional(root / f"captions/{split}.jsonl", captions.read_lines)
    entries = pair(root, {*pictures.names, *masks.names}, pictures, masks, texts)
    path = root / "classes.json"
    classes, rule = read_classes(path) if path.exists() else (None, LabelRule())
    return Listing(entries, problems, classes, rule)


def list_voc(root: Path, split: str) -> Listing:
    """Lists the ids of a VOC image set; augmented labels go before the original ones."""
    ids = lines_of(root, f"ImageSets/Segmentation/{split}.txt")
    pictures = find(root, "JPEGImages", ".jpg")
    masks = find(root, "SegmentationClass", ".png", needed=False)
    masks.names.update(find(root, "SegmentationClassAug", ".png", needed=False).names)
    texts, problems = optional(root / f"ImageSets/Caption/{split}.json", captions.read_mapping)
    entries = pair(root, ids, pictures, masks, texts)
    return Listing(entries, problems, CLASS_LISTS["voc"], LabelRule())


def list_ade20k(root: Path, split: str, *, other: bool) -> Listing:
    """Lists ADE20K as released for scene parsing; ``other`` keeps label 0 as a class."""
    folder = {"train": "training", "val": "validation"}.get(split, split)
    pictures = find(root, f"images/{folder}", ".jpg")
    masks = find(root, f"annotations/{folder}", ".png")
    texts, problems = optional(root / f"annotations_caption/{folder}.json", captions.read_mapping)
    entries = pair(root, {*pictures.names, *masks.names}, pictures, masks, texts)
    classes, rule = CLASS_LISTS["ade20k"], LabelRule(void=(0, 255), shift=1)
    if other:
        names, things = ("other", *classes.names), (False, *classes.isthing)
        classes, rule = Classes(names=names, isthing=things), LabelRule()
    return Listing(entries, problems, classes, rule)


def list_coco_panoptic(root: Path, split: str) -> Listing:
    """Lists the annotations of a COCO panoptic JSON."""
    path = files.inside(root, f"annotations/panoptic_{split}.json")
    content = files.read_json(path)
    try:
        categories = sorted(content["categories"], key=lambda c: c["id"])
        order = {category["id"]: i for i, category in enumerate(categories)}
        rows = [
            (PurePosixPath(a["file_name"]).stem, str(a["image_id"]), segment_rows(a, order))
            for a in content["annotations"]
        ]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"ERROR [data] {path}: no {error} in it; a COCO panoptic JSON has annotations "
            "(image_id, file_name, segments_info) and categories. Check config.data.*.root."
        ) from None
    texts, problems = optional(root / f"annotations/captions_{split}.json", captions.read_coco)
    if texts is not None:
        texts = {key: texts.get(image, ()) for key, image, _ in rows}
    pictures = find(root, split, ".jpg")
    masks = find(root, f"annotations/panoptic_{split}", ".png")
    segments = {key: row for key, _, row in rows}
    entries = tuple(
        entry._replace(segments=segments[entry.id])
        for entry in pair(root, [key for key, _, _ in rows], pictures, masks, texts)
    )
    return Listing(entries, problems, class_list(coco_names(categories)), None)


def segment_rows(annotation: dict, order: dict[int, int]) -> np.ndarray:
    """Returns (segment id, class, is crowd, area) of the segments of an image; area -1: unknown."""
    rows = [
        (s["id"], order[s["category_id"]], s.get("iscrowd", 0), s.get("area", -1))
        for s in annotation["segments_info"]
    ]
    return np.array(rows, np.int32).reshape(-1, 4)


def coco_names(categories: list[dict]) -> list[dict]:
    """Returns COCO categories in the spelling of ``classes.json``."""
    coloured = all("color" in c for c in categories)
    return [
        {"name": c["name"], "isthing": c.get("isthing", 0)}
        | ({"colour": c["color"]} if coloured else {})
        for c in categories
    ]


def list_coco_stuff(root: Path, split: str) -> Listing:
    """Lists COCO images with the pixel maps of COCO-Stuff."""
    short = split.removesuffix("2017")
    folder = f"{short}2017" if short in ("train", "val") else split
    pictures = find(root, folder, ".jpg")
    masks = find(root, f"annotations/{folder}", ".png")
    ids = listed(root, (f"metas/{split}.txt", f"metas/{short}.txt"), pictures, masks)
    texts, problems = optional(root / f"annotations/captions_{folder}.json", captions.read_coco)
    if texts is not None:
        texts = {key: texts.get(key.lstrip("0"), ()) for key in ids}
    entries = pair(root, ids, pictures, masks, texts)
    rule = LabelRule(table=tuple(zip(COCO_STUFF_IDS, range(len(COCO_STUFF_IDS)))))
    return Listing(entries, problems, CLASS_LISTS["coco_stuff"], rule)


def list_cityscapes(root: Path, split: str) -> Listing:
    """Lists Cityscapes with fine annotations; train ids go before raw ids."""
    pictures = find(root, f"leftImg8bit/{split}", ".png", suffix="_leftImg8bit")
    masks = find(root, f"gtFine/{split}", ".png", suffix="_gtFine_labelTrainIds")
    rule = LabelRule()
    if not masks.names:
        masks = find(root, f"gtFine/{split}", ".png", suffix="_gtFine_labelIds")
        unused = sorted(set(range(CITYSCAPES_IDS[-1] + 1)) - set(CITYSCAPES_IDS))
        table = tuple(zip(CITYSCAPES_IDS, range(len(CITYSCAPES_IDS))))
        rule = LabelRule(void=(FILE_VOID, *unused), table=table)
    ids = listed(root, (f"metas/{split}.txt",), pictures, masks)
    return Listing(pair(root, ids, pictures, masks, None), (), CLASS_LISTS["cityscapes"], rule)


FACE_LISTS = (
    " The release has no lists: write one, an id a line, such as `seq 0 27999 > metas/train.txt`."
)


def list_celebamask_hq(root: Path, split: str) -> Listing:
    """Lists CelebAMask-HQ with merged masks."""
    ids = lines_of(root, f"metas/{split}.txt", FACE_LISTS)
    pictures = find(root, "CelebA-512-img", ".jpg")
    masks = find(root, "CelebAMask-HQ-mergemask", ".png")
    entries = pair(root, ids, pictures, masks, None)
    # No void: a 255 is the sign of a part mask (0 and 255) in place of a merged one.
    return Listing(entries, (), CLASS_LISTS["celeba_mask"], LabelRule(void=()))


def list_celebamask_hq_parts(root: Path, split: str) -> Listing:
    """Lists CelebAMask-HQ as released: one mask file per face and part."""
    ids = lines_of(root, f"metas/{split}.txt", FACE_LISTS)
    pictures = find(root, "CelebA-HQ-img", ".jpg")
    painted = find(root, "CelebAMask-HQ-mask-anno", ".png")
    parts = parts_by_face(painted)
    firsts = {key: [found[0][1]] for key, found in parts.items()}
    masks = Found(painted.prefix, "_PART.png", firsts)
    entries = pair(root, ids, pictures, masks, None)
    entries = tuple(e if e.problem else with_parts(root, e, parts[e.id]) for e in entries)
    return Listing(entries, (), CLASS_LISTS["celeba_mask"], None)


def parts_by_face(painted: Found) -> dict[str, list[tuple[str, str]]]:
    """Returns (part, file) by id, sorted; ``3/06012_l_eye.png`` is part ``l_eye`` of id 6012."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for stem, names in painted.names.items():
        number, _, part = PurePosixPath(stem).name.partition("_")
        key = number.lstrip("0") or "0"
        parts.setdefault(key, []).extend((part, name) for name in names)
    return {key: sorted(found) for key, found in parts.items()}


def with_parts(root: Path, entry: Entry, found: list[tuple[str, str]]) -> Entry:
    """Returns the entry with its part files in painting order, or with what is wrong with them."""
    known = CLASS_LISTS["celeba_mask"].names
    kinds = [part for part, _ in found]
    wrong = sorted({part for part in kinds if part not in known[1:] or kinds.count(part) > 1})
    if wrong:
        names = ", ".join(name for part, name in found if part in wrong)
        problem = BadSample(
            str(root / found[0][1]),
            f"id {entry.id!r} has part files that are unknown or double: {names}",
            f"one file for each of {', '.join(known[1:])}",
            "Remove or rename them.",
        )
        return entry._replace(problem=problem)
    return entry._replace(parts=tuple(sorted((known.index(part), name) for part, name in found)))


LAYOUTS: dict[str, Layout] = {
    "folders": functools.partial(list_folders, images="images", labels="annotations"),
    "mmseg": functools.partial(list_folders, images="img_dir", labels="ann_dir"),
    "voc": list_voc,
    "ade20k": functools.partial(list_ade20k, other=False),
    "ade20k_other": functools.partial(list_ade20k, other=True),
    "coco_panoptic": list_coco_panoptic,
    "coco_stuff": list_coco_stuff,
    "cityscapes": list_cityscapes,
    "celebamask_hq": list_celebamask_hq,
    "celebamask_hq_parts": list_celebamask_hq_parts,
}

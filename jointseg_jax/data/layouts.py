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

Label conventions: ``folders`` and ``mmseg`` as their classes.json says; ``voc`` 0..20 and 255 void;
``ade20k`` 0 "other" is void and value n is class n - 1 (``reduce_zero_label=True`` elsewhere),
``ade20k_other`` keeps "other" as class 0; ``coco_panoptic`` the categories of the JSON in the order
of their ids (the 133 of COCO are 0..132), void where the id is 0. Segments keep their ids; a crowd
keeps its class and loses its id, for it is not one instance.

A listing is sorted by id. What is wrong with an id stands in its entry; everything is collected,
so that one run shows all problems.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from jointseg_jax.data import captions, files
from jointseg_jax.data.captions import Captions
from jointseg_jax.data.class_file import class_list, read_classes
from jointseg_jax.data.class_lists import CLASS_LISTS
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.labels import LabelRule
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import UserError


class Entry(NamedTuple):
    """One id of a split: its files, relative to the root, or what is wrong with it.

    ``segments`` holds (segment id, class, is crowd, area) per row, for panoptic labels.
    """

    id: str
    image: str = ""
    labels: str = ""
    captions: tuple[str, ...] = ()
    segments: np.ndarray | None = None
    problem: BadSample | None = None


class Listing(NamedTuple):
    """A split: entries in order, problems that belong to no entry, and what labels mean."""

    entries: tuple[Entry, ...]
    problems: tuple[BadSample, ...]
    classes: Classes | None
    rule: LabelRule | None


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


LAYOUTS: dict[str, Layout] = {
    "folders": functools.partial(list_folders, images="images", labels="annotations"),
    "mmseg": functools.partial(list_folders, images="img_dir", labels="ann_dir"),
    "voc": list_voc,
    "ade20k": functools.partial(list_ade20k, other=False),
    "ade20k_other": functools.partial(list_ade20k, other=True),
    "coco_panoptic": list_coco_panoptic,
}


class Found(NamedTuple):
    """The picture files under a folder: names by id, an id being a name without its ending."""

    pattern: str  # where the file of an id is expected
    names: dict[str, list[str]]


def find(root: Path, folder: str, ending: str, *, needed: bool = True) -> Found:
    """Returns the picture files under a folder; ``ending`` is the usual one."""
    top = files.inside(root, folder)
    if needed and not top.is_dir():
        beside = sorted(p.name for p in top.parent.iterdir()) if top.parent.is_dir() else []
        raise UserError(
            f"ERROR [data] {top}: no such folder; the layout keeps files there"
            f"{f', and beside it there are: {chr(44).join(beside[:20])}' if beside else ''}. "
            "Check config.data.*.root, config.data.*.split and config.data.*.layout."
        )
    found: dict[str, list[str]] = {}
    for where, _, names in os.walk(top):
        for name in names:
            stem, ending = os.path.splitext(os.path.relpath(os.path.join(where, name), top))
            if ending.lower() in files.PICTURES and not name.startswith("."):
                found.setdefault(stem, []).append(f"{folder}/{stem}{ending}")
    return Found(f"{folder}/{{}}{ending}", found)


def lines_of(root: Path, name: str) -> list[str]:
    """Returns the ids of a split file, as they stand."""
    path = files.inside(root, name)
    if not path.exists():
        have = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise UserError(
            f"ERROR [data] {path}: no such split; there are: {', '.join(have) or 'none'}. "
            "Check config.data.*.root and config.data.*.split."
        )
    return [line.strip() for line in files.read_text(path).splitlines() if line.strip()]


def optional(
    path: Path, reader: Callable[[Path], tuple[Captions, list[BadSample]]]
) -> tuple[Captions | None, tuple[BadSample, ...]]:
    """Reads a caption file if there is one; its ids lose file endings."""
    if not path.exists():
        return None, ()
    texts, problems = reader(path)
    pictures = files.PICTURES
    plain = {
        k.rsplit(".", 1)[0] if k.lower().endswith(pictures) else k: v for k, v in texts.items()
    }
    return plain, tuple(problems)


def pair(
    root: Path, ids: Iterable[str], images: Found, labels: Found, texts: Captions | None
) -> tuple[Entry, ...]:
    """Joins images, labels and captions by id; what does not fit becomes the entry's problem."""
    ids = sorted(ids)
    same = Counter(key.casefold() for key in ids)
    entries = []
    for key in dict.fromkeys(ids):
        try:
            if same[key.casefold()] > 1:
                raise clash(root, [k for k in ids if k.casefold() == key.casefold()], images)
            entries.append(entry_of(root, key, images, labels, texts))
        except BadSample as problem:
            entries.append(Entry(key, problem=problem))
    return tuple(entries)


def entry_of(root: Path, key: str, images: Found, labels: Found, texts: Captions | None) -> Entry:
    """Returns the entry of an id, or raises what is wrong with it."""
    files.check_name(root, key)
    image = only(root, images, key, "image")
    mask = only(root, labels, key, "label file")
    if texts is not None and not texts.get(key):
        raise BadSample(
            str(root / image),
            "has no caption",
            "where there is a caption file it has every id",
            "Add its caption, or remove the caption file to have captions made from the labels.",
        )
    return Entry(key, image, mask, (texts or {}).get(key, ()))


def only(root: Path, found: Found, key: str, what: str) -> str:
    """Returns the one file of an id, refusing none, several, and links out of the root."""
    names = found.names.get(key, [])
    if not names:
        raise files.missing(root / found.pattern.format(key), f"{what} of id {key!r}")
    if len(names) > 1:
        raise BadSample(
            str(root / names[0]),
            f"id {key!r} has {len(names)} files: {', '.join(sorted(names))}",
            f"one {what} per id",
            "Remove or rename all but one.",
        )
    files.inside(root, names[0])
    return names[0]


def clash(root: Path, keys: list[str], images: Found) -> BadSample:
    """Returns the complaint about ids that are equal, or equal but for case."""
    paths = [name for key in dict.fromkeys(keys) for name in images.names.get(key, [key])]
    return BadSample(
        str(root / paths[0]),
        f"ids {', '.join(map(repr, keys))} are the same or differ by case only "
        f"({', '.join(paths)})",
        "ids differ on every file system",
        "Rename or remove all but one.",
    )

"""Where the data sets people have keep their files: one function per layout.

| layout | images | labels | split | captions |
|---|---|---|---|---|
| folders | images/SPLIT/ID.jpg | annotations/SPLIT/ID.png | the folder | |
| mmseg | img_dir/SPLIT/ID.jpg | ann_dir/SPLIT/ID.png | the folder | |
| voc | JPEGImages/ID.jpg | SegmentationClassAug/ID.png, else SegmentationClass/ID.png | \
ImageSets/Segmentation/SPLIT.txt | ImageSets/Caption/SPLIT.json |
| ade20k | images/SPLIT/ID.jpg | annotations/SPLIT/ID.png | training, validation | \
annotations_caption/SPLIT.json |
| coco_panoptic | SPLIT/ID.jpg | annotations/panoptic_SPLIT/ID.png | \
annotations/panoptic_SPLIT.json | annotations/captions_SPLIT.json |
| coco_stuff | SPLIT/ID.jpg | annotations/SPLIT/ID.png | metas/SPLIT.txt, else the folder | \
annotations/captions_SPLIT.json |
| cityscapes | leftImg8bit/SPLIT/ID_leftImg8bit.png | gtFine/SPLIT/ID_gtFine_labelTrainIds.png, \
else _labelIds.png | metas/SPLIT.txt, else the folder | |
| celebamask_hq | CelebA-512-img/ID.jpg | CelebAMask-HQ-mergemask/ID.png | metas/SPLIT.txt | |
| celebamask_hq_parts | CelebA-HQ-img/ID.jpg | CelebAMask-HQ-mask-anno/*/ID_PART.png, ID of five \
digits | metas/SPLIT.txt | |

Captions are in the file that is named here, or else under one of the usual names of
``caption_files.py``.

What label values mean stands at each function. An id is the name of a file without its ending, and
a split is sorted by id. What is wrong with an id stands in its entry: one run shows all problems.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, cast

import numpy as np

from jointseg_jax.data import files
from jointseg_jax.data.captions import read_coco
from jointseg_jax.data.class_lists import CITYSCAPES_IDS, CLASS_LISTS, COCO_STUFF_IDS
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.labels import LabelRule, class_list, read_classes
from jointseg_jax.data.records import BadSample
from jointseg_jax.data.sources.caption_files import NO_CAPTIONS, FoundCaptions, captions_of
from jointseg_jax.types import FILE_VOID, UserError


class Entry(NamedTuple):
    """One id of a split: its files, relative to the root, or what is wrong with it."""

    id: str
    image: str = ""
    labels: str = ""
    captions: tuple[str, ...] = ()
    segments: np.ndarray | None = None  # panoptic: rows (segment id, class, is crowd, area)
    problem: BadSample | None = None
    parts: tuple[tuple[int, str], ...] = ()  # (class, file) in painting order, a file per class


class SplitIndex(NamedTuple):
    """A split of a folder, listed."""

    entries: tuple[Entry, ...]  # in order
    problems: tuple[BadSample, ...]  # those that belong to no entry
    classes: Classes | None  # None: the folder does not name them
    rule: LabelRule | None  # None: segments and parts say themselves what they are


class FoundFiles(NamedTuple):
    """The picture files under a folder, by id."""

    prefix: str  # folder and "/"
    suffix: str  # of file names, ending included
    names: dict[str, list[str]]
    unread: dict[str, list[str]]
    """Pictures of kinds that are not read, by id. Their ids are listed, with this as a problem."""
    problems: tuple[BadSample, ...] = ()  # links and folders that were left out
    expected: Mapping[str, str] = {}  # names of missing files, where the id does not give them

    @property
    def ids(self) -> set[str]:
        """The ids of all pictures."""
        return {*self.names, *self.unread}


def find(
    root: Path, folder: str, ending: str, *, suffix: str = "", needed: bool = True
) -> FoundFiles:
    """Returns the picture files under a folder, hidden ones left out.

    Args:
      ending: the usual one; every ending of a picture is found.
      suffix: what file names have between the id and the ending; files without it are left out.
      needed: refuses to go on without the folder.
    """
    top = files.inside(root, folder)
    if needed and not top.is_dir():
        beside = sorted(p.name for p in top.parent.iterdir()) if top.parent.is_dir() else []
        others = f", and beside it there are: {','.join(beside[:20])}" if beside else ""
        raise UserError(
            f"ERROR [data] {top}: no such folder; the layout keeps files there{others}. "
            "Check config.data.*.root, config.data.*.split and config.data.*.layout."
        )
    prefix = "" if folder == "." else f"{folder}/"
    read: dict[str, list[str]] = {}
    unread: dict[str, list[str]] = {}
    problems = []
    for name in files.walk(root, top) if top.is_dir() else ():
        if isinstance(name, BadSample):
            problems.append(name)
            continue
        stem, kind = os.path.splitext(name)
        known, other = (kind.lower() in kinds for kinds in (files.PICTURES, files.OTHER_PICTURES))
        if (known or other) and stem.endswith(suffix):
            key = files.one_name(stem.removesuffix(suffix))
            (read if known else unread).setdefault(key, []).append(f"{prefix}{name}")
    return FoundFiles(prefix, suffix + ending, read, unread, tuple(problems))


def left_out(*sides: FoundFiles) -> tuple[BadSample, ...]:
    """Returns the links and folders that a listing could not enter."""
    return tuple(problem for side in sides for problem in side.problems)


def split_file(root: Path, name: str, remedy: str = "") -> Path:
    """Returns the path of a split file; refuses one that is not there, with the others."""
    path = files.inside(root, name)
    if not path.exists():
        have = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise UserError(
            f"ERROR [data] {path}: no such split; there are: {', '.join(have) or 'none'}. "
            f"Check config.data.*.root and config.data.*.split.{remedy}"
        )
    return path


def ids_of(path: Path, *sides: FoundFiles) -> list[str]:
    """Returns the ids of a split file; what else its lines may hold says ``id_of``."""
    lines = files.lines(files.read_text(path))
    return [id_of(files.one_name(line), sides, f"{path}:{number}") for number, line in lines]


def id_of(line: str, sides: Sequence[FoundFiles], where: str) -> str:
    """Returns the id of a line: an id, the name of a file, two of them, or an id and a flag.

    ``2007_000032``, ``2007_000032.jpg``, ``/JPEGImages/2007_000032.jpg
    /SegmentationClassAug/2007_000032.png`` and ``2007_000032 -1`` are the same.

    Raises:
      BadSample: a line names files that are not those of its id.
    """
    if any(line in side.ids for side in sides):
        return line  # also ids with blanks in them
    first, *others = line.split()
    named = [column for column in others if column not in ("-1", "0", "1")]
    if not all("/" in column or _is_picture(column) for column in named):
        return line
    # An id is inside the folder; only the names of files are written from elsewhere.
    leaves = first.startswith("/") or ".." in first.split("/")
    if leaves and not _is_picture(first):
        return line
    key = bare_id(first, sides)
    read = [name for side in sides for name in side.names.get(key, ())]
    for column in (first, *named) if read else ():
        path = column.lstrip("./")
        if _is_picture(path) and not any(
            name.endswith(path) or path.endswith(name) for name in read
        ):
            rule = f"files of id {key!r} in this layout: {', '.join(read)}"
            remedy = "Write lists of one id a line, or put the files where the layout has them."
            raise BadSample(where, f"{column!r} is in the list", rule, remedy)
    return key


def bare_id(name: str, sides: Sequence[FoundFiles]) -> str:
    """Returns the id of a file name: without its ending, and without folders above the ids."""
    stem = name.rsplit(".", 1)[0] if _is_picture(name) else name
    parts = stem.lstrip("./").split("/")
    for side in sides:
        suffix = os.path.splitext(side.suffix)[0]
        for start in range(len(parts)):
            if (key := "/".join(parts[start:]).removesuffix(suffix)) in side.ids:
                return key
    return parts[-1]


def _is_picture(name: str) -> bool:
    return name.lower().endswith(files.PICTURES)


def listed(root: Path, names: Iterable[str], *sides: FoundFiles) -> Iterable[str]:
    """Returns the ids of the first split file that exists, or else those of all files."""
    for name in names:
        if files.inside(root, name).exists():
            return ids_of(split_file(root, name), *sides)
    return set().union(*(side.ids for side in sides))


def pair(
    root: Path,
    ids: Iterable[str],
    images: FoundFiles | None,
    labels: FoundFiles | None,
    texts: FoundCaptions = NO_CAPTIONS,
) -> tuple[Entry, ...]:
    """Joins the sides given by id; what does not fit becomes the entry's problem."""
    ids = sorted(ids)
    # Case-folded: ids that differ by case only are one file on macOS and Windows.
    same: dict[str, list[str]] = {}
    for key in ids:
        same.setdefault(key.casefold(), []).append(key)
    entries = []
    for key in dict.fromkeys(ids):
        try:
            if len(equal := same[key.casefold()]) > 1:
                raise id_collision(root, equal, labels if images is None else images)
            files.check_name(root, key)
            image = single_file(root, images, key, "image")
            mask = single_file(root, labels, key, "label file")
            lines = (texts.texts or {}).get(key, ())
            if texts.texts is not None and texts.complete and not lines:
                raise without_caption(root / (image or mask))
            entries.append(Entry(key, image, mask, lines))
        except BadSample as problem:
            entries.append(Entry(key, problem=problem))
    return tuple(entries)


def without_caption(path: Path) -> BadSample:
    """Returns the problem of an id that a caption file leaves out."""
    rule = "where there is a caption file it has every id"
    remedy = "Add its caption, or remove the caption file to have captions made from the labels."
    return BadSample(str(path), "has no caption", rule, remedy)


def single_file(root: Path, side: FoundFiles | None, key: str, what: str) -> str:
    """Returns the one file of an id, refusing none, several, and links out of the root."""
    if side is None:
        return ""
    names = side.names.get(key, [])
    if not names and (unread := side.unread.get(key)):
        raise of_unread_kind(root, unread[0], what)
    if not names:
        name = side.expected.get(key, f"{key}{side.suffix}")
        raise files.missing(root / f"{side.prefix}{name}", f"{what} of id {key!r}")
    if len(names) > 1:
        found = f"id {key!r} has {len(names)} files: {', '.join(sorted(names))}"
        remedy = "Remove or rename all but one."
        raise BadSample(str(root / names[0]), found, f"one {what} per id", remedy)
    files.inside(root, names[0])
    return names[0]


def of_unread_kind(root: Path, name: str, what: str) -> BadSample:
    """Returns the problem of a picture whose kind is not read."""
    kind = os.path.splitext(name)[1]
    rule = f"kinds that are read: {', '.join(files.PICTURES)}"
    remedy = "Convert it, as to PNG, or take it out of the folder."
    return BadSample(str(root / name), f"the {what} is a {kind}, which is not read", rule, remedy)


def id_collision(root: Path, keys: list[str], side: FoundFiles | None) -> BadSample:
    """Returns the problem of ids that are equal, or equal but for case."""
    names = {} if side is None else side.names
    paths = [name for key in dict.fromkeys(keys) for name in names.get(key, [key])]
    ids, places = ", ".join(map(repr, keys)), ", ".join(paths)
    found = f"ids {ids} are the same or differ by case only ({places})"
    rule, remedy = "ids differ on every file system", "Rename or remove all but one."
    return BadSample(str(root / paths[0]), found, rule, remedy)


def list_folders(root: Path, split: str, *, images: str, labels: str) -> SplitIndex:
    """Lists images and labels of the same name in two folders; classes.json says what they mean."""
    pictures = find(root, f"{images}/{split}", ".jpg")
    masks = find(root, f"{labels}/{split}", ".png")
    texts = captions_of(root, split, f"{images}/{split}", pictures.ids)
    entries = pair(root, pictures.ids | masks.ids, pictures, masks, texts)
    path = root / "classes.json"
    classes, rule = read_classes(path) if path.exists() else (None, LabelRule())
    return SplitIndex(entries, texts.problems + left_out(pictures, masks), classes, rule)


def list_voc(root: Path, split: str) -> SplitIndex:
    """Lists the ids of a VOC image set: labels 0..20, and 255 is void."""
    path = split_file(root, f"ImageSets/Segmentation/{split}.txt")
    pictures = find(root, "JPEGImages", ".jpg")
    masks = find(root, "SegmentationClass", ".png", needed=False)
    # Augmented labels (SBD) go before the original ones, which lack most of ``trainaug``.
    augmented = find(root, "SegmentationClassAug", ".png", needed=False)
    masks.names.update(augmented.names)
    masks.unread.update(augmented.unread)
    ids = ids_of(path, pictures, masks)
    texts = captions_of(root, split, "JPEGImages", pictures.ids, f"ImageSets/Caption/{split}.json")
    entries = pair(root, ids, pictures, masks, texts)
    problems = texts.problems + left_out(pictures, masks, augmented)
    return SplitIndex(entries, problems, CLASS_LISTS["voc"], LabelRule())


def list_ade20k(root: Path, split: str, *, other: bool) -> SplitIndex:
    """Lists ADE20K as released for scene parsing; ``other`` keeps label 0 as a class."""
    # Value 0 is "other": void, so that value n is class n - 1 (elsewhere: reduce_zero_label=True).
    folder = {"train": "training", "val": "validation"}.get(split, split)
    pictures = find(root, f"images/{folder}", ".jpg")
    masks = find(root, f"annotations/{folder}", ".png")
    texts = captions_of(
        root, folder, f"images/{folder}", pictures.ids, f"annotations_caption/{folder}.json"
    )
    entries = pair(root, pictures.ids | masks.ids, pictures, masks, texts)
    classes, rule = CLASS_LISTS["ade20k"], LabelRule(void=(0, 255), shift=1)
    if other:
        names, things = ("other", *classes.names), (False, *classes.isthing)
        classes, rule = Classes(names=names, isthing=things), LabelRule()
    return SplitIndex(entries, texts.problems + left_out(pictures, masks), classes, rule)


def list_coco_panoptic(root: Path, split: str) -> SplitIndex:
    """Lists the annotations of a COCO panoptic JSON.

    An annotation's image is the one that ``images`` has under its ``image_id``; without it, the one
    of the annotation's own name. Classes are the categories in the order of their ids (the 133 of
    COCO are 0..132). Segment 0 is void. Segments keep their ids; a crowd keeps its class and loses
    its id, for it is not one instance.
    """
    path = files.inside(root, f"annotations/panoptic_{split}.json")
    content = cast(dict, files.read_json(path))
    try:
        categories = sorted(content["categories"], key=lambda c: c["id"])
        order = {category["id"]: i for i, category in enumerate(categories)}
        images = {str(i["id"]): str(i["file_name"]) for i in content.get("images", ())}
        rows = [
            (files.one_name(str(a["file_name"])), str(a["image_id"]), segment_rows(a, order))
            for a in content["annotations"]
        ]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"ERROR [data] {path}: no {error} in it; a COCO panoptic JSON has annotations "
            "(image_id, file_name, segments_info) and categories. Check config.data.*.root."
        ) from None
    keys = [PurePosixPath(label).stem for label, _, _ in rows]
    pictures = find(root, split, ".jpg")
    masks = find(root, f"annotations/panoptic_{split}", ".png")
    texts = captions_of(
        root, split, split, pictures.ids, f"annotations/captions_{split}.json", read_coco
    )
    if texts.texts is not None:
        # Those of COCO are keyed by image id, those of others by the name of the image.
        known = texts.texts
        known = {key: known.get(row[1], known.get(key, ())) for key, row in zip(keys, rows)}
        texts = texts._replace(texts=known)
    labels = {key: label for key, (label, _, _) in zip(keys, rows)}
    named = {key: images.get(image, labels[key]) for key, (_, image, _) in zip(keys, rows)}
    segments = {key: row for key, (_, _, row) in zip(keys, rows)}
    joined = pair(root, keys, renamed(pictures, named), renamed(masks, labels), texts)
    entries = tuple(entry._replace(segments=segments[entry.id]) for entry in joined)
    # In the spelling of ``classes.json``.
    spelt = {"name": "name", "isthing": "isthing", "color": "colour"}
    classes = class_list([{spelt[k]: c[k] for k in spelt if k in c} for c in categories])
    return SplitIndex(entries, texts.problems + left_out(pictures, masks), classes, None)


def renamed(found: FoundFiles, names: Mapping[str, str]) -> FoundFiles:
    """Returns the files of each id, ``names`` being the file names that a JSON has for them.

    That is the file itself; without it one that differs by its ending, as of converted pictures;
    without that, those of the name in folders below, as Cityscapes has one for each city.
    """
    below: dict[str, list[str]] = {}
    for stem, paths in found.names.items():
        below.setdefault(PurePosixPath(stem).name, []).extend(paths)
    files_of = {}
    for key, name in names.items():
        stem = os.path.splitext(name)[0]
        paths = found.names.get(stem) or below.get(PurePosixPath(stem).name, [])
        exact = [path for path in paths if path == f"{found.prefix}{name}"]
        files_of[key] = exact or paths
    return found._replace(names=files_of, expected=names)


def segment_rows(annotation: dict, order: dict[int, int]) -> np.ndarray:
    """Returns (segment id, class, is crowd, area) of the segments of an image; area -1: unknown."""
    rows = [
        (s["id"], order[s["category_id"]], s.get("iscrowd", 0), s.get("area", -1))
        for s in annotation["segments_info"]
    ]
    return np.array(rows, np.int32).reshape(-1, 4)


def list_coco_stuff(root: Path, split: str) -> SplitIndex:
    """Lists COCO images with the stuffthingmaps of COCO-Stuff as released.

    Values are category ids - 1 with eleven gaps, 171 classes, 255 void. For maps that hold 0..170
    give ``label_map``, or use the layout ``folders``.
    """
    short = split.removesuffix("2017")
    folder = f"{short}2017" if short in ("train", "val") else split
    pictures = find(root, folder, ".jpg")
    masks = find(root, f"annotations/{folder}", ".png")
    ids = listed(root, (f"metas/{split}.txt", f"metas/{short}.txt"), pictures, masks)
    texts = captions_of(
        root, folder, folder, pictures.ids, f"annotations/captions_{folder}.json", read_coco
    )
    if texts.texts is not None:
        # Captions are keyed by image id; file names pad it with zeros to twelve digits.
        known = texts.texts
        known = {key: known.get(key.lstrip("0") or "0", known.get(key, ())) for key in ids}
        texts = texts._replace(texts=known)
    entries = pair(root, ids, pictures, masks, texts)
    rule = LabelRule(table=tuple(zip(COCO_STUFF_IDS, range(len(COCO_STUFF_IDS)))))
    problems = texts.problems + left_out(pictures, masks)
    return SplitIndex(entries, problems, CLASS_LISTS["coco_stuff"], rule)


def list_cityscapes(root: Path, split: str) -> SplitIndex:
    """Lists Cityscapes with fine annotations: the 19 train ids, 255 is void."""
    pictures = find(root, f"leftImg8bit/{split}", ".png", suffix="_leftImg8bit")
    masks = find(root, f"gtFine/{split}", ".png", suffix="_gtFine_labelTrainIds")
    rule = LabelRule()
    if not masks.names:
        masks = find(root, f"gtFine/{split}", ".png", suffix="_gtFine_labelIds")
        # Raw ids, where nobody made train ids yet: those without a train id are void.
        unused = sorted(set(range(CITYSCAPES_IDS[-1] + 1)) - set(CITYSCAPES_IDS))
        table = tuple(zip(CITYSCAPES_IDS, range(len(CITYSCAPES_IDS))))
        rule = LabelRule(void=(FILE_VOID, *unused), table=table)
    ids = listed(root, (f"metas/{split}.txt",), pictures, masks)
    texts = captions_of(root, split, f"leftImg8bit/{split}", pictures.ids)
    problems = texts.problems + left_out(pictures, masks)
    return SplitIndex(
        pair(root, ids, pictures, masks, texts), problems, CLASS_LISTS["cityscapes"], rule
    )


FACE_LISTS = (
    " The release has no lists: write one, an id a line, such as `seq 0 27999 > metas/train.txt`."
)


def list_celebamask_hq(root: Path, split: str) -> SplitIndex:
    """Lists CelebAMask-HQ with merged masks, 0..18."""
    path = split_file(root, f"metas/{split}.txt", FACE_LISTS)
    pictures = find(root, "CelebA-512-img", ".jpg")
    masks = find(root, "CelebAMask-HQ-mergemask", ".png")
    ids = ids_of(path, pictures, masks)
    texts = captions_of(root, split, "CelebA-512-img", pictures.ids)
    entries = pair(root, ids, pictures, masks, texts)
    problems = texts.problems + left_out(pictures, masks)
    # No void: a 255 is the sign of a part mask (0 and 255) in place of a merged one.
    return SplitIndex(entries, problems, CLASS_LISTS["celeba_mask"], LabelRule(void=()))


def list_celebamask_hq_parts(root: Path, split: str) -> SplitIndex:
    """Lists CelebAMask-HQ as released: one mask file per face and part.

    Parts are painted as the data set's own tool does, later ones over earlier ones, and the labels
    of 512x512 enlarged to the 1024x1024 of their images. That opens a dozen files a record:
    ``launch/prepare.py`` does it once.
    """
    path = split_file(root, f"metas/{split}.txt", FACE_LISTS)
    pictures = find(root, "CelebA-HQ-img", ".jpg")
    ids = ids_of(path, pictures)
    painted = find(root, "CelebAMask-HQ-mask-anno", ".png")
    parts = parts_by_face(painted)
    # Any one part stands for the labels of a face, so that a face without any is noticed.
    firsts = {key: [named[0][1]] for key, named in parts.items()}
    texts = captions_of(root, split, "CelebA-HQ-img", pictures.ids)
    entries = pair(root, ids, pictures, FoundFiles(painted.prefix, "_PART.png", firsts, {}), texts)
    entries = tuple(e if e.problem else with_parts(root, e, parts[e.id]) for e in entries)
    problems = texts.problems + left_out(pictures, painted)
    return SplitIndex(entries, problems, CLASS_LISTS["celeba_mask"], None)


def parts_by_face(painted: FoundFiles) -> dict[str, list[tuple[str, str]]]:
    """Returns (part, file) by id, sorted; ``3/06012_l_eye.png`` is part ``l_eye`` of id 6012."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for stem, names in painted.names.items():
        number, _, part = PurePosixPath(stem).name.partition("_")
        key = number.lstrip("0") or "0"
        parts.setdefault(key, []).extend((part, name) for name in names)
    return {key: sorted(named) for key, named in parts.items()}


def with_parts(root: Path, entry: Entry, named: list[tuple[str, str]]) -> Entry:
    """Returns the entry with its part files in painting order, or with what is wrong with them."""
    known = CLASS_LISTS["celeba_mask"].names
    kinds = [part for part, _ in named]
    errors = {part for part in kinds if part not in known[1:] or kinds.count(part) > 1}
    if errors:
        names = ", ".join(name for part, name in named if part in errors)
        found = f"id {entry.id!r} has part files that are unknown or double: {names}"
        rule = f"one file for each of {', '.join(known[1:])}"
        problem = BadSample(str(root / named[0][1]), found, rule, "Remove or rename them.")
        return entry._replace(problem=problem)
    return entry._replace(parts=tuple(sorted((known.index(part), name) for part, name in named)))


LAYOUTS: dict[str, Callable[[Path, str], SplitIndex]] = {
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

RULED_BY_FILE = ("folders", "mmseg")
"""Layouts in which a classes.json says what label values mean."""

LAYOUT_CLASSES = {name: name for name in ("voc", "ade20k", "coco_panoptic", "coco_stuff")} | {
    "cityscapes": "cityscapes",
    "celebamask_hq": "celeba_mask",
    "celebamask_hq_parts": "celeba_mask",
}
"""Layouts whose classes are always those of one list."""


def published_classes(spec: Mapping[str, object]) -> Classes | None:
    """The classes that a source's spec names by their list or by its layout; None for others."""
    named = spec.get("classes") or LAYOUT_CLASSES.get(str(spec.get("layout")))
    return CLASS_LISTS.get(str(named))

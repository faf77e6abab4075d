"""Data sets in folders of image files, in the layouts that people have (``layouts.py``).

| labels | kept as | read by |
|---|---|---|
| class indices | one PNG | the label rule |
| segments | one PNG of segment ids, and a list of what they are | ``segments.py`` |
| parts | one PNG per class, black where the class is not | painted over each other, in order |
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Int16, Int32, UInt8

from jointseg_jax.data import captions
from jointseg_jax.data.class_lists import CLASS_LISTS
from jointseg_jax.data.classes import Classes, Colour
from jointseg_jax.data.files import Files, inside, short_sum
from jointseg_jax.data.images import (
    PIXEL_LIMIT,
    Decoding,
    decode_image,
    decode_labels,
    decode_segment_ids,
)
from jointseg_jax.data.labels import LabelRule, named_classes, settled, stated_fields
from jointseg_jax.data.records import BadSample, Record, derive, problem_lines
from jointseg_jax.data.segments import labels_of_segments
from jointseg_jax.data.sources.layouts import LAYOUTS, RULED_BY_FILE, Entry, SplitIndex
from jointseg_jax.types import UserError


@dataclass(frozen=True, kw_only=True)
class Folders:
    """A split of a data set in folders, as a source of records."""

    root: str
    split: str
    layout: str = "folders"
    classes: Classes | str | None = None
    """None for what the layout says (its classes.json, or its known list), a name of
    ``CLASS_LISTS``, or the path of a classes.json."""
    void: tuple[int, ...] | None = None
    """File values without annotation, instead of the layout's."""
    label_map: tuple[tuple[int, int], ...] = ()
    """Pairs (file value, class), instead of the layout's rule; class -1 is void."""
    colour_map: tuple[tuple[Colour, int], ...] = ()
    """Pairs (RGB colour, file value), for labels painted in colours."""
    orientation: str = "refuse"  # of pictures that EXIF says are turned: refuse, apply or ignore
    pixel_limit: int = PIXEL_LIMIT  # most pixels an image may have
    strict: bool = True  # refuse to start while any id has a problem; False: those are bad samples
    decoding: Decoding = field(init=False, repr=False)
    files: Files = field(init=False, repr=False, compare=False)
    rule: LabelRule | None = field(init=False, repr=False)
    entries: tuple[Entry, ...] = field(init=False, repr=False, compare=False)
    problems: tuple[BadSample, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} given; one of: {', '.join(LAYOUTS)}.")
        decoding = Decoding(orientation=self.orientation, pixel_limit=self.pixel_limit)
        derive(self, decoding=decoding, files=Files.of(Path(self.root)))
        listing = list_split(Path(self.root), self.split, self.layout)
        classes = self._classes(listing)
        derive(self, rule=self._rule(listing, classes))
        derive(self, classes=classes)
        derive(self, entries=listing.entries, problems=listing.problems)
        if self.strict:
            refuse([*self.problems, *(e.problem for e in self.entries if e.problem)], self.name)

    @property
    def _known(self) -> Classes:
        return cast(Classes, self.classes)  # a name, path or None only until ``__post_init__``

    def _classes(self, listing: SplitIndex) -> Classes:
        if self.classes is not None:
            return named_classes(self.classes)
        if listing.classes is None:
            raise UserError(
                f"ERROR [data] {Path(self.root) / 'classes.json'}: missing, so the labels have no "
                "names; write it, or set config.data.*.classes to its path or to one of: "
                f"{', '.join(CLASS_LISTS)}."
            )
        return listing.classes

    def _rule(self, listing: SplitIndex, classes: Classes) -> LabelRule | None:
        own: dict[str, Any] = {"void": self.void, "colours": self.colour_map or None}
        own = {key: value for key, value in own.items() if value is not None}
        if self.label_map:
            own |= {"table": self.label_map, "shift": 0}  # a table says everything: no shift
        said = self._said_by_file()
        if listing.rule is None:
            if own or (said.keys() - {"void"}):
                raise ValueError(
                    f"layout={self.layout!r} takes its labels from segments or parts; void, "
                    "label_map and colour_map do not apply. Leave them out."
                )
            return None
        # Where a classes.json rules, the file named instead of it rules alone.
        alone = self._names_a_file and self.layout in RULED_BY_FILE
        base = LabelRule() if alone else listing.rule
        rule = dataclasses.replace(base, **(said | own))
        stated = self.void is not None or ("void" in said and not self.label_map)
        return settled(rule, len(classes), stated=stated)

    def _said_by_file(self) -> dict[str, Any]:
        """What a class file that is named says of label values; nothing where it is none."""
        return stated_fields(Path(str(self.classes))) if self._names_a_file else {}

    @property
    def _names_a_file(self) -> bool:
        return isinstance(self.classes, str) and self.classes not in CLASS_LISTS

    @property
    def name(self) -> str:
        """Names the source by its folder and split."""
        return f"{Path(self.root).name}/{self.split}"

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Record:
        """Reads, decodes and checks one record."""
        entry = self.entries[index]
        # Kept in the listing, not dropped: which ids there are does not depend on what is broken.
        if entry.problem is not None:
            raise entry.problem
        image = read_image(self.files, entry, self.decoding)
        limit = self.pixel_limit
        labels, segments = read_labels(self.files, entry, self.rule, self._known, limit)
        if entry.parts:  # CelebAMask-HQ draws the parts at half the size of its images
            labels = enlarge(labels, image.shape[:2])
        record = Record(id=entry.id, image=image, labels=labels, captions=entry.captions)
        where = str(inside(self.files.root, entry.labels))
        return captions.completed(record, segments, self._known, where)

    def original(self, index: int) -> bytes:
        """Returns the image file of a record as it is on disk."""
        return self.files.read(self.entries[index].image)[1]

    def kinds(self) -> dict[str, int]:
        """Counts the images by the endings of their files."""
        images = (entry.image for entry in self.entries if entry.image)
        return dict(Counter(sorted(os.path.splitext(name)[1] for name in images)))

    def words(self) -> tuple[str, ...]:
        """Lists every word its captions can contain, sorted."""
        words = captions.words_of(text for entry in self.entries for text in entry.captions)
        if any(not entry.captions for entry in self.entries):
            words |= captions.described_words(self._known)
        return tuple(sorted(words))

    def fingerprint(self) -> dict[str, object]:
        """Returns the plain values that must match when a run resumes."""
        # Names and captions, not contents: hashing all pixels would delay every start.
        rows = [
            (e.id, e.image, e.labels, e.captions, e.problem is None, *e.parts) for e in self.entries
        ]
        return {
            "name": "folders",
            "layout": self.layout,
            "split": self.split,
            "count": len(self),
            "classes": list(self._known.names),
            "rules": short_sum(repr((self.rule, self.orientation))),
            "listing": short_sum(json.dumps(rows)),
        }


def list_split(root: Path, split: str, layout: str) -> SplitIndex:
    """Lists a split; refuses a root that is not there and a split without ids."""
    if not root.is_dir():
        raise UserError(f"ERROR [data] {root}: no such folder. Check config.data.*.root.")
    try:
        listing = LAYOUTS[layout](root, split)
    except BadSample as problem:
        raise UserError(str(problem)) from None
    if not listing.entries:
        raise UserError(
            f"ERROR [data] {root}: split {split!r} is empty; at least one image with its labels "
            f"is needed in the layout {layout!r}. Check config.data.*.split and .layout."
        )
    return listing


def refuse(problems: list[BadSample], name: str) -> None:
    """Raises all problems of a listing in one block of text."""
    if problems:
        raise UserError(
            f"{problem_lines(problems)}\nERROR [data] {name}: problems in its listing: "
            f"{len(problems)}. Fix them, or set config.data.*.strict=False to train on the rest."
        )


Labels = Int16[np.ndarray, "height width"]
GREYS = {(value, value, value): value for value in range(256)}
"""The colour map of part files, some of which are stored as RGB."""


def label_files(entry: Entry) -> tuple[str, ...]:
    """Returns the names of the files that hold an entry's labels."""
    return tuple(name for _, name in entry.parts) or (entry.labels,)


def read_image(files: Files, entry: Entry, rules: Decoding) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes the image of an entry."""
    path, data = files.read(entry.image)
    return decode_image(data, str(path), rules)


def read_labels(
    files: Files,
    entry: Entry,
    rule: LabelRule | None,
    classes: Classes,
    pixel_limit: int = PIXEL_LIMIT,
) -> tuple[Labels, Int32[np.ndarray, "height width"] | None]:
    """Decodes the labels of an entry, and its segments if it has them; those need no rule."""
    if entry.parts:
        return paint(files, entry.parts, pixel_limit), None
    path, data = files.read(entry.labels)
    if rule is not None:
        return rule.read(data, str(path), classes, pixel_limit=pixel_limit), None
    assert entry.segments is not None  # a layout without a rule has segments or parts
    ids = decode_segment_ids(data, str(path), pixel_limit=pixel_limit)
    return labels_of_segments(ids, entry.segments, str(path))


def paint(files: Files, parts: Iterable[tuple[int, str]], pixel_limit: int = PIXEL_LIMIT) -> Labels:
    """Paints (class, file) over class 0, in order: what is not black belongs to the class."""
    canvas, first = np.zeros((0, 0), np.int16), ""
    for label, name in parts:  # at least one, or the entry has a problem
        path, data = files.read(name)
        mask = decode_labels(data, str(path), colours=GREYS, pixel_limit=pixel_limit)
        if not first:
            canvas, first = np.zeros(mask.shape, np.int16), name
        size, wanted = tuple(mask.shape), tuple(canvas.shape)
        if size != wanted:
            found = f"a mask of {size[1]}x{size[0]} (width x height)"
            rule = f"{first} is {wanted[1]}x{wanted[0]}, and all parts have one size"
            raise BadSample(str(path), found, rule, "Take both from the same release.")
        canvas[mask > 0] = label  # over earlier parts: hair over ears, hats over hair
    return canvas


def enlarge(labels: Labels, shape: tuple[int, int]) -> Int16[np.ndarray, "tall wide"]:
    """Repeats pixels up to the size ``shape`` if that is a whole multiple, or changes nothing."""
    factor = shape[0] // labels.shape[0]
    # Any other size stays as it is, and ``check_record`` refuses the pair.
    if factor < 2 or shape != tuple(factor * side for side in labels.shape):
        return labels
    return labels.repeat(factor, 0).repeat(factor, 1)

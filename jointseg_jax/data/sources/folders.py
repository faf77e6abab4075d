"""Data sets in folders of image files, in the layouts that people have (``layouts.py``)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int16, Int32, UInt8

from jointseg_jax.data import captions
from jointseg_jax.data.class_lists import CLASS_LISTS
from jointseg_jax.data.classes import Classes, Colour
from jointseg_jax.data.files import Files
from jointseg_jax.data.images import (
    PIXEL_LIMIT,
    Decoding,
    decode_image,
    decode_labels,
    decode_segment_ids,
)
from jointseg_jax.data.labels import LabelRule, read_classes
from jointseg_jax.data.records import BadSample, Record, check_record
from jointseg_jax.data.segments import labels_of_segments
from jointseg_jax.data.sources.layouts import LAYOUTS, Entry, SplitIndex
from jointseg_jax.types import UserError


@dataclass(frozen=True, kw_only=True)
class Folders:
    """A split of a data set in folders, as a source of records.

    Args:
      classes: ``None`` for what the layout says (its classes.json, or its known list), a name of
        ``CLASS_LISTS``, or the path of a classes.json.
      void: file values without annotation, instead of the layout's.
      label_map: pairs (file value, class), instead of the layout's rule; class -1 is void.
      colour_map: pairs (RGB colour, file value), for labels painted in colours.
      orientation: what to do with pictures that EXIF says are turned: refuse, apply or ignore.
      pixel_limit: most pixels an image may have.
      strict: refuses to start while any id has a problem; otherwise such ids are bad samples.
    """

    root: str
    split: str
    layout: str = "folders"
    classes: Classes | str | None = None
    void: tuple[int, ...] | None = None
    label_map: tuple[tuple[int, int], ...] = ()
    colour_map: tuple[tuple[Colour, int], ...] = ()
    orientation: str = "refuse"
    pixel_limit: int = PIXEL_LIMIT
    strict: bool = True
    decoding: Decoding = field(init=False, repr=False)
    files: Files = field(init=False, repr=False, compare=False)
    rule: LabelRule | None = field(init=False, repr=False)
    entries: tuple[Entry, ...] = field(init=False, repr=False, compare=False)
    problems: tuple[BadSample, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} given; one of: {', '.join(LAYOUTS)}.")
        self._set("decoding", Decoding(orientation=self.orientation, pixel_limit=self.pixel_limit))
        self._set("files", Files.of(Path(self.root)))
        listing = list_split(Path(self.root), self.split, self.layout)
        self._set("classes", self._classes(listing))
        self._set("rule", self._rule(listing))
        self._set("entries", listing.entries)
        self._set("problems", listing.problems)
        if self.strict:
            refuse([*self.problems, *(e.problem for e in self.entries if e.problem)], self.name)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _classes(self, listing: SplitIndex) -> Classes:
        if isinstance(self.classes, Classes):
            return self.classes
        if self.classes in CLASS_LISTS:
            return CLASS_LISTS[self.classes]
        if self.classes is not None:
            return read_classes(Path(self.classes))[0]
        if listing.classes is None:
            raise UserError(
                f"ERROR [data] {Path(self.root) / 'classes.json'}: missing, so the labels have no "
                "names; write it, or set config.data.*.classes to its path or to one of: "
                f"{', '.join(CLASS_LISTS)}."
            )
        return listing.classes

    def _rule(self, listing: SplitIndex) -> LabelRule | None:
        given = {"void": self.void, "colours": self.colour_map or None}
        given = {key: value for key, value in given.items() if value is not None}
        if self.label_map:
            given |= {"table": self.label_map, "shift": 0}
        if listing.rule is None and given:
            raise ValueError(
                f"layout={self.layout!r} takes its labels from segments or parts; void, "
                "label_map and colour_map do not apply. Leave them out."
            )
        return listing.rule and dataclasses.replace(listing.rule, **given)

    @property
    def name(self) -> str:
        """Names the source by its folder and split."""
        return f"{Path(self.root).name}/{self.split}"

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Record:
        """Reads, decodes and checks one record."""
        entry = self.entries[index]
        if entry.problem is not None:
            raise entry.problem
        image = read_image(self.files, entry, self.decoding)
        labels, segments = read_labels(
            self.files, entry, self.rule, self.classes, pixel_limit=self.pixel_limit
        )
        if entry.parts:
            labels = enlarge(labels, image.shape[:2])
        record = Record(id=entry.id, image=image, labels=labels, captions=entry.captions)
        if not entry.captions:
            record["captions"] = (captions.describe(labels, self.classes),)
        if segments is not None:
            record["segments"] = segments
        check_record(record, self.classes, str(self.path(entry.labels)))
        return record

    def original(self, index: int) -> bytes:
        """Returns the image file of a record as it is on disk."""
        return self.files.read(self.entries[index].image)[1]

    def path(self, name: str) -> Path:
        """Returns the path of a file of the listing."""
        return self.files.path(name)

    def words(self) -> tuple[str, ...]:
        """Lists every word its captions can contain, sorted."""
        found = captions.words_of(text for entry in self.entries for text in entry.captions)
        if any(not entry.captions for entry in self.entries):
            found |= captions.described_words(self.classes)
        return tuple(sorted(found))

    def fingerprint(self) -> dict[str, object]:
        """Returns the plain values that must match when a run resumes."""
        rows = [
            (e.id, e.image, e.labels, e.captions, e.problem is None, *e.parts) for e in self.entries
        ]
        rules = repr((self.rule, self.orientation))
        return {
            "name": "folders",
            "layout": self.layout,
            "split": self.split,
            "count": len(self),
            "classes": list(self.classes.names),
            "rules": hashlib.sha256(rules.encode()).hexdigest()[:16],
            "listing": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
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
        listed = "\n".join(map(str, problems[:50]))
        more = f"\n... and {len(problems) - 50} more" if len(problems) > 50 else ""
        raise UserError(
            f"{listed}{more}\nERROR [data] {name}: problems in its listing: {len(problems)}. Fix "
            "them, or set config.data.*.strict=False to train on the rest."
        )


Labels = Int16[np.ndarray, "height width"]
GREYS = {(value,) * 3: value for value in range(256)}


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
    *,
    pixel_limit: int = PIXEL_LIMIT,
) -> tuple[Labels, Int32[np.ndarray, "height width"] | None]:
    """Decodes the labels of an entry, and its segments if it has them.

    Args:
      rule: ``None`` for segments and parts, which say themselves what their values mean.
    """
    if entry.parts:
        return paint(files, entry.parts, pixel_limit), None
    path, data = files.read(entry.labels)
    if rule is not None:
        return rule.read(data, str(path), classes, pixel_limit=pixel_limit), None
    ids = decode_segment_ids(data, str(path), pixel_limit=pixel_limit)
    return labels_of_segments(ids, entry.segments, str(path))


def paint(files: Files, parts: Iterable[tuple[int, str]], pixel_limit: int = PIXEL_LIMIT) -> Labels:
    """Paints (class, file) over class 0, in order: what is not black belongs to the class."""
    canvas, first = None, ""
    for label, name in parts:
        path, data = files.read(name)
        mask = decode_labels(data, str(path), colours=GREYS, pixel_limit=pixel_limit)
        if canvas is None:
            canvas, first = np.zeros(mask.shape, np.int16), name
        if mask.shape != canvas.shape:
            raise BadSample(
                str(path),
                f"a mask of {mask.shape[1]}x{mask.shape[0]} (width x height)",
                f"{first} is {canvas.shape[1]}x{canvas.shape[0]}, and all parts have one size",
                "Take both from the same release.",
            )
        canvas[mask > 0] = label
    return canvas


def enlarge(labels: Labels, shape: tuple[int, int]) -> Int16[np.ndarray, "tall wide"]:
    """Repeats pixels up to the size ``shape`` if that is a whole multiple, or changes nothing."""
    factor = shape[0] // labels.shape[0]
    if factor < 2 or shape != tuple(factor * side for side in labels.shape):
        return labels
    return labels.repeat(factor, 0).repeat(factor, 1)

"""From the values in a label file to class indices, and back.

1. A value listed in ``table`` becomes the class beside it; without a table, value ``v`` becomes
   class ``v - shift``.
2. A file value in ``void`` becomes ``VOID``. A class wins over a void value that nobody stated (the
   default 255, or a layout's); a stated one that is also a class's value is refused.
3. Everything else is out of range and refused, with the values as they stand in the file.

The range is checked on the file's own values, before the cast to int16 in which 65535 would be -1.

A ``classes.json`` says this, and the classes, of a data set folder:

| key | meaning |
|---|---|
| classes | names in index order, or ``{"name": ..., "isthing": ..., "colour": [r, g, b]}`` |
| ignore_label | file value, or list of values, of pixels without annotation; 255 when absent, \
unless that is a class's value |
| swaps | pairs of names that a left/right flip exchanges |
| first_label | file value of the first class; 0 when absent |
| label_map | ``{file value: class name or null}``, instead of first_label |
| colours | ``{"r,g,b": file value}``, for labels painted in colours |
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
from jaxtyping import Int16

from jointseg_jax.data import files
from jointseg_jax.data.class_lists import CLASS_LISTS
from jointseg_jax.data.classes import Classes, Colour
from jointseg_jax.data.images import PIXEL_LIMIT, decode_labels, encode_png
from jointseg_jax.data.records import BadSample, counted
from jointseg_jax.types import FILE_VOID, VOID, UserError

KEYS = ("classes", "ignore_label", "swaps", "first_label", "label_map", "colours")

_OUTSIDE = np.int16(-2)  # neither a class nor VOID: the value stands for nothing
_FILE_VOID_16 = 65535


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """The label convention of a data set's files."""

    void: tuple[int, ...] = (FILE_VOID,)  # file values of pixels without annotation
    shift: int = 0  # file value of class 0 (1 where 0 means "other", as in ADE20K)
    table: tuple[tuple[int, int], ...] = ()
    """Pairs (file value, class), instead of ``shift``; class -1 is void."""
    colours: tuple[tuple[Colour, int], ...] = ()
    """Pairs (RGB colour, file value), for labels painted in colours."""

    def __post_init__(self) -> None:
        values = [*self.void, self.shift, *(v for v, _ in self.table)]
        if any(not 0 <= v <= 65535 for v in values):
            raise ValueError(f"LabelRule: file values {values} given; they lie in 0..65535.")
        if self.table and self.shift:
            raise ValueError("LabelRule: shift and table given; a table says everything, drop one.")

    def read(
        self, data: bytes, path: str, classes: Classes, *, pixel_limit: int = PIXEL_LIMIT
    ) -> Int16[np.ndarray, "height width"]:
        """Decodes a label file to class indices; refuses values that stand for nothing."""
        colours = dict(self.colours) or None
        values = decode_labels(data, path, colours=colours, pixel_limit=pixel_limit)
        # One gather per map: the table of all 16-bit values is made once for a rule.
        labels = lookup(self, len(classes)).take(values)
        outside = labels == _OUTSIDE
        if outside.any():
            raise self._out_of_range(values[outside], path, classes)
        return labels

    def _out_of_range(self, values: np.ndarray, path: str, classes: Classes) -> BadSample:
        count, void = len(classes), ", ".join(map(str, self.void)) or "none"
        known = f"{self.shift}-{self.shift + count - 1}"
        if self.table:
            known = f"of the label map, {len(self.table)} in number"
        found = f"labels {counted(values)} out of range"
        rule = f"there are {count} classes (file values {known}) and void {void}"
        remedy = "Fix the mask, or change the class list or the label map of this source."
        return BadSample(path, found, rule, remedy)


def settled(rule: LabelRule, count: int, *, stated: bool) -> LabelRule:
    """Returns the rule without void values that are a class's.

    Args:
      count: number of classes.
      stated: whether the user has said what is void, so that the two contradict each other.

    Raises:
      ValueError: a stated void value is that of a class too.
    """
    shifted = ((rule.shift + c, c) for c in range(count))
    values = {value: label for value, label in rule.table or shifted if label != VOID}
    if not (both := [value for value in rule.void if value in values]):
        return rule
    if stated:
        raise ValueError(
            f"file value {both[0]} is void and also the value of class {values[both[0]]}; a value "
            "means one thing. Take it out of ignore_label (void), or change first_label or the "
            "label map."
        )
    return dataclasses.replace(rule, void=tuple(v for v in rule.void if v not in values))


@functools.cache
def lookup(rule: LabelRule, count: int) -> Int16[np.ndarray, " values"]:
    """Returns the class of every 16-bit file value."""
    rule = settled(rule, count, stated=rule.void != (FILE_VOID,))
    table = np.full(65536, _OUTSIDE, np.int16)
    for value, label in rule.table or ((rule.shift + c, c) for c in range(count)):
        if not VOID <= label < count:
            raise ValueError(f"LabelRule: table maps {value} to {label}; classes: {count}.")
        table[value] = label
    table[list(rule.void)] = VOID
    table.setflags(write=False)
    return table


def encode_labels(labels: Int16[np.ndarray, "height width"], count: int) -> bytes:
    """Encodes class indices as grey PNG: 8 bits with void 255, 16 bits beyond 255 classes."""
    dtype, void = (np.uint8, FILE_VOID) if count <= FILE_VOID else (np.uint16, _FILE_VOID_16)
    return encode_png(np.where(labels == VOID, void, labels).astype(dtype))


def stored_rule(count: int) -> LabelRule:
    """Returns the rule that reads what ``encode_labels`` wrote."""
    return LabelRule(void=(FILE_VOID if count <= FILE_VOID else _FILE_VOID_16,))


class ClassesContent(TypedDict):
    """The ``classes.json`` of labels written by this package."""

    classes: list[dict[str, object]]
    ignore_label: int
    swaps: list[list[str]]


def read_classes(path: Path) -> tuple[Classes, LabelRule]:
    """Reads the classes and the label rule of a folder."""
    try:
        return parse(files.read_json(path))
    except (BadSample, ValueError, KeyError, TypeError) as error:
        detail = error if isinstance(error, BadSample) else f"ERROR [data] {path}: {error}"
        raise UserError(
            f"{detail}\nA classes.json holds "
            '{"classes": ["sky", "road"], "ignore_label": 255}; it may also have '
            f"{', '.join(KEYS[2:])}. Or name a known list in config.data.*.classes."
        ) from None


def named_classes(classes: Classes | str) -> Classes:
    """Returns the classes behind a name of ``CLASS_LISTS``, a path of a classes.json, or itself."""
    if isinstance(classes, Classes):
        return classes
    known = CLASS_LISTS.get(classes)
    return read_classes(Path(classes))[0] if known is None else known


def parse(content: object) -> tuple[Classes, LabelRule]:
    """Returns classes and label rule of the contents of a ``classes.json``."""
    if not isinstance(content, dict) or "classes" not in content:
        raise ValueError("no 'classes' in it")
    if unknown := sorted(set(content) - set(KEYS)):
        raise ValueError(f"unknown keys {', '.join(unknown)}; known: {', '.join(KEYS)}")
    classes = class_list(content["classes"], content.get("swaps", ()))
    ignored = content.get("ignore_label", 255)
    void = ignored if isinstance(ignored, list) else [] if ignored is None else [ignored]
    table = content.get("label_map", {}).items()
    colours = content.get("colours", {}).items()
    rule = LabelRule(
        void=tuple(map(int, void)),
        shift=int(content.get("first_label", 0)),
        table=tuple((int(v), VOID if name is None else classes.index(name)) for v, name in table),
        colours=tuple((_colour(text.split(",")), int(value)) for text, value in colours),
    )
    return classes, settled(rule, len(classes), stated="ignore_label" in content)


def stated_fields(path: Path) -> dict[str, object]:
    """Returns the fields of the label rule that a ``classes.json`` states, by their names."""
    content, rule = cast(dict, files.read_json(path)), read_classes(path)[1]
    fields: dict[str, object] = {}
    if "ignore_label" in content:
        fields["void"] = rule.void
    if {"first_label", "label_map"} & content.keys():
        fields |= {"shift": rule.shift, "table": rule.table}
    if "colours" in content:
        fields["colours"] = rule.colours
    return fields


def class_list(entries: Sequence[object], swaps: Iterable[Sequence[str]] = ()) -> Classes:
    """Returns classes from names, or from entries of name, isthing and colour, and named pairs."""
    full: list[dict] = [e if isinstance(e, dict) else {"name": e} for e in entries]
    names = tuple(str(e["name"]) for e in full)
    coloured = full if all("colour" in e for e in full) else []
    return Classes(
        names=names,
        isthing=tuple(bool(e.get("isthing", False)) for e in full),
        # One class without a colour leaves the whole list to the default palette.
        palette=tuple(_colour(e["colour"]) for e in coloured),
        swaps=tuple((names.index(left), names.index(right)) for left, right in swaps),
    )


def _colour(channels: Iterable[str | int]) -> Colour:
    return cast(Colour, tuple(map(int, channels)))  # ``Classes`` checks that there are three


def to_content(classes: Classes) -> ClassesContent:
    """Returns the ``classes.json`` of labels written by this package (void 255)."""
    entries: list[dict[str, object]] = [
        {"name": name, "isthing": thing, "colour": list(colour)}
        for name, thing, colour in zip(classes.names, classes.isthing, classes.palette)
    ]
    swaps = [[classes.names[a], classes.names[b]] for a, b in classes.swaps]
    return {"classes": entries, "ignore_label": 255, "swaps": swaps}

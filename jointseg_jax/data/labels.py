"""From the values in a label file to class indices, and back.

1. A file value in ``void`` becomes ``VOID``.
2. A value listed in ``table`` becomes the class beside it; without a table, value ``v`` becomes
   class ``v - shift``.
3. Everything else is out of range and refused, with the values as they stand in the file.

The range is checked on the file's own values, before the cast to int16 in which 65535 would be -1.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int16, Int32

from jointseg_jax.data import files
from jointseg_jax.data.classes import Classes, Colour
from jointseg_jax.data.images import PIXEL_LIMIT, decode_labels, encode_png
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import FILE_VOID, VOID, UserError

_OUTSIDE = np.int16(-2)
_FILE_VOID_16 = 65535


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """The label convention of a data set's files.

    Args:
      void: file values of pixels without annotation.
      shift: file value of class 0 (1 where 0 means "other", as in ADE20K).
      table: pairs (file value, class), instead of ``shift``; class -1 is void.
      colours: pairs (RGB colour, file value), for labels painted in colours.
    """

    void: tuple[int, ...] = (FILE_VOID,)
    shift: int = 0
    table: tuple[tuple[int, int], ...] = ()
    colours: tuple[tuple[Colour, int], ...] = ()

    def __post_init__(self) -> None:
        values = [*self.void, self.shift, *(v for v, _ in self.table)]
        if any(not 0 <= v <= 65535 for v in values):
            raise ValueError(f"LabelRule: file values {values} given; they lie in 0..65535.")
        if self.table and self.shift:
            raise ValueError("LabelRule: shift and table given; a table says everything, drop one.")

    def read(
        self, data: bytes, path: str, classes: Classes, *, pixel_limit: int = PIXEL_LIMIT
    ) -> Int16[np.ndarray, "height width"]:
        """Decodes a label file to class indices."""
        colours = dict(self.colours) or None
        values = decode_labels(data, path, colours=colours, pixel_limit=pixel_limit)
        return self.classes_of(values, path, classes)

    def classes_of(
        self, values: Int32[np.ndarray, "height width"], path: str, classes: Classes
    ) -> Int16[np.ndarray, "height width"]:
        """Looks file values up; refuses those that stand for nothing."""
        labels = lookup(self, len(classes)).take(values)
        outside = labels == _OUTSIDE
        if outside.any():
            raise self.out_of_range(values[outside], path, classes)
        return labels

    def out_of_range(self, values: np.ndarray, path: str, classes: Classes) -> BadSample:
        """Returns the complaint that names the values which stand for no class."""
        found, counts = np.unique(values, return_counts=True)
        listed = ", ".join(f"{v} ({n} px)" for v, n in zip(found[:8], counts[:8]))
        more = f" and {len(found) - 8} more values" if len(found) > 8 else ""
        void = ", ".join(map(str, self.void)) or "none"
        return BadSample(
            path,
            f"labels {listed}{more} out of range",
            f"there are {len(classes)} classes (file values {self._range(len(classes))}) "
            f"and void {void}",
            "Mend the mask, or change the class list or the label map of this source.",
        )

    def _range(self, count: int) -> str:
        if self.table:
            return f"of the label map, {len(self.table)} in number"
        return f"{self.shift}-{self.shift + count - 1}"


@functools.cache
def lookup(rule: LabelRule, count: int) -> Int16[np.ndarray, values]:
    """Returns the class of every 16-bit file value."""
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


KEYS = ("classes", "ignore_label", "swaps", "first_label", "label_map", "colours")


def read_classes(path: Path) -> tuple[Classes, LabelRule]:
    """Reads the classes and the label rule of a folder."""
    try:
        content = files.read_json(path)
        return parse(content)
    except (BadSample, ValueError, KeyError, TypeError) as error:
        detail = error if isinstance(error, BadSample) else f"ERROR [data] {path}: {error}"
        raise UserError(
            f"{detail}\nA classes.json holds "
            '{"classes": ["sky", "road"], "ignore_label": 255}; it may also have '
            f"{', '.join(KEYS[2:])}. Or name a known list in config.data.*.classes."
        ) from None


def parse(content: object) -> tuple[Classes, LabelRule]:
    """Returns classes and label rule of the contents of a ``classes.json``."""
    if not isinstance(content, dict) or "classes" not in content:
        raise ValueError("no 'classes' in it")
    unknown = sorted(set(content) - set(KEYS))
    if unknown:
        raise ValueError(f"unknown keys {', '.join(unknown)}; known: {', '.join(KEYS)}")
    classes = class_list(content["classes"], content.get("swaps", ()))
    return classes, label_rule(content, classes)


def class_list(entries: list[Any], swaps: Any = ()) -> Classes:
    """Returns classes from names, or from name-isthing-colour entries."""
    full = [e if isinstance(e, dict) else {"name": e} for e in entries]
    names = tuple(str(e["name"]) for e in full)
    things = tuple(bool(e.get("isthing", False)) for e in full)
    coloured = all("colour" in e for e in full)
    palette = tuple(tuple(int(c) for c in e["colour"]) for e in full) if coloured else ()
    pairs = tuple((names.index(left), names.index(right)) for left, right in swaps)
    return Classes(names=names, isthing=things, palette=palette, swaps=pairs)


def label_rule(content: Mapping[str, Any], classes: Classes) -> LabelRule:
    """Returns the label rule that a ``classes.json`` states."""
    ignored = content.get("ignore_label", 255)
    listed = ignored if isinstance(ignored, list) else [] if ignored is None else [ignored]
    table = tuple(
        (int(value), VOID if name is None else classes.index(name))
        for value, name in content.get("label_map", {}).items()
    )
    colours = tuple(
        (tuple(int(c) for c in colour.split(",")), int(value))
        for colour, value in content.get("colours", {}).items()
    )
    shift = int(content.get("first_label", 0))
    return LabelRule(void=tuple(map(int, listed)), shift=shift, table=table, colours=colours)


def to_content(classes: Classes) -> dict[str, Any]:
    """Returns the ``classes.json`` of labels written by this package (void 255)."""
    entries = [
        {"name": name, "isthing": thing, "colour": list(colour)}
        for name, thing, colour in zip(classes.names, classes.isthing, classes.palette)
    ]
    swaps = [[classes.names[a], classes.names[b]] for a, b in classes.swaps]
    return {"classes": entries, "ignore_label": 255, "swaps": swaps}

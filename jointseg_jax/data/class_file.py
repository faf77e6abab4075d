"""``classes.json``: the classes of a data set folder, as people write them.

| key | meaning |
|---|---|
| classes | names in index order, or ``{"name": ..., "isthing": ..., "colour": [r, g, b]}`` |
| ignore_label | file value, or list of values, of pixels without annotation; 255 when absent |
| swaps | pairs of names that a left/right flip exchanges |
| first_label | file value of the first class; 0 when absent |
| label_map | ``{file value: class name or null}``, instead of first_label |
| colours | ``{"r,g,b": file value}``, for labels painted in colours |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jointseg_jax.data import files
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.labels import LabelRule
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import VOID, UserError

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

"""From the files of an entry to pixels: its image, and its labels in whichever way they are kept.

| labels | kept as | read by |
|---|---|---|
| class indices | one PNG | the label rule |
| segments | one PNG of segment ids, and a list of what they are | ``segments.py`` |
| parts | one PNG per class, black where the class is not | painted over each other, in order |
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int16, Int32, UInt8

from jointseg_jax.data.classes import Classes
from jointseg_jax.data.images import (
    PIXEL_LIMIT,
    Decoding,
    decode_image,
    decode_labels,
    decode_segment_ids,
)
from jointseg_jax.data.labels import LabelRule
from jointseg_jax.data.records import BadSample
from jointseg_jax.data.segments import labels_of_segments
from jointseg_jax.data.sources.listing import Entry
from jointseg_jax.data.store import Store

Labels = Int16[np.ndarray, "height width"]
GREYS = {(value,) * 3: value for value in range(256)}


def label_files(entry: Entry) -> tuple[str, ...]:
    """Returns the names of the files that hold an entry's labels."""
    return tuple(name for _, name in entry.parts) or (entry.labels,)


def read_image(store: Store, entry: Entry, rules: Decoding) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes the image of an entry."""
    path, data = store.read(entry.image)
    return decode_image(data, str(path), rules)


def read_labels(
    store: Store,
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
        return paint(store, entry.parts, pixel_limit), None
    path, data = store.read(entry.labels)
    if rule is not None:
        return rule.read(data, str(path), classes, pixel_limit=pixel_limit), None
    ids = decode_segment_ids(data, str(path), pixel_limit=pixel_limit)
    return labels_of_segments(ids, entry.segments, str(path))


def paint(store: Store, parts: Iterable[tuple[int, str]], pixel_limit: int = PIXEL_LIMIT) -> Labels:
    """Paints (class, file) over class 0, in order: what is not black belongs to the class."""
    canvas, first = None, ""
    for label, name in parts:
        path, data = store.read(name)
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

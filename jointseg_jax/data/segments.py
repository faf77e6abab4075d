"""Panoptic annotations: a picture of segment ids, and a list that says what each segment is.

A list has one row (segment id, class, is crowd, area in pixels or -1 when unknown) per segment.
Id 0 is void. A crowd keeps its class and loses its id, for it is not one instance.

Written, a segment's id is ``65536 (class + 1) + number``: in a PNG of R + 256 G + 65536 B, red and
green are the number, blue the class. A thing without a number is written as a crowd.

The batch field ``panoptic`` holds (label, instance number) per pixel. Instances are numbered 1 .. n
anew in every crop, in the raster order of their first pixels, so that a number means a place and
does not depend on the ids of the file. Stuff and VOID have number 0. Where a crop has more
instances than there are numbers, the largest keep theirs (of equals the first), the others get 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int16, Int32, Integer

from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import BadSample, Record
from jointseg_jax.types import VOID, UserError

Map = Integer[np.ndarray, "height width"]


class Parts(NamedTuple):
    """The (label, segment) pairs of a map in ascending order, and which of them a pixel has.

    ``codes``, of the map's shape, counts them from 0; ``first`` is a pair's first pixel, in raster
    order.
    """

    codes: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    areas: np.ndarray
    first: np.ndarray


def parts(labels: Integer[np.ndarray, "*shape"], segments: Integer[np.ndarray, "*shape"]) -> Parts:
    """Lists the pairs of a label and a segment (0 .. 2^32 - 1) that occur."""
    keys = ((labels.astype(np.int64) << 32) | (segments.astype(np.int64) & 0xFFFFFFFF)).ravel()
    starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1))  # of runs: there are few to sort
    lengths = np.diff(starts, append=keys.size)
    found, first, code = np.unique(keys[starts], return_index=True, return_inverse=True)
    areas = np.bincount(code, lengths).astype(np.int64)
    codes = np.repeat(code, lengths).reshape(labels.shape)
    return Parts(codes, found >> 32, found & 0xFFFFFFFF, areas, starts[first])


def countable(labels: np.ndarray, isthing: Sequence[bool]) -> Bool[np.ndarray, "*shape"]:
    """Marks the labels whose class is a thing; VOID is none."""
    return np.append(np.asarray(isthing, bool), False)[labels]  # VOID = -1 takes the last


def numbered(
    labels: Map, segments: Map, isthing: Sequence[bool], most: int
) -> Int32[np.ndarray, "height width"]:
    """Numbers the instances 1, 2, ... in raster order; at most ``most`` of them, the largest."""
    found = parts(labels, segments)
    chosen = np.flatnonzero(countable(found.labels, isthing) & (found.segments > 0))
    by_area = np.lexsort((found.first[chosen], -found.areas[chosen]))
    chosen = chosen[np.sort(by_area[:most])]
    chosen = chosen[np.argsort(found.first[chosen])]
    numbers = np.zeros(len(found.areas), np.int32)
    numbers[chosen] = np.arange(1, len(chosen) + 1)
    return numbers[found.codes]


def panoptic(record: Record, classes: Classes, most: int) -> Int16[np.ndarray, "height width 2"]:
    """The labels of a record and the numbers of its instances.

    Raises:
      UserError: the record has no segments.
    """
    if record.get("segments") is None:
        raise UserError(
            f"ERROR [data] {record['id']}: has no segments, and config.data.panoptic asks for the "
            "number of every instance; sources that have them: scenes, folders in the layout "
            "coco_panoptic, tfds with panoptic labels. Use one, or set config.data.panoptic=False."
        )
    numbers = numbered(record["labels"], record["segments"], classes.isthing, most)
    return np.stack([record["labels"], numbers], axis=-1).astype(np.int16)


def listed(
    labels: Map, segments: Map, classes: Classes
) -> tuple[Int32[np.ndarray, "height width"], list[dict[str, Any]]]:
    """Returns the segment id of every pixel (0: VOID) and the rows of a COCO ``segments_info``."""
    found = parts(labels, segments)
    if max(found.labels.max(initial=0), 0) > 254 or found.segments.max(initial=0) >= 1 << 16:
        raise ValueError(
            f"segments: labels up to {found.labels.max()} and instance numbers up to "
            f"{found.segments.max()} given; 24 bits hold classes 0..254 and numbers 0..65535. "
            "Raise --min_instance."
        )
    ids = np.where(found.labels == VOID, 0, (found.labels + 1) << 16 | found.segments)
    top, left, bottom, right = _boxes(found)
    rows = []
    for i in np.flatnonzero(ids):
        category = int(found.labels[i])
        isthing = classes.isthing[category]
        box = (left[i], top[i], right[i] - left[i] + 1, bottom[i] - top[i] + 1)
        row = {"id": int(ids[i]), "category_id": category, "isthing": int(isthing)}
        row |= {"iscrowd": int(isthing and found.segments[i] == 0)}
        rows.append(row | {"area": int(found.areas[i]), "bbox": [int(n) for n in box]})
    return ids[found.codes].astype(np.int32), rows


def _boxes(found: Parts) -> tuple[np.ndarray, ...]:
    """First row, first column, last row and last column of every pair."""
    ends = []
    for extreme, start in ((np.minimum, max(found.codes.shape)), (np.maximum, -1)):
        for places in np.indices(found.codes.shape):
            end = np.full(len(found.areas), start)
            extreme.at(end, found.codes, places)
            ends.append(end)
    return tuple(ends)


def labels_of_segments(
    ids: Int32[np.ndarray, "height width"], segments: Int32[np.ndarray, "segments 4"], path: str
) -> tuple[Int16[np.ndarray, "height width"], Int32[np.ndarray, "height width"]]:
    """Returns class and segment id per pixel; refuses a PNG and a JSON that disagree."""
    found, inverse, areas = np.unique(ids, return_inverse=True, return_counts=True)
    rows = {int(row[0]): row for row in segments}
    problems = [*_unlisted(found, areas, rows), *_disagreeing(found, areas, rows)]
    if problems:
        raise BadSample(
            path,
            "; ".join(problems[:5]) + (f" and {len(problems) - 5} more" if problems[5:] else ""),
            "the PNG and the segments_info of the JSON agree",
            "Take both from the same release.",
        )
    kinds = np.array([VOID if i == 0 else rows[int(i)][1] for i in found], np.int16)
    kept = np.array([i if i and not rows[int(i)][2] else 0 for i in found], np.int32)
    return kinds[inverse].reshape(ids.shape), kept[inverse].reshape(ids.shape)


def _unlisted(found: np.ndarray, areas: np.ndarray, rows: dict[int, np.ndarray]) -> list[str]:
    pairs = zip(found.tolist(), areas.tolist())
    return [f"segment {i} ({n} px) is not in the JSON" for i, n in pairs if i and i not in rows]


def _disagreeing(found: np.ndarray, areas: np.ndarray, rows: dict[int, np.ndarray]) -> list[str]:
    area = dict(zip(found.tolist(), areas.tolist()))
    problems = []
    for key, row in rows.items():
        if key not in area:
            problems.append(f"segment {key} of the JSON has no pixels")
        elif row[3] >= 0 and row[3] != area[key]:
            problems.append(f"segment {key} has {area[key]} px, the JSON says {row[3]}")
    return problems

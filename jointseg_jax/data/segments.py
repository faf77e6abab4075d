"""Panoptic annotations: a picture of segment ids, and a list that says what each segment is.

A list has one row (segment id, class, is crowd, area in pixels or -1 when unknown) per segment.
Id 0 is void. A crowd keeps its class and loses its id, for it is not one instance.

Written, a segment's id is ``65536 (class + 1) + number``: in a PNG of R + 256 G + 65536 B, red and
green are the number, blue the class. A thing without a number is written as a crowd.

The batch field ``panoptic`` holds (label, instance number) per pixel. Instances are numbered 1 .. n
in every crop again, in the raster order of their first pixels, so that a number means a place and
does not depend on the ids of the file. Stuff and VOID have number 0. Where a crop has more
instances than there are numbers, the largest keep theirs (of equals the first), the others get 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int16, Int32, Integer

from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import BadSample, Record
from jointseg_jax.types import VOID, UserError

Map = Integer[np.ndarray, "height width"]


class Parts(NamedTuple):
    """The (label, segment) pairs of a map in ascending order, and which of them a pixel has."""

    codes: np.ndarray  # of the map's shape: the pair of every pixel, counted from 0
    labels: np.ndarray  # [pairs]
    segments: np.ndarray  # [pairs]
    areas: np.ndarray  # [pairs], in pixels
    first: np.ndarray  # [pairs]: the first pixel in raster order, counted from 0


def parts(labels: Integer[np.ndarray, "*shape"], segments: Integer[np.ndarray, "*shape"]) -> Parts:
    """Lists the pairs of a label and a segment (0 .. 2^32 - 1) that occur."""
    # label in the high half, segment in the low one: sorted by label, then by segment
    keys = ((labels.astype(np.int64) << 32) | (segments.astype(np.int64) & 0xFFFFFFFF)).ravel()
    # Runs of equal pairs are sorted instead of pixels: there are few.
    starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1))
    lengths = np.diff(starts, append=keys.size)
    pairs, first, code = np.unique(keys[starts], return_index=True, return_inverse=True)
    areas = np.bincount(code, lengths).astype(np.int64)
    codes = np.repeat(code, lengths).reshape(labels.shape)
    return Parts(codes, pairs >> 32, pairs & 0xFFFFFFFF, areas, starts[first])


def countable(labels: np.ndarray, isthing: Sequence[bool]) -> Bool[np.ndarray, "*shape"]:
    """Marks the labels whose class is a thing; VOID is none."""
    return np.append(np.asarray(isthing, bool), False)[labels]  # VOID = -1 takes the last


def numbered(
    labels: Map, segments: Map, isthing: Sequence[bool], most: int
) -> Int32[np.ndarray, "height width"]:
    """Numbers the instances 1, 2, ... in raster order; at most ``most`` of them, the largest."""
    table = parts(labels, segments)
    # the ``most`` largest, of equals the first; then in the raster order of their first pixels
    chosen = np.flatnonzero(countable(table.labels, isthing) & (table.segments > 0))
    by_area = np.lexsort((table.first[chosen], -table.areas[chosen]))
    chosen = chosen[np.sort(by_area[:most])]
    chosen = chosen[np.argsort(table.first[chosen])]
    numbers = np.zeros(len(table.areas), np.int32)
    numbers[chosen] = np.arange(1, len(chosen) + 1)
    return numbers[table.codes]


def panoptic(record: Record, classes: Classes, most: int) -> Int16[np.ndarray, "height width 2"]:
    """Returns the labels of a record and the numbers of its instances, if it has segments."""
    segments = record.get("segments")
    if segments is None:
        raise UserError(
            f"ERROR [data] {record['id']}: has no segments, and config.data.panoptic asks for the "
            "number of every instance; sources that have them: scenes, folders in the layout "
            "coco_panoptic, tfds with panoptic labels. Use one, or set config.data.panoptic=False."
        )
    numbers = numbered(record["labels"], segments, classes.isthing, most)
    return np.stack([record["labels"], numbers], axis=-1).astype(np.int16)


def listed(
    labels: Map, segments: Map, classes: Classes
) -> tuple[Int32[np.ndarray, "height width"], list[dict[str, object]]]:
    """Returns the segment id of every pixel (0: VOID) and the rows of a COCO ``segments_info``."""
    table = parts(labels, segments)
    if max(table.labels.max(initial=0), 0) > 254 or table.segments.max(initial=0) >= 1 << 16:
        raise ValueError(
            f"segments: labels up to {table.labels.max()} and instance numbers up to "
            f"{table.segments.max()} given; 24 bits hold classes 0..254 and numbers 0..65535. "
            "Raise --min_instance."
        )
    # id = 65536 (class + 1) + number, and 0 where nothing is annotated
    ids = np.where(table.labels == VOID, 0, (table.labels + 1) << 16 | table.segments)
    isthing = countable(table.labels, classes.isthing)
    columns = {"id": ids, "category_id": table.labels, "isthing": isthing}
    # A thing without a number cannot be told from its neighbours: COCO calls that a crowd.
    columns |= {"iscrowd": isthing & (table.segments == 0), "area": table.areas}
    boxes = _boxes(table).tolist()
    rows: list[dict[str, object]] = [
        {**{name: int(column[i]) for name, column in columns.items()}, "bbox": boxes[i]}
        for i in np.flatnonzero(ids)
    ]
    return ids[table.codes].astype(np.int32), rows


def _boxes(table: Parts) -> Integer[np.ndarray, "pairs 4"]:
    """Returns left, top, width and height of every pair."""
    low = np.full((2, len(table.areas)), max(table.codes.shape))
    high = np.full_like(low, -1)
    for axis, place in enumerate(np.indices(table.codes.shape)[::-1]):  # columns, then rows
        np.minimum.at(low[axis], table.codes, place)
        np.maximum.at(high[axis], table.codes, place)
    return np.concatenate([low, high - low + 1]).T


def labels_of_segments(
    ids: Int32[np.ndarray, "height width"], segments: Int32[np.ndarray, "segments 4"], path: str
) -> tuple[Int16[np.ndarray, "height width"], Int32[np.ndarray, "height width"]]:
    """Returns class and segment id per pixel; refuses a PNG and a JSON that disagree."""
    present, inverse, areas = np.unique(ids, return_inverse=True, return_counts=True)
    rows = {int(row[0]): row for row in segments}
    if problems := _disagreeing(dict(zip(present.tolist(), areas.tolist())), rows):
        more = f" and {len(problems) - 5} more" if problems[5:] else ""
        rule = "the PNG and the segments_info of the JSON agree"
        found = "; ".join(problems[:5]) + more
        raise BadSample(path, found, rule, "Take both from the same release.")
    # Id 0 is void; a crowd keeps its class and loses its id, for it is not one instance.
    kinds = np.array([VOID if i == 0 else rows[int(i)][1] for i in present], np.int16)
    kept = np.array([i if i and not rows[int(i)][2] else 0 for i in present], np.int32)
    return kinds[inverse].reshape(ids.shape), kept[inverse].reshape(ids.shape)


def _disagreeing(area: dict[int, int], rows: dict[int, np.ndarray]) -> list[str]:
    """Returns what is wrong between the areas of a PNG's ids and the rows of its JSON."""
    unlisted = {i: n for i, n in area.items() if i and i not in rows}
    problems = [f"segment {i} ({n} px) is not in the JSON" for i, n in unlisted.items()]
    for key, row in rows.items():
        if key not in area:
            problems.append(f"segment {key} of the JSON has no pixels")
        elif row[3] >= 0 and row[3] != area[key]:
            problems.append(f"segment {key} has {area[key]} px, the JSON says {row[3]}")
    return problems

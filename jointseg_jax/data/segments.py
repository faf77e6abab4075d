"""Panoptic annotations: a picture of segment ids, and a list that says what each segment is.

A list has one row (segment id, class, is crowd, area in pixels or -1 when unknown) per segment.
Id 0 is void. A crowd keeps its class and loses its id, for it is not one instance.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int16, Int32

from jointseg_jax.data.records import BadSample
from jointseg_jax.types import VOID


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

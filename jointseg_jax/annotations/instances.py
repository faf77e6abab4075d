"""Panoptic maps on the host: every thing pixel in one instance, every instance of one category.

``clean`` makes such a map of what a codec read, in this order:

1. Stuff and VOID pixels lose their instance.
2. Vote: the pixels of an instance that touch each other by edges all take the category that most of
   them have (of equals the smallest). Each connected part votes for itself; parts of one number and
   of different categories are different instances afterwards.
3. Thing pixels without an instance: a connected region of one category joins the instance of this
   category that it shares most edges with (of equals the smallest number), or is a new instance.
4. Connected parts of fewer than ``min_size`` pixels take category and instance of the commonest
   pixel around them, be it thing, stuff or VOID (``masks.absorb``, mode ``fast``). So an instance
   of several parts keeps the large ones, and goes where it has none. Stuff and VOID regions of any
   size stay. Where the whole map is made of parts too small it becomes VOID.
5. Instances are numbered 1 .. n in the raster order of their first pixels.

Hence cleaning twice changes nothing more, and a map is left alone that has no thing pixel without
an instance, no part under ``min_size`` and its instances numbered so.

Source: PDM, section 3.1 (thing and stuff categories); panoptic post-processing as is usual since
Kirillov et al. (1801.00868).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Integer

from jointseg_jax.annotations import masks
from jointseg_jax.data.segments import countable, numbered, parts
from jointseg_jax.types import VOID

Map = Integer[np.ndarray, "height width"]


def clean(
    labels: Map, segments: Map, isthing: Sequence[bool], *, min_size: int
) -> tuple[Map, Int32[np.ndarray, "height width"]]:
    """Returns the map and its instances (0: none), every thing pixel in one whole instance.

    Args:
      min_size: pixels that a connected part of an instance has at least.
    """
    _check(labels, segments, isthing, min_size)
    # 1. stuff and VOID have no instance
    kept = np.where(countable(labels, isthing), segments, 0).astype(np.int64)
    if labels.size == 0:
        return labels.copy(), kept.astype(np.int32)
    voted = _voted(labels.astype(np.int64), kept)  # 2. one category for each connected part
    kept = _completed(voted, kept, isthing)  # 3. thing pixels without an instance get one
    voted, kept = _absorbed(voted, kept, isthing, min_size)  # 4. small parts go
    # 5. numbers 1 .. n in raster order
    return voted.astype(labels.dtype), numbered(voted, kept, isthing, most=labels.size)


def _voted(labels: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Gives every connected part of an instance its commonest label."""
    # Each part for itself: two things that were read as one number are commoner than a thing in two
    # parts one of which was misread, and a vote over the number would repaint the smaller whole.
    part, areas = masks.connected(segments)
    inside = segments > 0
    votes = parts(part[inside], labels[inside])
    winner = np.zeros(len(areas), np.int64)
    chosen, label = masks.heaviest(votes.labels, votes.segments, votes.areas)
    winner[chosen] = label
    return np.where(inside, winner[part], labels)


def _completed(labels: np.ndarray, segments: np.ndarray, isthing: Sequence[bool]) -> np.ndarray:
    """Gives every region of thing pixels without an instance one beside it, or a new one."""
    loose = countable(labels, isthing) & (segments == 0)
    if not loose.any():
        return segments
    # Regions of one label and one instance; the loose ones have instance 0.
    region, areas = masks.connected(parts(labels, segments).codes)
    touching, instance = [], []
    for here, there in _neighbours():
        joins = loose[here] & (segments[there] > 0) & (labels[here] == labels[there])
        touching.append(region[here][joins])
        instance.append(segments[there][joins])
    edges = parts(np.concatenate(touching), np.concatenate(instance))
    # A region without an instance beside it becomes a new one, of a number nobody has.
    numbers = segments.max() + 1 + np.arange(len(areas))
    chosen, number = masks.heaviest(edges.labels, edges.segments, edges.areas)
    numbers[chosen] = number
    return np.where(loose, numbers[region], segments)


def _absorbed(
    labels: np.ndarray, segments: np.ndarray, isthing: Sequence[bool], min_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merges small parts of instances into what surrounds them."""
    table, things = parts(labels, segments), countable(labels, isthing)
    # Nothing to absorb into: ``absorb`` would return such a map unchanged.
    if things.all() and masks.connected(table.codes)[1].max() < min_size:
        return np.full_like(labels, VOID), np.zeros_like(segments)
    codes = masks.absorb(table.codes, min_size, mode="fast", only=things)
    return table.labels[codes], table.segments[codes]


def _neighbours() -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Returns pairs of windows of a map: what lies on each other in them shares an edge."""
    whole, head, tail = slice(None), slice(None, -1), slice(1, None)
    left, right, upper, lower = (whole, head), (whole, tail), (head, whole), (tail, whole)
    return [(left, right), (right, left), (upper, lower), (lower, upper)]


def _check(
    labels: np.ndarray, segments: np.ndarray, isthing: Sequence[bool], min_size: int
) -> None:
    if labels.shape != segments.shape:
        raise ValueError(
            f"instances.clean: labels {labels.shape} and segments {segments.shape} given; their "
            "shapes must be equal."
        )
    unknown = (labels < VOID) | (labels >= len(isthing))
    if unknown.any() or (segments < 0).any():
        raise ValueError(
            f"instances.clean: labels {np.unique(labels[unknown])[:8].tolist()} and segments from "
            f"{segments.min()} given; labels are 0..{len(isthing) - 1} or {VOID}, segments 0 or "
            "more. Check the class list."
        )
    if min_size < 0:
        raise ValueError(f"instances.clean: min_size={min_size} given; pixels, 0 or more.")

"""Integer label maps on the host: small regions absorbed, boundaries marked.

A region is a 4-connected set of pixels of one label; its ring is every pixel outside it that it
touches by an edge or a corner. ``absorb`` gives each region of fewer than ``tau`` pixels a label of
its ring.

``mode="sequential"``, bit for bit what the original does:

1. labels that occur, ascending, each in turn; 0 is skipped, so islands of label 0 always stay
2. regions of that label in the map *as it is now*, in raster order of their first pixel
3. ``map[region] = mode(map[ring])``, the smallest of equally frequent labels, written at once

So a later label sees what earlier ones became, a region whose ring is mostly its own label (across
corners) stays, and what was merged across a corner may be too small again and stay. A map that is
one small region has no ring: the original stops with an error, here it comes back unchanged.

``mode="fast"``, all regions at once (Jacobi):

1. regions of the map as it came, label 0 like any other: background islands are filled too
2. every small region that shares an edge with a settled one (at first: those of ``tau`` pixels or
   more) takes the commonest label among its ring's settled pixels, of the labels it shares an edge
   with; among equals that of the largest region it touches, then the smallest label
3. these are settled; again from 2 until nothing changes

So the order of labels and pixels does not matter (flipping the map flips the result), and no region
under ``tau`` is left, unless the map has no larger one to begin with: it comes back unchanged.

VOID (255 in uint8 maps, -1 in others) is a label like any other, and comes last in the order of
labels as 255 does in a file: it can be absorbed, and can absorb. ``keep_void=True`` leaves VOID
pixels as they are and never makes new ones.

Source: JoDiffusion, section 3.3 (mask optimisation) and its released ``optimize_mask``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from jointseg_jax.types import FILE_VOID, VOID

LabelMap = Integer[np.ndarray, "height width"]

NONE = -1
"""Rank that no pixel has."""

EDGES = ((-1, 0), (0, -1), (0, 1), (1, 0))
CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))


def absorb(
    labels: LabelMap,
    tau: int,
    *,
    mode: Literal["sequential", "fast"] = "sequential",
    keep_void: bool = False,
    only: Bool[np.ndarray, "height width"] | None = None,
) -> LabelMap:
    """Returns the map with every region of fewer than ``tau`` pixels merged into its surroundings.

    Sequential mode is compiled where numba is installed (extra ``fast``); the result is the same.

    Args:
      only: whole regions that may change; the others stay, whatever their size (fast mode).
    """
    _check(labels, tau, mode, only)
    if labels.size == 0 or tau <= 1:
        return labels.copy()
    ranked = _ranked(labels)
    frozen = ranked.void if keep_void else NONE
    if mode == "fast":
        jacobi(ranked, tau, frozen, only)
    else:
        sequential(ranked, tau, frozen)
    return ranked.values[ranked.ranks].astype(labels.dtype)


def boundary(
    labels: Integer[np.ndarray, "*batch height width"], width: int = 1
) -> Bool[np.ndarray, "*batch height width"]:
    """Marks the pixels with another label at most ``width`` pixels away (corners count as 1)."""
    if width < 1:
        raise ValueError(f"masks.boundary: width={width} given; it must be 1 or more.")
    reach = (1,) * (labels.ndim - 2) + (2 * width + 1,) * 2
    highest = ndimage.maximum_filter(labels, size=reach, mode="nearest")
    return highest != ndimage.minimum_filter(labels, size=reach, mode="nearest")


class Ranked(NamedTuple):
    """A map with its labels numbered in their order; ``values[ranks]`` is the map again."""

    ranks: np.ndarray  # int32 [height, width], 0 and up
    values: np.ndarray  # [ranks], the label of each
    background: int  # the rank of label 0, or NONE
    void: int  # the rank of VOID, or NONE


def sequential(
    ranked: Ranked, tau: int, frozen: int, sweep: Callable[..., None] | None = None
) -> None:
    """Absorbs in place, one label and one region after the other.

    Args:
      frozen: a rank that neither changes nor spreads, or ``NONE``.
      sweep: ``sweep_pixels`` (compiled) or ``sweep_crops``; the faster one that is there if None.
    """
    sweep = sweep or compiled() or sweep_crops
    sweep(ranked.ranks, len(ranked.values), tau, ranked.background, frozen)


def sweep_crops(ranks: np.ndarray, count: int, tau: int, background: int, frozen: int) -> None:
    """The sequential sweep in numpy: one labelling per label, then each small region's box."""
    for rank in range(count):
        mask = ranks == rank
        if rank in (background, frozen) or not mask.any():
            continue
        (window,) = ndimage.find_objects(mask.view(np.uint8))
        regions = np.empty(mask[window].shape, np.int32)
        ndimage.label(mask[window], output=regions)
        boxes = ndimage.find_objects(regions)
        for number in np.flatnonzero(np.bincount(regions.ravel())[1:] < tau) + 1:
            # A margin of one pixel holds the ring.
            around, inside = _with_margin(boxes[number - 1], window, ranks.shape)
            part = np.zeros([s.stop - s.start for s in around], bool)
            part[inside] = regions[boxes[number - 1]] == number
            crop = ranks[around]
            votes = np.bincount(crop[_ring(part)], minlength=count)
            if frozen != NONE:
                votes[frozen] = 0
            if votes.any():  # written at once: later labels see it; of equals the smallest wins
                crop[part] = votes.argmax()


def sweep_pixels(ranks: np.ndarray, count: int, tau: int, background: int, frozen: int) -> None:
    """The sequential sweep pixel by pixel, to be compiled (``compiled``)."""
    height, width = ranks.shape
    region_of = np.zeros((height, width), np.int32)  # number of the region a pixel was last in
    ring_of = np.zeros((height, width), np.int32)  # number of the region it was last in the ring of
    queue = np.empty((height * width, 2), np.int32)
    votes = np.zeros(count, np.int64)
    first = np.full((count, height), width, np.int32)  # where a row can hold a label
    last = np.full((count, height), -1, np.int32)
    for y in range(height):
        for x in range(width):
            rank = ranks[y, x]
            first[rank, y] = min(first[rank, y], x)
            last[rank, y] = x
    number = 0
    for rank in range(count):
        if rank in (background, frozen):
            continue
        # Numbers up to ``old`` are of earlier labels: their pixels may have become this label.
        old = number
        for row in range(height):
            for column in range(first[rank, row], last[rank, row] + 1):
                if ranks[row, column] != rank or region_of[row, column] > old:
                    continue
                number += 1
                region_of[row, column] = number
                queue[0, 0], queue[0, 1] = row, column
                # breadth first over the region, by edges
                size, at = 1, 0
                while at < size:
                    for dy, dx in ((-1, 0), (0, -1), (0, 1), (1, 0)):
                        y, x = queue[at, 0] + dy, queue[at, 1] + dx
                        if y < 0 or x < 0 or y >= height or x >= width:
                            continue
                        if ranks[y, x] == rank and region_of[y, x] != number:
                            region_of[y, x] = number
                            queue[size, 0], queue[size, 1] = y, x
                            size += 1
                    at += 1
                if size >= tau:
                    continue
                # the ring: every pixel around the region counts once, corners too
                votes[:] = 0
                for at in range(size):
                    for y in range(max(queue[at, 0] - 1, 0), min(queue[at, 0] + 2, height)):
                        for x in range(max(queue[at, 1] - 1, 0), min(queue[at, 1] + 2, width)):
                            if region_of[y, x] == number or ring_of[y, x] == number:
                                continue
                            ring_of[y, x] = number
                            if ranks[y, x] != frozen:
                                votes[ranks[y, x]] += 1
                winner = np.argmax(votes)  # the first of equals: the smallest label
                if votes[winner] == 0:
                    continue
                # merged at once; the winner's rows now reach to here as well
                for at in range(size):
                    y, x = queue[at, 0], queue[at, 1]
                    ranks[y, x] = winner
                    first[winner, y] = min(first[winner, y], x)
                    last[winner, y] = max(last[winner, y], x)


@functools.cache
def compiled() -> Callable[..., None] | None:
    """Returns ``sweep_pixels`` as machine code, kept on disk; None where numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    return numba.njit(cache=True)(inspect.unwrap(sweep_pixels))


def jacobi(ranked: Ranked, tau: int, frozen: int, only: np.ndarray | None = None) -> None:
    """Absorbs in place, all small regions that touch a settled one at once, until none is left."""
    # Regions are found once: from here on a map is a label per region and a list of touches.
    ranks, count = ranked.ranks, len(ranked.values)
    regions, areas = connected(ranks)
    rank_of = np.zeros(len(areas), ranks.dtype)
    rank_of[regions.ravel()] = ranks.ravel()
    settled = (areas >= tau) | (rank_of == frozen)
    if only is not None:
        settled[regions[~only]] = True
    if settled.all() or not settled.any():
        return
    touching = _touching(regions, ~settled)
    touching = touching.where(rank_of[touching.other] != frozen)  # frozen labels do not spread
    while True:
        # All of a round see the labels from before it: the order of regions does not matter.
        now = touching.where(settled[touching.other])
        chosen, winners = _winners(now, rank_of, areas, count)
        if not len(chosen):
            break
        rank_of[chosen] = winners
        settled[chosen] = True
        touching = touching.where(~settled[touching.small])
    ranks[:] = rank_of[regions]


class Touching(NamedTuple):
    """Pairs of regions that touch, one a row."""

    small: np.ndarray  # a region that may change
    other: np.ndarray  # a region in its ring
    pixels: np.ndarray  # number of pixels of ``other`` in that ring
    edge: np.ndarray  # True if one of them shares an edge with ``small``

    def where(self, rows: np.ndarray) -> Touching:
        """Returns the chosen rows."""
        return Touching(*(column[rows] for column in self))


def _winners(
    touching: Touching, rank_of: np.ndarray, areas: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the regions that have a label to take, and these labels."""
    # The ring's pixels are counted by label, whichever of its regions they belong to.
    pairs, row = np.unique(
        touching.small.astype(np.int64) * count + rank_of[touching.other], return_inverse=True
    )
    votes = np.bincount(row, touching.pixels)
    edge = np.bincount(row, touching.edge) > 0
    largest = np.zeros(len(pairs), np.int64)
    np.maximum.at(largest, row, areas[touching.other])
    # the commonest label; of equals that of the largest region it touches, then the smallest
    return heaviest(*np.divmod(pairs[edge], count), votes[edge], largest[edge])


def heaviest(
    groups: np.ndarray, values: np.ndarray, *weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the groups, and of each the value of most weight, by the first that is not equal."""
    # Sorted so that the best value of a group is where the group begins; of equals the smallest.
    order = np.lexsort((values, *(-weight for weight in reversed(weights)), groups))
    best = order[np.diff(groups[order], prepend=-1) != 0]
    return groups[best], values[best]


def connected(ranks: LabelMap) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of every pixel's region, 0 and up, and the areas of the regions."""
    # Runs of equal pixels along the rows are joined to those below that they overlap.
    starts = np.ones(ranks.shape, bool)
    starts[:, 1:] = ranks[:, 1:] != ranks[:, :-1]
    runs = (np.cumsum(starts.ravel(), dtype=np.int32) - 1).reshape(ranks.shape)
    # where two runs begin to overlap, one of them starts
    meet = (ranks[1:] == ranks[:-1]) & (starts[1:] | starts[:-1])
    upper, lower = runs[:-1][meet], runs[1:][meet]
    number = int(runs[-1, -1]) + 1
    graph = sparse.coo_array((np.ones(len(upper), bool), (upper, lower)), (number, number))
    _, region_of_run = csgraph.connected_components(graph, directed=False)
    regions = region_of_run[runs]
    return regions, np.bincount(regions.ravel())


def _touching(regions: np.ndarray, small: np.ndarray) -> Touching:
    """The rings of the small regions, counted by the regions their pixels belong to."""
    count = small.size
    width = regions.shape[1] + 2
    framed = np.pad(regions, 1, constant_values=NONE).ravel()
    pixels = np.flatnonzero((framed != NONE) & small[framed])
    rings, edges = [], []
    for dy, dx in EDGES + CORNERS:
        beside = pixels + dy * width + dx
        outside = (framed[beside] != framed[pixels]) & (framed[beside] != NONE)
        own, beside = framed[pixels[outside]].astype(np.int64), beside[outside]
        rings.append(own * framed.size + beside)
        if (dy, dx) in EDGES:
            edges.append(own * count + framed[beside])
    own, beside = np.divmod(np.unique(np.concatenate(rings)), framed.size)
    pairs, number = np.unique(own * count + framed[beside], return_counts=True)
    return Touching(*np.divmod(pairs, count), number, np.isin(pairs, np.concatenate(edges)))


def _ranked(labels: np.ndarray) -> Ranked:
    """Numbers the labels that occur, ascending, VOID last."""
    void = FILE_VOID if labels.dtype == np.uint8 else VOID
    low, high = int(labels.min()), int(labels.max())
    # Counting is faster than sorting, as long as the range is that of labels.
    if high - low < 2**16:
        values, codes = np.arange(low, high + 1), labels.astype(np.int64) - low
    else:
        values, codes = np.unique(labels, return_inverse=True)
    present = np.flatnonzero(np.bincount(codes.ravel()))
    is_void = values[present] == void
    present = np.concatenate([present[~is_void], present[is_void]])
    table = np.zeros(len(values), np.int32)
    table[present] = np.arange(len(present))
    values = values[present]
    rank = {value: i for i, value in enumerate(values.tolist())}
    return Ranked(table[codes], values, rank.get(0, NONE), rank.get(void, NONE))


def _with_margin(
    box: tuple[slice, ...], window: tuple[slice, ...], shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Returns a box of a window, one pixel wider, in the map's coordinates, and the box in that."""
    around, inside = [], []
    for part, outer, length in zip(box, window, shape):
        start, stop = part.start + outer.start, part.stop + outer.start
        low = max(start - 1, 0)
        around.append(slice(low, min(stop + 1, length)))
        inside.append(slice(start - low, stop - low))
    return tuple(around), tuple(inside)


def _ring(part: np.ndarray) -> np.ndarray:
    """Marks the pixels outside a region that it touches by an edge or a corner."""
    # Grown by one pixel along the columns, then along the rows: by a square of three.
    grown = part.copy()
    grown[1:] |= part[:-1]
    grown[:-1] |= part[1:]
    ring = grown.copy()
    ring[:, 1:] |= grown[:, :-1]
    ring[:, :-1] |= grown[:, 1:]
    return ring & ~part


def _check(labels: np.ndarray, tau: int, mode: str, only: np.ndarray | None = None) -> None:
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"masks.absorb: a {labels.dtype} array of shape {labels.shape} given; it takes one "
            "integer label map [height, width]."
        )
    if tau < 0:
        raise ValueError(f"masks.absorb: tau={tau} given; an area in pixels, 0 or more.")
    if mode not in ("sequential", "fast"):
        raise ValueError(f"masks.absorb: mode={mode!r} given; one of: sequential, fast.")
    if only is not None and (mode != "fast" or only.shape != labels.shape):
        raise ValueError(
            f"masks.absorb: only of shape {only.shape} given with mode={mode!r} and a map of shape "
            f"{labels.shape}; it belongs to mode='fast' and has the shape of the map."
        )

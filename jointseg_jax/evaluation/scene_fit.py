"""How well a region has the shape of its word: IoU with the best-fitting template.

A template is a shape of ``scene_drawing`` at a pose that some ``Scenes`` can choose: a diameter
within ``DIAMETERS``, an angle within ``TILT``, the whole disc inside the picture.

1. search: every pose of a grid of ``RADII`` x ``ANGLES`` x positions one pixel apart (of larger
   pictures every second, third ... pixel: ``COARSE``). A template at all positions is a matrix of
   pixels, so its intersections with all regions are one product
2. refinement: ``STEPS`` random changes of the pose, from half the spacing of the grid down to a
   tenth of it; each is kept where the IoU rises. All regions try the same changes, so that the fit
   of a region does not depend on the others
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.lib.stride_tricks import sliding_window_view

from jointseg_jax.data.sources import scene_drawing
from jointseg_jax.data.sources.scenes import DIAMETERS, TILT

RADII, ANGLES, STEPS = 13, 7, 100

COARSE, FINE = 32, 64
"""Largest shorter side, in pixels, that is searched and refined in full; of larger pictures every
second pixel, every third ..."""

BEYOND, DRAWING = 1.05, 512
"""Half the side of a shape's drawing in its own frame, and cells along that side."""

CHUNK = 2**17
"""Pixels that are refined together: what fits a cache."""

Regions = Bool[np.ndarray, "regions height width"]

Poses = Float[np.ndarray, "regions 4"]
"""Centre x and y and radius in pixels, angle in radians."""

Fits = Float[np.ndarray, " regions"]


def fit(regions: Regions, kind: str) -> Fits:
    """Returns the IoU of each region with the template of a kind that fits it best, in [0, 1].

    Args:
      kind: a name in ``scene_drawing.SHAPES``.
    """
    count, height, width = regions.shape
    if not count:
        return np.zeros(0, np.float32)
    stride = math.ceil(min(height, width) / FINE)
    rows, columns = _centres(height, stride), _centres(width, stride)
    kept = regions[:, rows.astype(int)][:, :, columns.astype(int)]
    fits, poses = np.zeros(count, np.float32), _search(regions, kind)
    size = max(1, CHUNK // kept[0].size)
    for start in range(0, count, size):
        some = slice(start, start + size)
        problem = _Problem(kept[some], kind, (height, width), rows, columns)
        fits[some] = problem.refine(poses[some])
    return fits


def _radii(shape: tuple[int, int]) -> tuple[float, float]:
    """Smallest and largest radius, in pixels."""
    smallest, largest = (0.5 * min(shape) * diameter for diameter in DIAMETERS)
    return smallest, largest


def _centres(side: int, stride: int) -> Float[np.ndarray, " pixels"]:
    """Centres of every ``stride``-th pixel of a side, from the middle of the first group on."""
    return np.arange(stride // 2, side, stride) + 0.5


def _inside(
    kind: str,
    poses: Poses,
    rows: Float[np.ndarray, " rows"],
    columns: Float[np.ndarray, " columns"],
) -> Bool[np.ndarray, "regions rows columns"]:
    """Draws the template of each pose over the given pixel centres."""
    x, y, radius, angle = poses.astype(np.float32).T[..., None, None]
    dx = (columns.astype(np.float32) - x) / radius
    dy = (rows.astype(np.float32)[:, None] - y) / radius
    scale = np.float32(DRAWING / (2 * BEYOND))
    cells = [part * scale + (DRAWING / 2 + 0.5) for part in scene_drawing.turned(dx, dy, angle)]
    # what lies beyond the drawing gets its last row or column, which is outside
    u, v = (np.clip(part, 0, DRAWING).astype(np.int32) for part in cells)
    return _drawing(kind)[v, u]


@functools.cache
def _drawing(kind: str) -> Bool[np.ndarray, "rows columns"]:
    """A shape in its own frame, finely drawn once: reading it is faster than its formula."""
    frame = (np.arange(DRAWING + 1) - DRAWING // 2) * (2 * BEYOND / DRAWING)
    return scene_drawing.SHAPES[kind](frame[None, :], frame[:, None]) > 0


class _Template(NamedTuple):
    """A shape of the grid, with its centre in the middle of twice the picture."""

    radius: float
    angle: float
    drawn: Bool[np.ndarray, "rows columns"]
    """At the offsets between any two pixels, so that windows of it are all its shifts."""
    area: int


@functools.cache
def _templates(kind: str, shape: tuple[int, int]) -> list[_Template]:
    """Draws a kind at every radius and angle of the grid, for pictures of (height, width)."""
    stride = math.ceil(min(shape) / COARSE)
    down, right = (
        np.arange(1 - count, count) * float(stride)
        for count in (len(_centres(side, stride)) for side in shape)
    )
    found = []
    # the largest first: they have the fewest positions, and leave little to do for the others
    for radius in np.linspace(*_radii(shape), RADII)[::-1]:
        different = {}  # what is round looks the same at every angle
        for angle in np.linspace(-TILT, TILT, ANGLES):
            drawn = _inside(kind, np.array([[0.0, 0.0, radius, angle]]), down, right)[0]
            template = _Template(float(radius), float(angle), drawn, np.count_nonzero(drawn))
            different.setdefault(drawn.tobytes(), template)
        found += different.values()
    return found


def _search(regions: Regions, kind: str) -> Poses:
    """Returns the best pose of the grid for each region."""
    count, height, width = regions.shape
    stride = math.ceil(min(height, width) / COARSE)
    rows, columns = _centres(height, stride), _centres(width, stride)
    small = regions[:, rows.astype(int)][:, :, columns.astype(int)]
    # pixels that are in no region count in the template's area alone
    across, along = _extent(small.any((0, 2))), _extent(small.any((0, 1)))
    used = small[:, across, along]
    flat = np.ascontiguousarray(used.reshape(count, -1).T, np.float32)  # [pixels, regions]
    area = flat.sum(0)
    best, poses = np.full(count, -1.0, np.float32), np.zeros((count, 4))
    for radius, angle, drawn, mine in _templates(kind, (height, width)):
        # IoU <= smaller area / larger area
        able = np.flatnonzero(np.minimum(area, mine) > best * np.maximum(area, mine))
        if not able.size:
            continue
        y = np.flatnonzero((rows >= radius) & (rows <= height - radius))
        x = np.flatnonzero((columns >= radius) & (columns <= width - radius))
        windows = sliding_window_view(drawn, used.shape[1:])[across.start :, along.start :]
        # the window of the first pixel as centre is the last one
        windows = windows[: len(rows), : len(columns)][::-1, ::-1]
        windows = windows[y[0] : y[-1] + 1, x[0] : x[-1] + 1]
        templates = windows.astype(np.float32).reshape(len(y) * len(x), -1)
        shared = templates @ flat[:, able]  # [positions, regions]
        iou = shared / (mine + area[able] - shared)
        at = iou.argmax(0)
        value = iou[at, np.arange(len(able))]
        better = value > best[able]
        able, at = able[better], at[better]
        best[able] = value[better]
        centre = (columns[x[at % len(x)]], rows[y[at // len(x)]])
        poses[able] = np.column_stack([*centre, np.full((len(able), 2), (radius, angle))])
    return poses


def _extent(used: Bool[np.ndarray, " pixels"]) -> slice:
    """From the first to the last pixel that is used; all where none is."""
    at = np.flatnonzero(used)
    return slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0, len(used))


class _Problem:
    """Regions whose poses are refined together."""

    def __init__(
        self,
        regions: Regions,
        kind: str,
        shape: tuple[int, int],
        rows: np.ndarray,
        columns: np.ndarray,
    ):
        self._regions, self._kind, self._radii = regions, kind, _radii(shape)
        self._shape, self._rows, self._columns = shape, rows, columns
        self._areas = np.count_nonzero(regions, axis=(1, 2))

    def refine(self, poses: Poses) -> Fits:
        """Returns the best IoU on the way from these poses."""
        best, (low, high) = self._iou(poses), self._radii
        pixel = math.ceil(min(self._shape) / COARSE)
        spacing = [pixel, pixel, (high - low) / (RADII - 1), 2 * TILT / (ANGLES - 1)]
        changes = np.random.default_rng(0).normal(size=(STEPS, 4)) * spacing
        for change in changes * np.geomspace(0.5, 0.1, STEPS)[:, None]:
            tried = self._allowed(poses + change)
            iou = self._iou(tried)
            better = iou > best
            poses = np.where(better[:, None], tried, poses)
            best = np.maximum(best, iou)
        return best

    def _allowed(self, poses: Poses) -> Poses:
        """Moves poses to the nearest ones that a scene may have."""
        height, width = self._shape
        radius = np.clip(poses[:, 2], *self._radii)
        x = np.clip(poses[:, 0], radius, width - radius)
        y = np.clip(poses[:, 1], radius, height - radius)
        return np.stack([x, y, radius, np.clip(poses[:, 3], -TILT, TILT)], 1)

    def _iou(self, poses: Poses) -> Fits:
        drawn = _inside(self._kind, poses, self._rows, self._columns)
        shared = np.count_nonzero(drawn & self._regions, axis=(1, 2))
        union = np.count_nonzero(drawn, axis=(1, 2)) + self._areas - shared
        return (shared / np.maximum(union, 1)).astype(np.float32)

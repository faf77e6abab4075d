"""Mask clean-up on label maps of three levels of noise, against the original's algorithm.

``plain`` is the original's way; ``crops`` is ours in numpy and scipy and ``compiled`` ours with
numba, both to give the same map to the last pixel, which is checked here; ``fast`` is the other
mode, with a result of its own. One map a call, one thread, by processor time.

Source: ``plain`` JoDiffusion, section 3.3 (mask optimisation); written from its description, no
code taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Integer
from scipy import ndimage

from jointseg_jax.annotations import masks
from jointseg_jax.perf.harness import Action, BenchConfig, Benchmark, Values, on_processor, rounded

LEVELS = {"clean": 160, "medium": 709, "noisy": 2447}
"""Regions in a map of 512 x 512 pixels, by level of noise."""

CLASSES = 21
BLOBS = 8
"""Cells of the coarse noise that blobs are made of, along a side."""

LARGEST = 7
"""Sides of a speck at most."""

BACKGROUND = 0
RING = np.ones((3, 3), bool)

Labels = Integer[np.ndarray, "height width"]
Absorb = Callable[[np.ndarray, int], np.ndarray]


def absorb_plain(labels: Labels, area: int) -> Labels:
    """Merges every region of fewer than ``area`` pixels into what surrounds it, the slow way.

    The rule, and the result, is that of ``masks.absorb`` with ``mode="sequential"``; here every
    region costs several passes over the whole map, as it does in the original.
    """
    labels = labels.copy()
    for label in np.unique(labels):
        if label == BACKGROUND:
            continue
        regions, count = ndimage.label(labels == label)
        for number in range(1, count + 1):
            region = regions == number
            if region.sum() >= area:
                continue
            # Its neighbours vote, the eight around each pixel.
            ring = ndimage.binary_dilation(region, RING) & ~region
            values, votes = np.unique(labels[ring], return_counts=True)
            if len(values):
                labels[region] = values[votes.argmax()]  # ascending: the smallest of equals
    return labels


def label_map(size: int, regions: int, *, classes: int = CLASSES, seed: int = 0) -> np.ndarray:
    """A map of smooth blobs, and as many specks on them as make about ``regions`` regions."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((classes, BLOBS, BLOBS))
    field = ndimage.zoom(coarse, (1, size / BLOBS, size / BLOBS), order=1)
    labels = field.argmax(0).astype(np.uint8)
    # Specks hide each other and join, so it takes several rounds.
    missing = regions - len(_sizes(labels))
    while missing > 0:
        for _ in range(missing):
            height, width = rng.integers(1, LARGEST, 2)
            y, x = rng.integers(0, (size - height, size - width))
            labels[y : y + height, x : x + width] = rng.integers(classes)
        missing = regions - len(_sizes(labels))
    return labels


def maps(size: int) -> dict[str, np.ndarray]:
    """One map of each level; the smaller the map, the fewer the regions."""
    # The same number of regions for each pixel.
    part = (size / 512) ** 2
    return {k: label_map(size, max(round(n * part), 2)) for k, n in LEVELS.items()}


def _sizes(labels: np.ndarray) -> np.ndarray:
    """Pixels of each region."""
    return masks.connected(labels.astype(np.int32))[1]


def crops(labels: np.ndarray, area: int) -> np.ndarray:
    """Our sequential mode where numba is not installed."""
    ranked = masks._ranked(labels)
    masks.sequential(ranked, area, masks.NONE, masks.sweep_crops)
    return ranked.values[ranked.ranks].astype(labels.dtype)


def ways() -> dict[str, Absorb]:
    """The available ways to clean a map, by name; ``compiled`` only with numba."""
    found: dict[str, Absorb] = {"plain": absorb_plain, "crops": crops}
    if masks.compiled() is not None:
        found["compiled"] = masks.absorb
    return found | {"fast": lambda labels, area: masks.absorb(labels, area, mode="fast")}


class Cleanup(Benchmark):
    """The benchmark of ``--what masks``."""

    def __init__(self, bench: BenchConfig):
        made, found, area = maps(bench.size), ways(), bench.area
        exact = {level: {} for level in made}
        self.actions = {}
        for level, labels in made.items():
            wanted = absorb_plain(labels, area)
            for way, absorb in found.items():
                run = on_processor(lambda a=absorb, m=labels: a(m, area))
                self.actions[f"{level} {way}"] = Action(run, 1)
                if way not in ("plain", "fast"):
                    exact[level][way] = bool(np.array_equal(absorb(labels, area), wanted))
        self.facts = {
            "size": [bench.size, bench.size],
            "area": area,
            "classes": CLASSES,
            "regions": {level: len(_sizes(labels)) for level, labels in made.items()},
            "small_regions": {k: int((_sizes(labels) < area).sum()) for k, labels in made.items()},
            "timed": "processor seconds of one map, one thread",
            "numba": "compiled" in found,
            "exact": exact,
            "all_exact": all(same for row in exact.values() for same in row.values()),
        }

    def after(self, medians: Mapping[str, float]) -> Values:
        """How many times as fast as the original each way is, by level."""
        out: dict[str, Values] = {level: {} for level in LEVELS}
        for name, seconds in medians.items():
            level, way = name.split()
            if way != "plain":
                out[level][way] = rounded(medians[f"{level} plain"] / seconds, 4)
        return {"times_as_fast_as_plain": out}

"""Label maps compared: a codec's output with its input, a judge's labels with a generated mask.

1. reconstruction: IoU of what a codec gives back with what it was given; the same over edge pixels,
   those with another label at most ``EDGE`` pixels away; the class with the lowest IoU; MCD,
   the floor for that of masks which are read through the codec
2. alignment: IoU of a generated mask with what a judge sees in the image generated beside it
3. chance: the same with masks from other images. These follow a random cycle through all images, so
   that no image keeps its own mask; it is the level that a model without alignment reaches

VOID in a generated mask or a reconstruction counts as wrong (``Confusion``).
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from jointseg_jax.annotations import masks
from jointseg_jax.data.sources.scenes import HUES, oracle_labels
from jointseg_jax.evaluation.confusion import Confusion, Maps, Valid, share_difference, shares
from jointseg_jax.training.workdir import Run
from jointseg_jax.types import VOID, UserError

EDGE = 2
"""Pixels on either side of a boundary that count as edge."""

Judge = Callable[[np.ndarray], np.ndarray]
"""[height, width, 3] uint8 image -> [height, width] labels."""

log = logging.getLogger("jointseg_jax")


class Reconstruction:
    """What a codec makes of label maps, batch by batch."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.whole, self.edges = Confusion(len(names)), Confusion(len(names))
        self._differences: list[np.ndarray] = []  # [2, maps]: with VOID and without

    def add(self, labels: Maps, decoded: Maps, valid: Valid | None = None) -> None:
        """Counts a batch of maps (or one) and what came back for them."""
        before, after = (shares(maps, len(self.names)) for maps in (labels, decoded))
        both = np.stack([share_difference(before, after, void=void) for void in (True, False)])
        kept = both if valid is None else both[:, valid]  # [2, *batch]
        self._differences.append(kept.reshape(2, -1))
        self.whole.add(labels, decoded, valid)
        # All but the edges become VOID in the truth, which a confusion matrix leaves out.
        edge = masks.boundary(labels, EDGE)
        self.edges.add(np.where(edge, labels, VOID).astype(labels.dtype), decoded, valid)

    def report(self) -> dict[str, Any]:
        """The numbers as JSON values; None where there was nothing to measure."""
        differences = np.concatenate([*self._differences, np.zeros((2, 0))], axis=1)
        mcd = [number(row.mean()) if row.size else None for row in differences]
        return {
            "reconstruction_miou": number(self.whole.miou()),
            "edge_miou": number(self.edges.miou()),
            "worst_class": worst(self.whole, self.names),
            "pixel_accuracy": number(self.whole.pixel_accuracy),
            "per_class_iou": per_class(self.whole, self.names),
            "reconstruction_mcd": mcd[0],
            "reconstruction_mcd_without_void": mcd[1],
        }


class Alignment:
    """How well generated masks fit the images generated with them, pair by pair."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.own, self.others = Confusion(len(names)), Confusion(len(names))

    def add(self, judged: Maps, mask: Maps, other: Maps | None = None) -> None:
        """Counts a judge's labels of an image with its mask, and with another's for chance."""
        self.own.add(judged, mask)
        if other is not None:
            self.others.add(judged, other)

    def report(self) -> dict[str, Any]:
        """The numbers as JSON values; None where there was nothing to measure."""
        return {
            "alignment_miou": number(self.own.miou()),
            "chance_miou": number(self.others.miou()),
            "alignment_per_class": per_class(self.own, self.names),
        }


def cycle(count: int, seed: int) -> Int64[np.ndarray, " count"]:
    """Returns a random order of 0 .. count-1, in which each is compared with the one before.

    In a circle, so that none is compared with itself when there are two or more. A random one, for
    neighbours of a sequence (frames of a film) look alike.
    """
    return np.random.default_rng(seed).permutation(count)


def per_class(confusion: Confusion, names: Sequence[str]) -> dict[str, float | None]:
    """IoU by class name; None for absent classes."""
    return {name: number(value) for name, value in zip(names, confusion.iou)}


def worst(confusion: Confusion, names: Sequence[str]) -> dict[str, Any] | None:
    """The class of the lowest IoU, by name."""
    iou = confusion.iou
    if np.isnan(iou).all():
        return None
    lowest = int(np.nanargmin(iou))
    return {"name": names[lowest], "iou": number(iou[lowest])}


def number(value: float | np.floating) -> float | None:
    """A rounded float for JSON; None in place of what is not finite."""
    value = float(value)
    return round(value, 6) if math.isfinite(value) else None


def find_judge(run: Run) -> Judge | None:
    """Returns the judge that ``config.evaluate.judge`` names; for "" None, and logs why."""
    name = run.config.evaluate.judge
    if name == "":
        log.info(
            "alignment is not measured: config.evaluate.judge is empty. A judge labels generated "
            "images; one of: %s (for data whose classes it knows).",
            ", ".join(JUDGES),
        )
        return None
    if name not in JUDGES:
        raise UserError(
            f'config.evaluate.judge: {name!r} is unknown; "" or one of: {", ".join(JUDGES)}.'
        )
    return JUDGES[name](run.info.classes.names)


def oracle(names: Sequence[str]) -> Judge:
    """Returns the exact labels of the embedded scenes, whose categories each own a hue."""
    unknown = [name for name in names if name not in HUES]
    if unknown:
        raise UserError(
            f"config.evaluate.judge: the oracle knows the categories of `scenes` by their hue; "
            f'{len(unknown)} classes are none of these ({", ".join(unknown[:4])}). Set it to "".'
        )
    return functools.partial(oracle_labels, names=tuple(names))


JUDGES = {"oracle": oracle}
"""Makers of judges, class names -> judge, by their name in a config."""

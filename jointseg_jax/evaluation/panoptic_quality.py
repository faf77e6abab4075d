"""Panoptic quality: how well predicted segments match the true ones, by class.

A segment is what shares a (category, instance) pair in one map; of stuff the instance is ignored.
A category that is neither thing nor stuff is void, in the truth and in a prediction alike.

1. ``IoU(g, p) = |g & p| / (|g| + |p| - |p in true void| - |g & p|)``
2. ``g`` and ``p`` of one category match when ``IoU > 1/2``, which can be true of one pair only
3. TP: matches. FN: true segments without one. FP: predicted segments without one, but for those
   more than half of which lies in the void of the truth.
4. ``SQ = sum of IoU / TP``, ``RQ = TP / (TP + FP/2 + FN/2)``, ``PQ = SQ RQ``; a mean runs over the
   classes with ``TP + FP + FN > 0``
5. modified PQ: for stuff, the IoU of every overlap over the number of true segments, whether it
   matches or not; a mean runs over stuff in the truth and things as above

Predicted void is no answer, and forgives nothing. The ``rule`` ``torchmetrics`` takes it out of the
union as well (``- |g in predicted void|``), and does not count true segments that lie in it.

Everything is summed over the maps first. A thing without an instance (instance 0) is a segment like
any other; give a crowd another category, or VOID, to leave it out.

Source: Kirillov et al., Panoptic Segmentation (1801.00868), section 4, as panopticapi counts it;
Porzi et al., Seamless Scene Segmentation (1905.01220), section 4 (modified).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from jointseg_jax.data.classes import Classes
from jointseg_jax.data.segments import Parts, parts
from jointseg_jax.evaluation.alignment import Reconstruction, number
from jointseg_jax.evaluation.confusion import Valid, mean
from jointseg_jax.types import require_one_of

PanopticMaps = Integer[np.ndarray, "*batch height width 2"]
"""(label, segment) per pixel, of a batch of maps or one."""

PerClass = Float[np.ndarray, " classes"]

SUMS = ("tp", "fp", "fn", "true", "iou_sum", "overlap")
"""What is summed over maps, per class."""


RULES = ("panopticapi", "torchmetrics")
"""What predicted void is: a part of the map that is not answered, or one that is left out."""


class PanopticQuality:
    """Counts of matched and missed segments that grow map by map.

    Args:
      rule: one of ``RULES``.

    Attributes:
      categories: the order of everything that is per class: things ascending, then stuff.
    """

    def __init__(self, things: Sequence[int], stuff: Sequence[int], *, rule: str = "panopticapi"):
        require_one_of("PanopticQuality: rule", rule, RULES)
        both = sorted(set(things) & set(stuff))
        if both or not (len(things) or len(stuff)):
            raise ValueError(
                f"PanopticQuality: things {list(things)} and stuff {list(stuff)} given; at least "
                f"one category is needed, and none may be both{f' as {both} are' if both else ''}."
            )
        self.things, self.stuff, self.rule = sorted(set(things)), sorted(set(stuff)), rule
        self.categories = np.array(self.things + self.stuff, np.int64)
        classes = len(self.categories)
        self.tp = np.zeros(classes, np.int64)  # matches
        self.fp = np.zeros(classes, np.int64)  # predicted segments that match none
        self.fn = np.zeros(classes, np.int64)  # true segments that none matches
        self.true = np.zeros(classes, np.int64)  # true segments
        self.iou_sum = np.zeros(classes)  # of the matches
        self.overlap = np.zeros(classes)  # IoU of every overlap within a class, matches or not

    def add(self, gt: PanopticMaps, pred: PanopticMaps, valid: Valid | None = None) -> None:
        """Counts a batch of (category, instance) maps (or one), or its ``valid`` rows."""
        if gt.shape != pred.shape:
            raise ValueError(
                f"PanopticQuality.add: truth {gt.shape} and prediction {pred.shape} given; their "
                "shapes must be equal."
            )
        if valid is not None:
            gt, pred = gt[valid], pred[valid]
        for true, made in zip(gt.reshape(-1, *gt.shape[-3:]), pred.reshape(-1, *gt.shape[-3:])):
            self._match(self._segments(true), self._segments(made))

    def merge(self, other: PanopticQuality) -> None:
        """Adds what another metric of the same categories has counted."""
        if self.rule != other.rule:
            raise ValueError(
                f"PanopticQuality.merge: rule {other.rule!r} given, here it is {self.rule!r}; they "
                "must be equal."
            )
        if (self.things, self.stuff) != (other.things, other.stuff):
            raise ValueError(
                f"PanopticQuality.merge: things {other.things} and stuff {other.stuff} given, here "
                f"are {self.things} and {self.stuff}; they must be equal."
            )
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _segments(self, pairs: np.ndarray) -> Parts:
        """Returns the segments of a map, labels being positions in ``categories``; void is last."""
        order = np.argsort(self.categories)
        position = np.searchsorted(self.categories, pairs[..., 0], sorter=order)
        # An id above the last category would be placed behind it: any position does, for the
        # comparison below finds another category there.
        position = order[np.minimum(position, len(order) - 1)]
        is_category = self.categories[position] == pairs[..., 0]
        position = np.where(is_category, position, len(order))
        # Stuff is one segment, whatever instance numbers its pixels have.
        return parts(position, np.where(position < len(self.things), pairs[..., 1], 0))

    def _match(self, gt: Parts, pred: Parts) -> None:
        classes = len(self.categories)
        # One entry per overlapping pair: its segments g and p, and |g & p|. There are few.
        overlap = parts(gt.codes, pred.codes)
        g, p, shared = overlap.labels, overlap.segments, overlap.areas
        gt_void, pred_void = gt.labels == classes, pred.labels == classes
        pred_outside = _sum(p, shared * gt_void[g], len(pred.areas))
        forgiven = pred_void & (self.rule == "torchmetrics")
        gt_outside = _sum(g, shared * forgiven[p], len(gt.areas))
        # (1) |g| + |p| - |p in true void| - |g & p|
        union = gt.areas[g] - gt_outside[g] + pred.areas[p] - pred_outside[p] - shared
        # (2) IoU > 1/2, in whole numbers: no quotient to round
        same = (gt.labels[g] == pred.labels[p]) & ~gt_void[g]
        match = same & (2 * shared > union)
        # (3) what matches nothing counts, unless more than half of it lies in the other map's void
        missed, invented = ~gt_void, ~pred_void
        missed[g[match]] = invented[p[match]] = False
        missed &= 2 * gt_outside <= gt.areas
        invented &= 2 * pred_outside <= pred.areas
        category, iou = gt.labels[g], shared / np.maximum(union, 1)  # 0 only where both are void
        self.tp += np.bincount(category[match], minlength=classes)
        self.fn += np.bincount(gt.labels[missed], minlength=classes)
        self.fp += np.bincount(pred.labels[invented], minlength=classes)
        self.true += np.bincount(gt.labels[~gt_void], minlength=classes)
        # (4) sums over the matches; (5) over every overlap within a category
        self.iou_sum += np.bincount(category[match], iou[match], minlength=classes)
        self.overlap += np.bincount(category[same], iou[same], minlength=classes)

    @property
    def present(self) -> Bool[np.ndarray, " classes"]:
        """The classes that a mean runs over."""
        return (self.tp + self.fp + self.fn) > 0

    @property
    def sq(self) -> PerClass:
        """Segmentation quality: mean IoU of the matches; 0 without any, NaN for absent classes."""
        return np.where(self.present, self.iou_sum / np.maximum(self.tp, 1), np.nan)

    @property
    def rq(self) -> PerClass:
        """Recognition quality: the F1 score of the matches; NaN for absent classes."""
        errors = (self.fp + self.fn) / 2
        # (4) TP / (TP + FP/2 + FN/2); the least denominator of a class that is present is 1/2
        return np.where(self.present, self.tp / np.maximum(self.tp + errors, 0.5), np.nan)

    @property
    def pq(self) -> PerClass:
        """Panoptic quality; NaN for absent classes."""
        return self.sq * self.rq

    @property
    def modified(self) -> PerClass:
        """Panoptic quality, of stuff without a threshold; NaN for absent classes."""
        loose = np.where(self.true > 0, self.overlap / np.maximum(self.true, 1), np.nan)
        return np.where(np.arange(len(loose)) < len(self.things), self.pq, loose)

    def report(self, names: Sequence[str]) -> dict[str, Any]:
        """The numbers as JSON values, ``names`` by category; None where nothing was measured."""
        pq, things = self.pq, len(self.things)
        means = {"pq": pq, "sq": self.sq, "rq": self.rq}
        means |= {"pq_things": pq[:things], "pq_stuff": pq[things:], "modified_pq": self.modified}
        per_class = {names[c]: number(value) for c, value in zip(self.categories, pq)}
        return {k: number(mean(v)) for k, v in means.items()} | {"per_class_pq": per_class}


class PanopticReconstruction:
    """What a codec makes of panoptic maps: of their labels, and of their segments."""

    def __init__(self, classes: Classes):
        self.labels = Reconstruction(classes.names)
        self.segments = PanopticQuality(classes.things, classes.stuff)

    def add(self, values: PanopticMaps, decoded: PanopticMaps, valid: Valid | None = None) -> None:
        """Counts a batch of (label, segment) maps and what came back for them."""
        self.labels.add(values[..., 0], decoded[..., 0], valid)
        self.segments.add(values, decoded, valid)

    def report(self) -> dict[str, Any]:
        """The numbers as JSON values, those of the segments as ``reconstruction_pq`` and so on."""
        quality = self.segments.report(self.labels.names)
        return self.labels.report() | {"reconstruction_" + k: v for k, v in quality.items()}


def _sum(index: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Sums whole numbers by index."""
    return np.bincount(index, values, minlength=count).astype(np.int64)

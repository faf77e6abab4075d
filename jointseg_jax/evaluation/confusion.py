"""What label maps hold, compared with others: pixel by pixel, and by the share of a class.

1. ``matrix[g, p]``: pixels of class ``g`` that were labelled ``p``; where the truth is VOID (-1, or
   255 as files have it) a pixel is left out
2. ``IoU_c = matrix[c, c] / (true_c + predicted_c - matrix[c, c])``, NaN where the class is absent
   from both
3. pixel accuracy ``sum_c matrix[c, c] / sum``; over the classes in the truth, mean accuracy is the
   mean of ``matrix[c, c] / true_c`` and frequency-weighted IoU that of ``IoU_c``, weighted by
   ``true_c``

A prediction of VOID, or of an id that is no class, is wrong: it counts in ``true_c`` of the pixel's
class and in no ``predicted_c``.

4. ``share_c = pixels of c / (height width)``; mean count difference (PDM, section 4.1)
   ``MCD = sum_c |share_c(truth) - share_c(prediction)|``, the mean over images, in [0, 2]: 0 for
   equal histograms wherever the pixels are, 2 for disjoint ones. VOID is a category of its own, or
   left out (the shares then stay parts of the whole image); ids that are no class are left out.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int64, Integer

from jointseg_jax.types import FILE_VOID, VOID, require

Maps = Integer[np.ndarray, "*batch height width"]
"""Label maps, or one."""

Valid = Bool[np.ndarray, "*batch"]
"""Marks the maps of a batch that count."""

Shares = Float[np.ndarray, "*batch categories"]
"""The part of each map that each class takes, and VOID in the last place."""


class Confusion:
    """A confusion matrix that grows batch by batch."""

    def __init__(self, classes: int):
        require("Confusion: classes", classes, classes >= 1, "at least 1")
        self.classes = classes
        self._counts = np.zeros((classes, classes + 1), np.int64)  # last column: no class

    def add(self, gt: Maps, pred: Maps, valid: Valid | None = None) -> None:
        """Counts a batch of maps (or one), or its ``valid`` rows; no true label may be unknown."""
        if gt.shape != pred.shape:
            raise ValueError(
                f"Confusion.add: true labels {gt.shape} and predictions {pred.shape} given; "
                "their shapes must be equal."
            )
        if valid is not None:
            gt, pred = gt[valid], pred[valid]
        gt, pred = gt.astype(np.int64).ravel(), pred.astype(np.int64).ravel()
        annotated = ~is_void(gt, self.classes)
        gt, pred = gt[annotated], pred[annotated]
        wrong = gt[~_is_class(gt, self.classes)]
        if wrong.size:
            raise ValueError(
                f"Confusion.add: true labels {np.unique(wrong)[:8].tolist()} given ({wrong.size} "
                f"px); they must be 0..{self.classes - 1}, {VOID} or {FILE_VOID}."
            )
        pred = np.where(_is_class(pred, self.classes), pred, self.classes)
        # One count per (truth, prediction), with predictions that are no class in the last column.
        flat = np.bincount(gt * (self.classes + 1) + pred, minlength=self._counts.size)
        self._counts += flat.reshape(self._counts.shape)

    def merge(self, other: Confusion) -> None:
        """Adds what another matrix of the same classes has counted."""
        if other.classes != self.classes:
            raise ValueError(
                f"Confusion.merge: {other.classes} classes given, here are {self.classes}; "
                "they must be equal."
            )
        self._counts += other._counts

    @property
    def matrix(self) -> Int64[np.ndarray, "classes classes"]:
        """Pixels by true class (rows) and predicted class (columns)."""
        return self._counts[:, :-1].copy()

    @property
    def hits(self) -> Int64[np.ndarray, " classes"]:
        """Pixels of each class that were labelled so."""
        return np.diagonal(self._counts).copy()

    @property
    def true(self) -> Int64[np.ndarray, " classes"]:
        """Pixels of each class in the truth."""
        return self._counts.sum(axis=1)

    @property
    def union(self) -> Int64[np.ndarray, " classes"]:
        """Pixels of each class in the truth, the prediction, or both."""
        return self.true + self._counts[:, :-1].sum(axis=0) - self.hits

    @property
    def iou(self) -> Float[np.ndarray, " classes"]:
        """Intersection over union of each class; NaN where it is absent."""
        return _ratio(self.hits, self.union)

    def miou(self, absent: Literal["skip", "zero"] = "skip") -> float:
        """Mean IoU; classes absent from truth and prediction are left out, or count as 0."""
        if absent not in ("skip", "zero"):
            raise ValueError(f"Confusion.miou: absent={absent!r} given; one of: skip, zero.")
        iou = self.iou
        return mean(iou if absent == "skip" else np.nan_to_num(iou))

    @property
    def pixel_accuracy(self) -> float:
        """The share of the pixels that are right; NaN when there are none."""
        return float(_ratio(self.hits.sum(), self.true.sum()))

    @property
    def mean_accuracy(self) -> float:
        """The mean over classes in the truth of the share of their pixels that are right."""
        return mean(_ratio(self.hits, self.true))

    @property
    def frequency_weighted_iou(self) -> float:
        """The mean IoU weighted by the classes' pixels in the truth."""
        weighted = self.true * np.nan_to_num(self.iou)
        return float(_ratio(weighted.sum(), self.true.sum()))


def is_void(labels: Integer[np.ndarray, "*shape"], classes: int) -> Bool[np.ndarray, "*shape"]:
    """Marks VOID, and 255 unless that is a class."""
    void = labels == VOID
    return void | (labels == FILE_VOID) if classes <= FILE_VOID else void


def shares(labels: Maps, classes: int) -> Shares:
    """Returns the shares of each map of a batch, or of one."""
    flat = labels.astype(np.int64).reshape(-1, labels.shape[-2] * labels.shape[-1])
    # VOID becomes the last category, and ids that are no class -1: bincount takes none below 0
    flat = np.where(is_void(flat, classes), classes, np.where(_is_class(flat, classes), flat, -1))
    # (4) pixels of c / (height width): also of what is no class, so shares need not sum to 1
    pixels = np.stack([np.bincount(row[row >= 0], minlength=classes + 1) for row in flat])
    return (pixels / flat.shape[1]).reshape(*labels.shape[:-2], classes + 1)


def share_difference(
    truth: Shares, prediction: Shares, *, void: bool = True
) -> Float[np.ndarray, "*batch"]:
    """Returns the summed absolute difference of shares, per map."""
    # (4) sum_c |share_c(truth) - share_c(prediction)|
    difference = np.abs(truth - prediction)
    return np.asarray((difference if void else difference[..., :-1]).sum(axis=-1))


def mcd(gt: Maps, pred: Maps, classes: int, *, void: bool = True) -> float:
    """Returns the mean count difference, with VOID as a category or without."""
    return float(share_difference(shares(gt, classes), shares(pred, classes), void=void).mean())


def _is_class(labels: np.ndarray, classes: int) -> np.ndarray:
    return (labels >= 0) & (labels < classes)


def _ratio(part: np.ndarray | np.number, whole: np.ndarray | np.number) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def mean(values: Float[np.ndarray, " classes"]) -> float:
    """The mean over the classes that are not NaN; NaN when all are."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else float("nan")

"""The confusion matrix of label maps, and what is read out of it.

1. ``matrix[g, p]``: pixels of class ``g`` that were labelled ``p``; where the truth is VOID (-1, or
   255 as files have it) a pixel is left out
2. ``IoU_c = matrix[c, c] / (true_c + predicted_c - matrix[c, c])``, NaN where the class is absent
   from both
3. pixel accuracy ``sum_c matrix[c, c] / sum``; over the classes in the truth, mean accuracy is the
   mean of ``matrix[c, c] / true_c`` and frequency-weighted IoU that of ``IoU_c``, weighted by
   ``true_c``

A prediction of VOID, or of an id that is no class, is wrong: it counts in ``true_c`` of the pixel's
class and in no ``predicted_c``.
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


class Confusion:
    """A confusion matrix that grows batch by batch."""

    def __init__(self, classes: int):
        require("Confusion: classes", classes, classes >= 1, "at least 1")
        self.classes = classes
        self._counts = np.zeros((classes, classes + 1), np.int64)  # last column: no class

    def add(self, gt: Maps, pred: Maps, valid: Valid | None = None) -> None:
        """Counts a batch of maps (or one).

        Args:
          valid: rows to count; all when not given.

        Raises:
          ValueError: a true label that is neither a class nor VOID.
        """
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
        self._check(gt)
        pred = np.where((pred >= 0) & (pred < self.classes), pred, self.classes)
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

    def _check(self, gt: np.ndarray) -> None:
        wrong = gt[(gt < 0) | (gt >= self.classes)]
        if wrong.size:
            raise ValueError(
                f"Confusion.add: true labels {np.unique(wrong)[:8].tolist()} given ({wrong.size} "
                f"px); they must be 0..{self.classes - 1}, {VOID} or {FILE_VOID}."
            )

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
        return _mean(iou[~np.isnan(iou)]) if absent == "skip" else float(np.nan_to_num(iou).mean())

    @property
    def pixel_accuracy(self) -> float:
        """The share of the pixels that are right; NaN when there are none."""
        return _share(self.hits.sum(), self.true.sum())

    @property
    def mean_accuracy(self) -> float:
        """The mean over classes in the truth of the share of their pixels that are right."""
        accuracy = _ratio(self.hits, self.true)
        return _mean(accuracy[self.true > 0])

    @property
    def frequency_weighted_iou(self) -> float:
        """The mean IoU weighted by the classes' pixels in the truth."""
        weighted = self.true * np.nan_to_num(self.iou)
        return _share(weighted.sum(), self.true.sum())


def is_void(labels: Integer[np.ndarray, "*shape"], classes: int) -> Bool[np.ndarray, "*shape"]:
    """Marks VOID, and 255 unless that is a class."""
    void = labels == VOID
    return void | (labels == FILE_VOID) if classes <= FILE_VOID else void


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _share(part: np.number, whole: np.number) -> float:
    return float(part / whole) if whole else float("nan")


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")

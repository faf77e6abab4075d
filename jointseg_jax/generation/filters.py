"""Which generated pairs are good enough to keep.

A verdict depends on the pair alone, and a pair on (seed, index): so it does not matter in which
order, on how many devices or in how many sessions pairs are made. A rejected pair keeps its index
and its manifest line, which says why; nothing takes its place.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from jointseg_jax.types import VOID, UserError


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What a pair must have after clean-up; the defaults let all pass."""

    min_confidence: float | int = 0.0  # least mean of the pixels' confidence
    min_classes: int = 0  # least number of classes in the map
    max_share: float | int = 1.0  # largest part of the labelled pixels that one class may have

    def __post_init__(self) -> None:
        for name, value in (("confidence", self.min_confidence), ("share", self.max_share)):
            if not 0 <= value <= 1:
                raise UserError(f"ERROR [flags] filters: {name} {value} must lie in [0, 1].")
        if self.min_classes < 0:
            raise UserError(f"ERROR [flags] filters: classes {self.min_classes} must be >= 0.")

    def reason(self, pair: Mapping[str, np.ndarray]) -> str:
        """Returns why a pair is rejected: the filter, its value and the limit; "" if it is not."""
        # In float64, and before rounding for the manifest: the same verdict on any machine.
        confidence = float(pair["confidence"].mean(dtype=np.float64))
        if confidence < self.min_confidence:
            return f"min_confidence: {confidence:.4f} < {self.min_confidence}"
        labels = pair["labels"]
        counts = np.unique(labels[labels != VOID], return_counts=True)[1]
        if len(counts) < self.min_classes:
            return f"min_classes: {len(counts)} < {self.min_classes}"
        # A map without any label says nothing but void: as bad as one class everywhere.
        share = counts.max() / counts.sum() if len(counts) else 1.0
        return f"max_share: {share:.4f} > {self.max_share}" if share > self.max_share else ""


def rejections(lines: Iterable[Mapping[str, object]]) -> dict[str, int]:
    """Returns how many pairs of a manifest each filter has rejected."""
    reasons = (str(line["rejected"]) for line in lines if "rejected" in line)
    return dict(collections.Counter(reason.partition(":")[0] for reason in reasons))

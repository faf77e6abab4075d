"""Which generated pairs are good enough to keep.

A verdict depends on the pair alone, and a pair on (seed, index): so it does not matter in which
order, on how many devices or in how many sittings pairs are made. A rejected pair keeps its index
and its manifest line, which says why; nothing takes its place.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jointseg_jax.types import VOID, UserError


@dataclass(frozen=True, kw_only=True)
class Filters:
    """The least that a pair must have, after clean-up; the defaults let all pass.

    Args:
      min_confidence: mean of the pixels' confidence.
      min_classes: number of classes in the map.
      max_share: the largest part of the labelled pixels that one class may have.
    """

    min_confidence: float | int = 0.0
    min_classes: int = 0
    max_share: float | int = 1.0

    def __post_init__(self) -> None:
        for name, value in (("confidence", self.min_confidence), ("share", self.max_share)):
            if not 0 <= value <= 1:
                raise UserError(f"ERROR [flags] filters: {name} {value} must lie in [0, 1].")
        if self.min_classes < 0:
            raise UserError(f"ERROR [flags] filters: classes {self.min_classes} must be >= 0.")

    def reason(self, pair: Mapping[str, np.ndarray]) -> str:
        """Why a pair is rejected: the filter, what was found and what is asked; or nothing."""
        confidence = float(pair["confidence"].mean(dtype=np.float64))
        if confidence < self.min_confidence:
            return f"min_confidence: {confidence:.4f} < {self.min_confidence}"
        labels = pair["labels"]
        counts = np.unique(labels[labels != VOID], return_counts=True)[1]
        if len(counts) < self.min_classes:
            return f"min_classes: {len(counts)} < {self.min_classes}"
        share = counts.max() / counts.sum() if len(counts) else 1.0
        return f"max_share: {share:.4f} > {self.max_share}" if share > self.max_share else ""


def rejections(lines: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many pairs of a manifest each filter has rejected."""
    reasons = (line["rejected"] for line in lines if "rejected" in line)
    return dict(collections.Counter(reason.partition(":")[0] for reason in reasons))

"""Losses far above those before them: counted and told, never averaged away.

1. A finite loss is a spike when it exceeds ``factor`` times the median of the last ``WINDOW``
   losses that were none; before ``LEAST`` of them are known nothing is.
2. The history begins anew with every launch: what is counted is what this launch has seen.
3. The update was applied: unlike a loss that is not finite, a large one has a gradient. Going back
   to a checkpoint is up to ``faults``.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

WINDOW = 200
LEAST = 10

Losses = list[tuple[int, float, Any]]
"""(step, loss, records of the batch)."""


class Spikes:
    """Finds them, window by window.

    Args:
      factor: above the median; 0: nothing is a spike.

    Attributes:
      count: how many were found.
    """

    def __init__(self, factor: float | int):
        self._factor = factor
        self._before: deque[float] = deque(maxlen=WINDOW)
        self.count = 0

    def among(self, losses: Iterable[tuple[int, float, Any]]) -> Losses:
        """The spikes among the losses of further steps."""
        found = []
        for step, loss, records in losses:
            if self._is_one(loss):
                found.append((step, loss, records))
            else:
                self._before.append(loss)
        self.count += len(found)
        return found

    @property
    def usual(self) -> float:
        """The median that losses are compared with."""
        return statistics.median(self._before)

    def _is_one(self, loss: float) -> bool:
        known = self._factor > 0 and len(self._before) >= LEAST
        return known and loss > self._factor * self.usual > 0

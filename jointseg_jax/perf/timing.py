"""Seconds of one call, from the first to the last repetition, and what they come to.

1. The first call and ``warmups`` further ones are shown and do not count.
2. A repetition is ``calls`` calls in a row; its figure is the mean of one.
3. The median of the repetitions is the figure, their lowest and highest its spread.
4. Two contenders are timed in turns, A B A B ...; their ratio is the quotient of the medians, its
   spread the lowest and highest quotient of one turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from jointseg_jax.perf.harness import Action

LENGTH = 1.0
"""Seconds that a repetition should take at least, where nobody says how many calls it has."""

MOST = 200
"""Calls in a repetition at most, where nobody says how many."""


@dataclass(kw_only=True)
class Timing:
    """Everything that was timed of one action, in seconds of one call."""

    images: int
    first: float = math.nan
    warmups: list[float] = field(default_factory=list)
    calls: int = 1
    repetitions: list[float] = field(default_factory=list)

    def warm_up(self, action: Action, warmups: int, calls: int) -> None:
        """Makes the first calls and settles how many there are in a repetition."""
        calls = calls or action.calls
        if not action.warm:
            self.calls = calls or 1
            return
        self.first = action.run(1)
        self.warmups = [action.run(1) for _ in range(warmups)]
        shortest = max(min([self.first, *self.warmups]), 1e-9)
        self.calls = calls or min(max(math.ceil(LENGTH / shortest), 1), MOST)

    def repeat(self, action: Action) -> None:
        """Makes one repetition."""
        self.repetitions.append(action.run(self.calls) / self.calls)

    @property
    def median(self) -> float:
        """The figure."""
        return median(self.repetitions)

    def values(self) -> dict[str, Any]:
        """Plain values: times in ms, and images/s where the action is about images."""
        times = {
            "median_ms": self.median,
            "min_ms": min(self.repetitions),
            "max_ms": max(self.repetitions),
        }
        out: dict[str, Any] = {k: rounded(1e3 * v) for k, v in times.items()}
        if math.isfinite(self.first):
            out["first_ms"] = rounded(1e3 * self.first)
            out["warmup_ms"] = [rounded(1e3 * v) for v in self.warmups]
        out |= {"repetitions": len(self.repetitions), "calls": self.calls}
        if self.images and self.median > 0:
            out |= {"images": self.images, "images_per_second": rounded(self.images / self.median)}
        return out


def ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times as long the second takes: above 1, the first is the faster one."""
    turns = [b / a for a, b in zip(one, other)]
    values = (median(other) / median(one), min(turns), max(turns))
    return dict(zip(("median", "min", "max"), map(rounded, values)))


def rounded(value: float) -> float:
    """Five significant digits: more than any of this is worth."""
    return float(f"{value:.5g}")

"""What a run does about losses and gradients that are not finite, and about losses that leap.

The update has discarded what is not finite already (``step``); the policy says how the run goes on.

* ``skip``: the step is left out; more than ``limit`` in a row end the run.
* ``stop``: the run ends.
* ``rollback``: the run returns to its newest checkpoint and draws other noise from there; more than
  ``limit`` returns to one checkpoint end the run. Before the first checkpoint: as ``skip``.

A loss that leaps was applied, for it has a gradient, and is counted; ``on_spike`` says if the run
also returns to its newest checkpoint.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

from jointseg_jax.config import NanConfig
from jointseg_jax.types import UserError

WINDOW = 200
LEAST = 10
_LISTED = 16

Losses = list[tuple[int, float, Any]]
"""(step, loss, records of the batch)."""

log = logging.getLogger(__name__)


class NonFinite(UserError):
    """The loss or a gradient was not finite, and the policy is to stop."""


class Spikes:
    """Finds losses of more than ``factor`` times the usual (0: none is), and counts them.

    The usual is the median of the last ``WINDOW`` losses of this launch that were no spikes; before
    ``LEAST`` of them are known nothing is one.
    """

    def __init__(self, factor: float | int):
        self._factor = factor
        self._before: deque[float] = deque(maxlen=WINDOW)
        self.count = 0

    def among(self, losses: Iterable[tuple[int, float, Any]]) -> Losses:
        """The spikes among the losses of further steps."""
        found = []
        for step, loss, records in losses:
            known = self._factor > 0 and len(self._before) >= LEAST
            # > 0: a loss that may be negative has no multiples of the usual
            if known and loss > self._factor * self.usual > 0:
                found.append((step, loss, records))
            else:
                self._before.append(loss)
        self.count += len(found)
        return found

    @property
    def usual(self) -> float:
        """The median that losses are compared with."""
        return statistics.median(self._before)


class Faults:
    """The policy of one run, and how often it has gone back to its newest checkpoint."""

    def __init__(self, config: NanConfig):
        self._policy, self._limit, self._on_spike = config.policy, config.limit, config.on_spike
        self.spikes = Spikes(config.spike)
        self._returns: tuple[int | None, int] = (None, 0)  # to which checkpoint, how often

    def go_back(self, bad: list[tuple[int, Any]], *, refused: int, saved: int | None) -> bool:
        """Returns True if the run is to return to its newest checkpoint.

        Args:
          bad: steps that were not finite, with the records of their batches; at least one.
          refused: updates refused in a row until now.
          saved: the step of the newest checkpoint.

        Raises:
          NonFinite: the run is to end.
        """
        step, records = bad[0]
        found = (
            f"step {step}: the loss or a gradient is not finite ({len(bad)} such steps in this "
            f"window; the update was not applied); records {_some(records)} were in the batch; "
            f"last checkpoint: {saved}"
        )
        if self._policy == "stop":
            raise _ending(found, "or set config.nan.policy to skip or rollback")
        if refused > self._limit:
            raise self._over_limit(f"{found}; {refused} updates in a row were refused")
        log.warning("%s", found)
        if self._policy != "rollback":
            return False
        if saved is None:
            log.warning("there is no checkpoint to go back to yet; the step is left out")
        return self._count_return(saved, found)

    def go_back_from(self, leaps: Losses, *, saved: int | None) -> bool:
        """``go_back`` for finite losses that have leapt (``Spikes.among``); at least one."""
        step, loss, records = leaps[0]
        found = (
            f"step {step}: the loss {loss:.3g} is {loss / self.spikes.usual:.0f} times the usual "
            f"({len(leaps)} such steps in this window, {self.spikes.count} in this launch); "
            f"records {_some(records)} were in the batch; last checkpoint: {saved}"
        )
        log.warning("%s", found)
        return self._on_spike == "rollback" and self._count_return(saved, found)

    def _count_return(self, saved: int | None, found: str) -> bool:
        """True if there is a step to go back to; raises once too many returns led there."""
        if saved is None:
            return False
        returns = self._returns[1] + 1 if self._returns[0] == saved else 1
        if returns > self._limit:
            raise self._over_limit(f"{found}, where the run has returned {self._limit} times")
        self._returns = (saved, returns)
        return True

    def _over_limit(self, found: str) -> NonFinite:
        return _ending(found, f"or raise config.nan.limit = {self._limit}")


def _some(records: Any) -> str:
    return ", ".join(map(str, records[:_LISTED])) + (", ..." if len(records) > _LISTED else "")


def _ending(found: str, remedy: str) -> NonFinite:
    return NonFinite(
        f"ERROR [train] {found}. Lower config.optimizer.schedule.lr, check these records, {remedy}."
    )

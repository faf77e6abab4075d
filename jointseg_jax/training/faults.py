"""What a run does about losses and gradients that are not finite, and about losses that leap.

The update has discarded them already (``step``); the policy says whether and where the run goes on.

* ``skip``: the step is left out; more than ``limit`` in a row end the run.
* ``stop``: the run ends.
* ``rollback``: the run goes back to its newest checkpoint and draws its noise anew from there; more
  than ``limit`` returns to one checkpoint end the run. Before the first checkpoint: as ``skip``.

A loss of more than ``spike`` times the usual (``spikes``) is counted and told; ``on_spike`` says
whether the run also goes back to its newest checkpoint, as ``rollback`` does.
"""

from __future__ import annotations

import logging
from typing import Any

from jointseg_jax.config import NanConfig
from jointseg_jax.training.spikes import Losses, Spikes
from jointseg_jax.types import UserError

_LISTED = 16

log = logging.getLogger(__name__)


class NonFinite(UserError):
    """The loss or a gradient was not finite, and the policy is to stop."""


class Faults:
    """The policy of one run, and how often it has gone back to its newest checkpoint."""

    def __init__(self, config: NanConfig):
        self._policy, self._limit, self._on_spike = config.policy, config.limit, config.on_spike
        self.spikes = Spikes(config.spike)
        self._returns: tuple[int | None, int] = (None, 0)  # to which checkpoint, how often

    def go_back(self, bad: list[tuple[int, Any]], *, refused: int, saved: int | None) -> bool:
        """Whether to return to the newest checkpoint; False means to go on as if nothing was.

        Args:
          bad: steps that were not finite, with the records of their batches; at least one.
          refused: updates refused in a row until now.
          saved: the step of the newest checkpoint.

        Raises:
          NonFinite: the run is to end.
        """
        found = _described(bad, saved)
        if self._policy == "stop":
            raise NonFinite(_last_words(found, "or set config.nan.policy to skip or rollback"))
        if refused > self._limit:
            found += f"; {refused} updates in a row were refused"
            raise NonFinite(_last_words(found, f"or raise config.nan.limit = {self._limit}"))
        log.warning("%s", found)
        if self._policy == "skip":
            return False
        if saved is None:
            log.warning("there is no checkpoint to go back to yet; the step is left out")
            return False
        self._return_to(saved, found)
        return True

    def go_back_from(self, leaps: Losses, *, saved: int | None) -> bool:
        """Whether to return to the newest checkpoint because a finite loss has leapt.

        Args:
          leaps: what ``spikes`` found in this window; at least one.
          saved: the step of the newest checkpoint.

        Raises:
          NonFinite: the run is to end.
        """
        step, loss, records = leaps[0]
        found = (
            f"step {step}: the loss {loss:.3g} is {loss / self.spikes.usual:.0f} times the usual "
            f"({len(leaps)} such steps in this window, {self.spikes.count} in this launch); "
            f"records {_some(records)} were in the batch; last checkpoint: {saved}"
        )
        log.warning("%s", found)
        if self._on_spike == "count" or saved is None:
            return False
        self._return_to(saved, found)
        return True

    def _return_to(self, saved: int, found: str) -> None:
        returns = self._returns[1] + 1 if self._returns[0] == saved else 1
        if returns > self._limit:
            found += f", where the run has returned {self._limit} times"
            raise NonFinite(_last_words(found, f"or raise config.nan.limit = {self._limit}"))
        self._returns = (saved, returns)


def _described(bad: list[tuple[int, Any]], saved: int | None) -> str:
    step, records = bad[0]
    return (
        f"step {step}: the loss or a gradient is not finite ({len(bad)} such steps in this window; "
        f"the update was not applied); records {_some(records)} were in the batch; last "
        f"checkpoint: {saved}"
    )


def _some(records: Any) -> str:
    return ", ".join(map(str, records[:_LISTED])) + (", ..." if len(records) > _LISTED else "")


def _last_words(found: str, remedy: str) -> str:
    return (
        f"ERROR [train] {found}. Lower config.optimizer.schedule.lr, check these records, {remedy}."
    )

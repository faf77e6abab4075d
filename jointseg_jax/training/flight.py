"""Steps in flight: handed to the devices and perhaps not done.

The host runs one step ahead of the devices and no further: the next batch is read while a step
runs, yet no more than two batches lie on the devices, and a request to stop waits for two steps.
So time that the host spends on input is lost only where the devices had nothing left to do.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax


@runtime_checkable
class Result(Protocol):
    """What a step gives at once and the devices fill in later, as jax.Array is."""

    def is_ready(self) -> bool:
        """Whether it is filled in."""
        ...

    def block_until_ready(self) -> Any:
        """Waits until it is."""
        ...


class InFlight:
    """The newest step, by its metrics."""

    def __init__(self) -> None:
        self._newest: Mapping[str, Result] = {}

    def busy(self) -> bool:
        """Whether the devices still work at the newest step."""
        return not all(x.is_ready() for x in self._newest.values())

    def add(self, metrics: Mapping[str, Result]) -> None:
        """Takes note of a step that was handed over, and waits for the one before it."""
        before, self._newest = self._newest, metrics
        jax.block_until_ready(before)

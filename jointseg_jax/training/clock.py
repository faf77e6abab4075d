"""The clock of a training loop: one object, told what the loop does, that feeds all time-keepers.

* ``goodput``: which phase the host's time went to, over all launches
* ``Telemetry``: speed, data wait, MFU and time left of the window between two log points
* ``Watchdog``: notices when no step has begun for long
* ``InFlight``: the host runs one step ahead of the devices and no further
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jointseg_jax import chips
from jointseg_jax.config import WatchdogConfig
from jointseg_jax.training.goodput import Goodput
from jointseg_jax.training.watchdog import Watchdog


class Clock:
    """Times one launch; a context manager around it.

    Args:
      steps, batch: of the run.
      watchdog: says when a standstill ends the launch.
      stacks: file for the stacks of all threads at a standstill.
      writes: True for the process that keeps the run's files.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        steps: int,
        batch: int,
        watchdog: WatchdogConfig,
        stacks: Path,
        writes: bool,
    ):
        self._goodput = Goodput(workdir, writes=writes)
        self._watchdog = Watchdog(watchdog, stacks=stacks, doing=lambda: self._goodput.phase)
        self._in_flight = InFlight()
        self._asked = 0.0  # when the loop began to ask for the batch
        self._new_window = functools.partial(Telemetry, total=steps, batch=batch)
        self.window = self._new_window(flops=None)

    def __enter__(self) -> Clock:
        self._watchdog.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.__exit__()

    def begin(self, step: int) -> None:
        """Notes the step that training goes on from, at the start or after going back."""
        self._goodput.begin(step)
        self.window = self._new_window(flops=self.window.flops)

    def compiled(self, flops: float | None) -> None:
        """Starts the first window: the program is there, and costs ``flops`` a step."""
        self._asked = time.perf_counter()
        self.window = self._new_window(flops=flops)

    def reading(self, step: int) -> None:
        """The loop asks for the batch of a step."""
        self._watchdog.alive(step)
        self._goodput.enter("data")
        self._asked = time.perf_counter()

    def stepping(self) -> None:
        """The batch is there: the step is handed to the devices next."""
        # While the devices still work at the step before, reading has cost no time.
        busy = self._in_flight.busy()
        self.window.waited(0.0 if busy else time.perf_counter() - self._asked)
        self._goodput.enter("step", behind=busy)

    def stepped(self, step: int, metrics: Mapping[str, Any], indices: np.ndarray) -> None:
        """A step was handed over; waits for the one before it, and keeps its metrics."""
        self.window.add(step, dict(metrics), indices)
        self._in_flight.add(metrics)

    @contextlib.contextmanager
    def aside(self, phase: str) -> Iterator[None]:
        """Work that is not training (``compile``, ``save``, ``evaluation``)."""
        start = time.perf_counter()
        self._goodput.enter(phase)
        yield
        self.window.exclude(time.perf_counter() - start)

    def logged(self, step: int) -> None:
        """Notes how far training has come, at a log point."""
        self._goodput.logged(step)

    def saved(self, step: int) -> None:
        """Notes how far training has come, at a save."""
        self._goodput.reached(step)


class InFlight:
    """The newest step that was handed to the devices, by its metrics.

    The host runs one step ahead of the devices and no further: the next batch is read while a step
    runs, yet at most two batches lie on the devices, and a request to stop waits for two steps.
    """

    def __init__(self) -> None:
        self._newest: Mapping[str, Any] = {}  # jax.Array, which the devices fill in later

    def busy(self) -> bool:
        """Returns True while the devices still work at the newest step."""
        return not all(x.is_ready() for x in self._newest.values())

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Takes note of a step that was handed over, and waits for the one before it."""
        before, self._newest = self._newest, metrics
        jax.block_until_ready(before)


class Telemetry:
    """Collects per-step metrics on the device and turns them into scalars at log points.

    Args:
      total: steps of the run.
      flops: of one step (3 x forward), or None when unknown.
    """

    def __init__(self, *, total: int, batch: int, flops: float | None):
        self._total, self._batch, self.flops = total, batch, flops
        self._peak = chips.peak_flops(jax.devices()[0].device_kind)
        self.losses: list[tuple[int, float, np.ndarray]] = []
        """(step, loss, record indices) of the finite steps that were read last."""
        self._pending: deque[tuple[int, dict[str, jax.Array], np.ndarray]] = deque()
        self._wait, self._steps, self._since = 0.0, 0, time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Adds time in which the devices had no batch to work on."""
        self._wait += seconds

    def add(self, step: int, metrics: dict[str, jax.Array], indices: np.ndarray) -> None:
        """Keeps one step's metrics on the device, with the record indices of its batch."""
        self._pending.append((step, metrics, indices))
        self._steps += 1

    def exclude(self, seconds: float | int) -> None:
        """Takes time that was not training out of the window."""
        self._since += seconds

    def read(self, *, leave: int = 1) -> tuple[dict[str, float], list[tuple[int, np.ndarray]]]:
        """Scalars of the window and the non-finite steps in it, with their record indices.

        The newest ``leave`` steps stay pending, so that reading does not wait for the step in
        flight; a window of one step is read all the same, or its line would have no loss.
        """
        count = max(len(self._pending) - leave, min(len(self._pending), 1))
        ready = [self._pending.popleft() for _ in range(count)]
        values = jax.device_get([metrics for _, metrics, _ in ready])
        finite = [bool(v.pop("finite")) for v in values]
        bad = [(step, ids) for (step, _, ids), ok in zip(ready, finite) if not ok]
        good = [(step, v, ids) for (step, _, ids), v, ok in zip(ready, values, finite) if ok]
        self.losses = [(step, float(v["loss"]), ids) for step, v, ids in good if "loss" in v]
        names = good[0][1] if good else {}
        scalars = {k: float(np.mean([v[k] for _, v, _ in good])) for k in names}
        return scalars | self._speed(ready[-1][0] if ready else 0), bad

    def _speed(self, step: int) -> dict[str, Any]:
        seconds = max(time.perf_counter() - self._since, 1e-9)
        per_step = seconds / max(self._steps, 1)
        out = {
            "images_per_second": self._batch / per_step,
            "step_ms": 1e3 * per_step,
            "data_wait": self._wait / seconds,
            "eta_seconds": per_step * (self._total - step - 1),
        }
        if self.flops:
            rate = self.flops / per_step / jax.device_count()
            out["gflops_per_chip"] = rate / 1e9
            if self._peak:
                out["mfu"] = rate / self._peak
        self._wait, self._steps, self._since = 0.0, 0, time.perf_counter()
        return out

"""What one log point says: mean metrics of a window, speed, data wait, MFU and time left."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import jax
import numpy as np

from jointseg_jax import chips


class Telemetry:
    """Collects per-step metrics on the device and turns them into scalars at log points.

    Args:
      total: steps of the run.
      batch: global batch size.
      flops: of one step (3 x forward), or None when unknown.

    Attributes:
      losses: (step, loss, record indices) of the finite steps that were read last.
    """

    def __init__(self, *, total: int, batch: int, flops: float | None):
        self._total, self._batch, self._flops = total, batch, flops
        self._peak = chips.peak_flops(jax.devices()[0].device_kind)
        self.losses: list[tuple[int, float, np.ndarray]] = []
        self._pending: deque[tuple[int, dict[str, jax.Array], np.ndarray]] = deque()
        self._wait, self._steps, self._since = 0.0, 0, time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Adds time in which the devices had nothing to do for want of a batch."""
        self._wait += seconds

    def add(self, step: int, metrics: dict[str, jax.Array], indices: np.ndarray) -> None:
        """Keeps one step's metrics on the device, with the record indices of its batch."""
        self._pending.append((step, metrics, indices))
        self._steps += 1

    def pause(self) -> float:
        """The clock, to give to ``resume`` after work that is not training."""
        return time.perf_counter()

    def resume(self, paused: float) -> None:
        """Takes the time since ``pause`` out of the window."""
        self._since += time.perf_counter() - paused

    def read(self, *, leave: int = 1) -> tuple[dict[str, float], list[tuple[int, np.ndarray]]]:
        """Scalars of the window and the non-finite steps in it, with their record indices.

        The newest ``leave`` steps stay pending, so that reading does not wait for the step in
        flight.
        """
        ready = [self._pending.popleft() for _ in range(max(len(self._pending) - leave, 0))]
        values = jax.device_get([metrics for _, metrics, _ in ready])
        finite = [bool(v.pop("finite")) for v in values]
        bad = [(step, ids) for (step, _, ids), ok in zip(ready, finite) if not ok]
        good = [v for v, ok in zip(values, finite) if ok]
        self.losses = [
            (step, float(v["loss"]), ids)
            for (step, _, ids), v, ok in zip(ready, values, finite)
            if ok and "loss" in v
        ]
        scalars = {k: float(np.mean([v[k] for v in good])) for k in (good[0] if good else {})}
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
        if self._flops:
            rate = self._flops / per_step / jax.device_count()
            out["gflops_per_chip"] = rate / 1e9
            if self._peak:
                out["mfu"] = rate / self._peak
        self._wait, self._steps, self._since = 0.0, 0, time.perf_counter()
        return out

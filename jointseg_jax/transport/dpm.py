"""DPM-Solver and DPM-Solver++ in continuous time.

Which grid, which orders in which sequence, and where the inner points lie; the updates themselves
are in ``exponential``.

Source: DPM-Solver (Lu et al. 2022), DPM-Solver++ (Lu et al. 2022), and the settings in which
U-ViT, UniDiffuser and PDM use them (``fast``, order 3, uniform in time, from 1 to 1/1000).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from jointseg_jax.transport.exponential import Point, multistep, point, singlestep, singular, span
from jointseg_jax.transport.integrator import Row
from jointseg_jax.transport.schedules import Schedule
from jointseg_jax.transport.solvers import Continuous

VARIANTS = ("dpm_solver", "taylor")
READINGS = ("data", "noise")
CURVATURES = ("published", "exact")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverPP(Continuous):
    """DPM-Solver++ (data readings) and DPM-Solver (noise readings) in continuous time.

    | method | steps of what order | network calls |
    |---|---|---|
    | fast | as many of ``order`` as fit on ``steps`` intervals, lower ones last | steps |
    | singlestep | ``steps // order`` of ``order``, inner points at equal parts of lambda | |
    | multistep | one per interval: 1, 2, .. up to ``order`` | steps |

    | grid | equal intervals in |
    |---|---|
    | time_uniform | t |
    | time_quadratic | sqrt(t) |
    | log_snr | lambda |

    Attributes:
      steps: network calls.
      variant: ``"dpm_solver"`` or ``"taylor"``; equation 4 of ``exponential``.
      reading: ``"data"`` or ``"noise"``.
      curvature: D2 of third-order multistep, ``"published"`` (as in the released code, second
        order in effect) or ``"exact"``, which pays on the ``log_snr`` grid and not on uneven ones.
      lower_order_final: whether multistep ends with lower orders (.., 2, 1).
      singular: a step of order above 1 next to an end with alpha or sigma 0 is an error
        (``"raise"``) or is done at first order (``"lower"``).
    """

    order: int = 3
    method: str = "fast"
    grid: str = "time_uniform"
    reading: str = "data"
    variant: str = "dpm_solver"
    curvature: str = "published"
    end: float = 1e-3
    lower_order_final: bool = False
    singular: str = "raise"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "order": (1, 2, 3),
            "method": ("fast", "singlestep", "multistep"),
            "grid": tuple(GRIDS),
            "reading": READINGS,
            "variant": VARIANTS,
            "curvature": CURVATURES,
            "singular": ("raise", "lower"),
        }
        for name, allowed in choices.items():
            choose("dpm_solver_pp", name, getattr(self, name), allowed)
        if self.method == "singlestep" and self.steps < self.order:
            raise ValueError(
                f"dpm_solver_pp: steps={self.steps}: singlestep of order {self.order} needs at "
                "least as many network calls; change `solver.steps` or `solver.order`."
            )

    def rows(self, schedule: Schedule, t_max: float) -> list[Row]:
        """Rows of all steps."""
        intervals = self.steps // self.order if self.method == "singlestep" else self.steps
        times = GRIDS[self.grid](schedule, *self.span(t_max), intervals)
        grid = [point(schedule, t) for t in times]
        if self.method == "multistep":
            return self._multistep(schedule, grid)
        steps = self._divided(schedule, grid) if self.method == "singlestep" else self._fast(grid)
        return [row for step in steps for row in self._single(schedule, step)]

    def _fast(self, grid: list[Point]) -> list[list[Point]]:
        """Consecutive pieces of the grid, one step each."""
        orders = fast_orders(self.steps, self.order)
        ends = np.cumsum([0, *orders])
        return [grid[a : b + 1] for a, b in itertools.pairwise(ends)]

    def _divided(self, schedule: Schedule, grid: list[Point]) -> list[list[Point]]:
        """Each interval with ``order - 1`` inner points at equal parts of lambda."""
        return [[s, *self._inner(schedule, s, t), t] for s, t in itertools.pairwise(grid)]

    def _inner(self, schedule: Schedule, s: Point, t: Point) -> list[Point]:
        if self.order == 1 or singular((s, t)):
            return []
        parts = np.linspace(s.log_snr, t.log_snr, self.order + 1)[1:-1]
        return [point(schedule, schedule.time_of(part)) for part in parts]

    def _single(self, schedule: Schedule, points: list[Point]) -> list[Row]:
        """One step, at first order over each interval if an end is singular and that is allowed."""
        order = self.order if self.method == "singlestep" else len(points) - 1
        if order > 1 and singular(points):
            self._refuse_singular(schedule, points, order)
            pairs = list(itertools.pairwise(points))
        else:
            pairs = [points]
        return [row for p in pairs for row in singlestep(self.reading, self.variant, p)]

    def _multistep(self, schedule: Schedule, grid: list[Point]) -> list[Row]:
        """One row per interval, with the readings of up to ``order`` grid points."""
        rows = []
        for i, (at, to) in enumerate(itertools.pairwise(grid)):
            order = min(i + 1, self.order)
            if self.lower_order_final:
                order = min(order, self.steps - i)
            if order > 1 and singular((at, to)):
                self._refuse_singular(schedule, [at, to], order)
                order = 1
            past = grid[i + 1 - order : i + 1][::-1]
            use = multistep(self.reading, self.variant, past, to, self.curvature)
            rows.append(Row(at.time, to.time, span(self.reading, at, to).x_coef, use))
        return [row._replace(reading=self.reading) for row in rows]

    def _refuse_singular(self, schedule: Schedule, points: list[Point], order: int) -> None:
        if self.singular == "raise":
            at = singular(points)
            raise ValueError(
                f"dpm_solver_pp: the step from t={points[0].time:g} to t={points[-1].time:g} has "
                f"order {order} and touches t={at.time:g}, where alpha={at.alpha:g} and "
                f"sigma={at.sigma:g} under {schedule}, so its log-SNR is infinite; move "
                "`solver.start` or `solver.end` off that time, or set solver.singular='lower' to "
                "take such a step at first order."
            )


def fast_orders(steps: int, order: int) -> list[int]:
    """Orders that add up to ``steps``: as many of ``order`` as fit, then lower ones.

    At order 3 the last step is never of order 3, so the end is approached in short steps.

    Source: DPM-Solver app. D.3 ("fast" version).
    """
    if order < 3:
        return [order] * (steps // order) + [1] * (steps % order)
    tail = {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
    return [3] * ((steps - sum(tail)) // 3) + tail


def choose(where: str, name: str, given: object, allowed: Sequence[object]) -> None:
    """Raises ValueError unless ``given`` is one of ``allowed``."""
    if given not in allowed:
        raise ValueError(
            f"{where}: {name}={given!r}: must be one of {', '.join(map(str, allowed))}; change "
            f"`solver.{name}`."
        )


def _time_uniform(schedule: Schedule, start: float, end: float, intervals: int) -> np.ndarray:
    return np.linspace(start, end, intervals + 1)


def _time_quadratic(schedule: Schedule, start: float, end: float, intervals: int) -> np.ndarray:
    grid = np.linspace(start**0.5, end**0.5, intervals + 1) ** 2
    grid[[0, -1]] = start, end
    return grid


def _log_snr(schedule: Schedule, start: float, end: float, intervals: int) -> np.ndarray:
    ends = schedule.log_snr(start), schedule.log_snr(end)
    if not np.all(np.isfinite(ends)):
        raise ValueError(
            f"dpm_solver_pp: grid='log_snr' from t={start:g} to t={end:g}: the log-SNR is "
            f"{ends[0]:g} and {ends[1]:g} there under {schedule} and must be finite; move "
            "`solver.start` or `solver.end` off that end, or choose grid='time_uniform'."
        )
    grid = schedule.time_of(np.linspace(*ends, intervals + 1))
    grid[[0, -1]] = start, end
    return grid


GRIDS = {"time_uniform": _time_uniform, "time_quadratic": _time_quadratic, "log_snr": _log_snr}

"""DPM-Solver and DPM-Solver++: exponential steps in the log-SNR.

Between times s and t, with lambda the half log-SNR and ``h = lambda_t - lambda_s``, the flow is

1. in data readings D (DPM-Solver++):
   ``x_t = (sigma_t / sigma_s) x_s + sigma_t int e^l D(l) dl``
2. in noise readings N (DPM-Solver):
   ``x_t = (alpha_t / alpha_s) x_s - alpha_t int e^-l N(l) dl``

the integrals over lambda from s to t. Both are one formula in a signed width u: ``u = -h`` with
gain ``g = alpha_t`` for data, ``u = h`` with ``g = sigma_t`` for noise. Let the reading be a
polynomial ``D(r) = D0 + D1 r + D2 r^2 / 2`` in the share r of the way from s to t; then

3. ``x_t = x_coef x_s - g psi_1 D0 - g psi_2 D1 - g psi_3 D2``,
   ``psi_1 = e^u - 1``, ``psi_2 = psi_1 / u - 1``, ``psi_3 = psi_2 / u - 1/2``.

What differs between methods is how D1 and D2 are estimated: from inner points (singlestep), or
from the readings of earlier steps (multistep). The step contains neither what the network predicts
nor the scale of the source, so any dict of streams is updated together, each by its own readings.

Source: DPM-Solver (Lu et al. 2022) algs. 1-2, app. D; DPM-Solver++ (Lu et al. 2022) algs. 1-2,
app. A-B; joint image and map updates, PDM eq. 5 and app. A (signs as derived above). U-ViT,
UniDiffuser and PDM use ``fast``, order 3, uniform in time, from 1 to 1/1000.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jointseg_jax.transport.integrator import Row
from jointseg_jax.transport.schedules import Numbers, Schedule
from jointseg_jax.transport.solvers import Continuous
from jointseg_jax.types import require_one_of, require_values

# ------------------------------------------------------------------------- one step


class Point(NamedTuple):
    """A time of one schedule, with what the steps need to know of it."""

    time: float
    log_snr: float  # infinite where alpha or sigma is 0
    alpha: float
    sigma: float


def point(schedule: Schedule, t: Numbers) -> Point:
    """The schedule's values at t."""
    t = float(t)
    return Point(t, *(float(f(t)) for f in (schedule.log_snr, schedule.alpha, schedule.sigma)))


class Span(NamedTuple):
    """The way from s to t in one reading."""

    x_coef: float  # weight of x_s
    gain: float  # g
    width: float  # the signed u; infinite at the ends of a schedule
    gain_start: float  # what ``gain`` is at s

    @property
    def first(self) -> float:
        """Weight of D0, ``-g psi_1``, exact where u is infinite."""
        if np.isinf(self.width):
            # to sigma = 0 it returns D0 (data); from alpha = 0, sigma_t x_s + alpha_t D0
            return self.gain - self.x_coef * self.gain_start
        return -self.gain * np.expm1(self.width)  # -g (e^u - 1)

    @property
    def second(self) -> float:
        """Weight of D1, ``-g psi_2``."""
        return -self.gain * (np.expm1(self.width) / self.width - 1)

    @property
    def third(self) -> float:
        """Weight of D2, ``-g psi_3``."""
        return -self.gain * ((np.expm1(self.width) / self.width - 1) / self.width - 0.5)

    def slope(self, variant: str) -> float:
        """Weight of D1 in a second-order update."""
        # psi_2 (taylor) or psi_1 / 2 (dpm_solver): both are u / 2 to first order
        return self.first / 2 if variant == "dpm_solver" else self.second


def span(reading: str, s: Point, t: Point) -> Span:
    """The way from s to t in ``"data"`` or ``"noise"`` readings."""
    h = t.log_snr - s.log_snr
    with np.errstate(divide="ignore", invalid="ignore"):
        if reading == "data":
            # (1) x_t = (sigma_t / sigma_s) x_s + ..: u = -h, g = alpha_t
            return Span(np.divide(t.sigma, s.sigma), t.alpha, -h, s.alpha)
        # (2) x_t = (alpha_t / alpha_s) x_s - ..: u = h, g = sigma_t
        return Span(np.divide(t.alpha, s.alpha), t.sigma, h, s.sigma)


def singlestep(reading: str, variant: str, points: Sequence[Point]) -> list[Row]:
    """The rows of one step from ``points[0]`` to ``points[-1]``; the order is their number less 1.

    Source: DPM-Solver++ alg. 1, DPM-Solver algs. 1 and 2.
    """
    start, *inner, end = points
    shares = [(p.log_snr - start.log_snr) / (end.log_snr - start.log_snr) for p in inner]
    rows = []
    for i, to in enumerate((*inner, end)):
        # (3) x_to = x_coef x_s - g psi_1 D0 - g psi_2 D1 - g psi_3 D2, always from the start
        way = span(reading, start, to)
        if i == 0:
            coefs = (way.first,)
        elif i == 1 and to is end:
            # D1 = (D(r1) - D0) / r1
            coefs = _rising(way.first, way.slope(variant) / shares[0])
        elif i == 1:
            # the same, as a share of the way to the second inner point: D1 = r2 (D(r1) - D0) / r1
            coefs = _rising(way.first, way.second * shares[1] / shares[0])
        elif variant == "dpm_solver":
            # drops D2, and takes D1 = (D(r2) - D0) / r2
            coefs = (way.second / shares[1], 0.0, way.first - way.second / shares[1])
        else:
            coefs = _curved(way, *shares)
        rows.append(Row(points[i].time, to.time, way.x_coef, coefs, 0.0, to is end, reading))
    return rows


def _rising(first: float, slope: float) -> tuple[float, ...]:
    """``first D0 + slope (D' - D0)`` as weights of (D', D0)."""
    return slope, first - slope


def _curved(way: Span, r1: float, r2: float) -> tuple[float, ...]:
    """The parabola through D0 and the readings at r1 and r2, as weights of (D(r2), D(r1), D0)."""
    start, at_r1, at_r2 = np.eye(3)[::-1]  # each reading as weights of the three
    rise1, rise2 = (at_r1 - start) / r1, (at_r2 - start) / r2
    d1 = (r2 * rise1 - r1 * rise2) / (r2 - r1)
    d2 = 2 * (rise2 - rise1) / (r2 - r1)
    return tuple(way.first * start + way.second * d1 + way.third * d2)


def multistep(
    reading: str, variant: str, points: Sequence[Point], to: Point, curvature: str = "published"
) -> tuple[float, ...]:
    """Weights of the readings at ``points`` (newest first) in the step to ``to``.

    The order is the number of points; the third always keeps psi_2.

    Source: DPM-Solver++ alg. 2 (2M), app. B of its code (3M).
    """
    way = span(reading, points[0], to)
    if len(points) == 1:
        return (way.first,)
    h = to.log_snr - points[0].log_snr
    readings = np.eye(len(points))  # each reading as weights of all of them
    gaps = [(a.log_snr - b.log_snr) / h for a, b in itertools.pairwise(points)]
    rises = [(a - b) / gap for a, b, gap in zip(readings, readings[1:], gaps)]
    if len(points) == 2:
        # D1 is the slope from the reading before
        return tuple(way.first * readings[0] + way.slope(variant) * rises[0])
    bend = (rises[0] - rises[1]) / (gaps[0] + gaps[1])
    d1 = rises[0] + gaps[0] * bend
    # the released code takes half the second derivative of the parabola through the three
    # readings, which leaves an error of second order; ``exact`` takes all of it
    d2 = bend if curvature == "published" else 2 * bend
    return tuple(way.first * readings[0] + way.second * d1 + way.third * d2)


def singular(points: Sequence[Point]) -> Point | None:
    """The first of the points at which the log-SNR is infinite."""
    return next((p for p in points if np.isinf(p.log_snr)), None)


# ------------------------------------------------------------------------- all steps


def _time_uniform(schedule: Schedule, start: float, end: float, intervals: int) -> np.ndarray:
    return np.linspace(start, end, intervals + 1)


def _time_quadratic(schedule: Schedule, start: float, end: float, intervals: int) -> np.ndarray:
    grid = np.linspace(start**0.5, end**0.5, intervals + 1) ** 2
    grid[[0, -1]] = start, end  # exactly: the square of a root is rounded
    return grid


def _log_snr(schedule: Schedule, start: float, end: float, intervals: int) -> np.ndarray:
    ends = schedule.log_snr(start), schedule.log_snr(end)
    if not np.all(np.isfinite(ends)):
        raise ValueError(
            f"solver: grid='log_snr' from t={start:g} to t={end:g}: the log-SNR is "
            f"{ends[0]:g} and {ends[1]:g} there under {schedule} and must be finite; move "
            "`solver.start` or `solver.end` off that end, or choose grid='time_uniform'."
        )
    grid = schedule.time_of(np.linspace(*ends, intervals + 1))
    grid[[0, -1]] = start, end
    return grid


GRIDS = {"time_uniform": _time_uniform, "time_quadratic": _time_quadratic, "log_snr": _log_snr}
CHOICES = {
    "order": (1, 2, 3),
    "method": ("fast", "singlestep", "multistep"),
    "grid": tuple(GRIDS),
    "reading": ("data", "noise"),
    "variant": ("dpm_solver", "taylor"),
    "curvature": ("published", "exact"),
    "singular": ("raise", "lower"),
}


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
    """

    order: int = 3
    method: str = "fast"
    grid: str = "time_uniform"
    reading: str = "data"  # "data" (DPM-Solver++) or "noise" (DPM-Solver)
    variant: str = "dpm_solver"  # the weight of D1 at second order: psi_1 / 2, or "taylor": psi_2
    curvature: str = "published"
    """D2 of third-order multistep: ``"published"`` (as in the released code, second order in
    effect) or ``"exact"``, which pays on the ``log_snr`` grid and not on uneven ones."""
    end: float = 1e-3
    lower_order_final: bool = False  # multistep ends with lower orders (.., 2, 1)
    singular: str = "raise"
    """A step of order above 1 next to an end with alpha or sigma 0 is an error (``"raise"``) or is
    done at first order (``"lower"``)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in CHOICES.items():
            value, where = getattr(self, name), f"dpm_solver_pp: {name}"
            require_one_of(where, value, allowed, f"Change `solver.{name}`.")
        enough = self.method != "singlestep" or self.steps >= self.order
        rule = f"singlestep of order {self.order} needs at least as many network calls; change "
        rule += "`solver.steps` or `solver.order`."
        require_values("dpm_solver_pp", enough, rule, steps=self.steps)

    def rows(self, schedule: Schedule, t_max: float) -> list[Row]:
        """Rows of all steps."""
        intervals = self.steps // self.order if self.method == "singlestep" else self.steps
        times = GRIDS[self.grid](schedule, *self.time_range(t_max), intervals)
        grid = [point(schedule, t) for t in times]
        if self.method == "multistep":
            return self._multistep(schedule, grid)
        steps = self._divided(schedule, grid) if self.method == "singlestep" else self._fast(grid)
        return [row for step in steps for row in self._single(schedule, step)]

    def _fast(self, grid: list[Point]) -> list[list[Point]]:
        """Consecutive pieces of the grid, one step each."""
        ends = np.cumsum([0, *fast_orders(self.steps, self.order)])
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
        pieces: list[Sequence[Point]] = [points]
        if order > 1 and self._is_lowered(schedule, points, order):
            pieces = list(itertools.pairwise(points))
        return [row for p in pieces for row in singlestep(self.reading, self.variant, p)]

    def _multistep(self, schedule: Schedule, grid: list[Point]) -> list[Row]:
        """One row per interval, with the readings of up to ``order`` grid points."""
        rows = []
        for i, (at, to) in enumerate(itertools.pairwise(grid)):
            order = min(i + 1, self.order)
            if self.lower_order_final:
                order = min(order, self.steps - i)
            if order > 1 and self._is_lowered(schedule, [at, to], order):
                order = 1
            past = grid[i + 1 - order : i + 1][::-1]
            coefs = multistep(self.reading, self.variant, past, to, self.curvature)
            x_coef = span(self.reading, at, to).x_coef
            rows.append(Row(at.time, to.time, x_coef, coefs, reading=self.reading))
        return rows

    def _is_lowered(self, schedule: Schedule, points: list[Point], order: int) -> bool:
        """Returns True for a step at an infinite log-SNR, if such steps may be of first order."""
        at = singular(points)
        if at is not None and self.singular == "raise":
            raise ValueError(
                f"dpm_solver_pp: the step from t={points[0].time:g} to t={points[-1].time:g} has "
                f"order {order} and touches t={at.time:g}, where alpha={at.alpha:g} and "
                f"sigma={at.sigma:g} under {schedule}, so its log-SNR is infinite; move "
                "`solver.start` or `solver.end` off that time, or set solver.singular='lower' to "
                "take such a step at first order."
            )
        return at is not None


def fast_orders(steps: int, order: int) -> list[int]:
    """Orders that add up to ``steps``: as many of ``order`` as fit, then lower ones.

    Source: DPM-Solver app. D.3 ("fast" version).
    """
    if order < 3:
        return [order] * (steps // order) + [1] * (steps % order)
    # the last step is never of order 3, so the end is approached in short steps
    tail = {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
    return [3] * ((steps - sum(tail)) // 3) + tail

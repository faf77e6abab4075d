"""Exponential steps in the log-SNR: the updates of DPM-Solver and DPM-Solver++.

Between times s and t, with lambda the half log-SNR and ``h = lambda_t - lambda_s``, the flow is

1. in data readings D (DPM-Solver++):
   ``x_t = (sigma_t / sigma_s) x_s + sigma_t int e^l D(l) dl``
2. in noise readings N (DPM-Solver):
   ``x_t = (alpha_t / alpha_s) x_s - alpha_t int e^-l N(l) dl``

the integrals over lambda from s to t. Both are one formula in a signed width u: ``u = -h`` with
gain ``g = alpha_t`` for data, ``u = h`` with ``g = sigma_t`` for noise. Let the reading be a
polynomial ``D(r) = D0 + D1 r + D2 r^2 / 2`` in the share r of the way from s to t; then

3. ``x_t = keep x_s - g psi_1 D0 - g psi_2 D1 - g psi_3 D2``,
   ``psi_1 = e^u - 1``, ``psi_2 = psi_1 / u - 1``, ``psi_3 = psi_2 / u - 1/2``.

What differs between methods is how D1 and D2 are estimated: from inner points (singlestep), or
from the readings of earlier steps (multistep).

4. The second-order update of variant ``dpm_solver`` puts ``psi_1 / 2`` for ``psi_2``; variant
   ``taylor`` keeps ``psi_2``. At third order ``dpm_solver`` drops D2 and takes D1 over r2.
5. A first-order step is exact in the limits: to sigma = 0 it returns D0 (data), from alpha = 0 it
   is ``sigma_t x_s + alpha_t D0``.

The step contains neither what the network predicts nor the scale of the source, so any dict of
streams is updated together, each through its own readings.

Source: DPM-Solver (Lu et al. 2022) algs. 1-2, app. D; DPM-Solver++ (Lu et al. 2022) algs. 1-2,
app. A-B; joint image and map updates, PDM eq. 5 and app. A (signs as derived above).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jointseg_jax.transport.integrator import Row
from jointseg_jax.transport.schedules import Schedule


class Point(NamedTuple):
    """A time of one schedule, with what the steps need to know of it."""

    time: float
    log_snr: float
    alpha: float
    sigma: float


def point(schedule: Schedule, t: float) -> Point:
    """The schedule's values at t."""
    t = float(t)
    return Point(t, *(float(f(t)) for f in (schedule.log_snr, schedule.alpha, schedule.sigma)))


class Span(NamedTuple):
    """The way from s to t in one reading: equations 1-3."""

    x_coef: float
    gain: float
    width: float  # the signed u; infinite at the ends of a schedule
    gain_start: float  # what ``gain`` is at s

    @property
    def first(self) -> float:
        """Weight of D0, exact where u is infinite.  Source: equation 5."""
        if np.isinf(self.width):
            return self.gain - self.x_coef * self.gain_start
        return -self.gain * np.expm1(self.width)

    @property
    def second(self) -> float:
        """Weight of D1, ``-g psi_2``."""
        return -self.gain * (np.expm1(self.width) / self.width - 1)

    @property
    def third(self) -> float:
        """Weight of D2, ``-g psi_3``."""
        return -self.gain * ((np.expm1(self.width) / self.width - 1) / self.width - 0.5)

    def slope(self, variant: str) -> float:
        """Weight of D1 in a second-order update.  Source: equation 4."""
        return self.first / 2 if variant == "dpm_solver" else self.second


def span(reading: str, s: Point, t: Point) -> Span:
    """The integrator from s to t.  Source: equations 1 and 2."""
    width = t.log_snr - s.log_snr
    with np.errstate(divide="ignore", invalid="ignore"):
        if reading == "data":
            return Span(np.divide(t.sigma, s.sigma), t.alpha, -width, s.alpha)
        return Span(np.divide(t.alpha, s.alpha), t.sigma, width, s.sigma)


def singlestep(reading: str, variant: str, points: Sequence[Point]) -> list[Row]:
    """The rows of one step from ``points[0]`` to ``points[-1]``; the order is their number less 1.

    Source: equation 3 with inner points; DPM-Solver++ alg. 1, DPM-Solver algs. 1 and 2.
    """
    start, *inner, end = points
    shares = [(p.log_snr - start.log_snr) / (end.log_snr - start.log_snr) for p in inner]
    rows = []
    for i, to in enumerate((*inner, end)):
        way = span(reading, start, to)
        if i == 0:
            use = (way.first,)
        elif i == 1 and to is end:
            use = _rising(way.first, way.slope(variant) / shares[0])
        elif i == 1:  # D1 of the way to the second inner point
            use = _rising(way.first, way.second * shares[1] / shares[0])
        elif variant == "dpm_solver":
            use = (way.second / shares[1], 0.0, way.first - way.second / shares[1])
        else:
            use = _curved(way, *shares)
        rows.append(Row(points[i].time, to.time, way.x_coef, use, 0.0, to is end, reading))
    return rows


def _rising(first: float, slope: float) -> tuple[float, ...]:
    """``first D0 + slope (D' - D0)`` as weights of (D', D0)."""
    return slope, first - slope


def _curved(way: Span, r1: float, r2: float) -> tuple[float, ...]:
    """The parabola through D0 and the readings at r1 and r2, as weights of (D(r2), D(r1), D0)."""
    start, at_r1, at_r2 = np.eye(3)[::-1]
    rise1, rise2 = (at_r1 - start) / r1, (at_r2 - start) / r2
    d1 = (r2 * rise1 - r1 * rise2) / (r2 - r1)
    d2 = 2 * (rise2 - rise1) / (r2 - r1)
    return tuple(way.first * start + way.second * d1 + way.third * d2)


def multistep(
    reading: str, variant: str, points: Sequence[Point], to: Point, curvature: str = "published"
) -> tuple[float, ...]:
    """Weights of the readings at ``points`` (newest first) in the step to ``to``.

    The order is the number of points; the third always keeps psi_2. Its ``published`` D2 is half
    the second derivative of the parabola through the three readings, which leaves an error of
    second order; ``exact`` takes all of it.

    Source: equation 3 with past points; DPM-Solver++ alg. 2 (2M), app. B of its code (3M).
    """
    way = span(reading, points[0], to)
    if len(points) == 1:
        return (way.first,)
    h = to.log_snr - points[0].log_snr
    readings = np.eye(len(points))
    gaps = [(a.log_snr - b.log_snr) / h for a, b in itertools.pairwise(points)]
    rises = [(a - b) / gap for a, b, gap in zip(readings, readings[1:], gaps)]
    if len(points) == 2:
        return tuple(way.first * readings[0] + way.slope(variant) * rises[0])
    bend = (rises[0] - rises[1]) / (gaps[0] + gaps[1])
    d1 = rises[0] + gaps[0] * bend
    d2 = bend if curvature == "published" else 2 * bend
    return tuple(way.first * readings[0] + way.second * d1 + way.third * d2)


def singular(points: Sequence[Point]) -> Point | None:
    """The first of the points at which the log-SNR is infinite."""
    return next((p for p in points if np.isinf(p.log_snr)), None)

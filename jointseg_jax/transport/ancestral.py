"""Ancestral sampling in continuous time: DDIM with fresh noise, on a grid of its own.

From time t to an earlier s, with lambda the half log-SNR and D the data reading:

1. Given x_t and the data, x_s is normal with variance
   ``v^2 = sigma_s^2 (1 - (alpha_t sigma_s)^2 / (alpha_s sigma_t)^2)
   = -sigma_s^2 expm1(2 (lambda_t - lambda_s))``, for any alpha and sigma.
2. ``x_s = alpha_s D + sqrt(sigma_s^2 - eta^2 v^2) (x_t - alpha_t D) / sigma_t + eta v n``

n is drawn like the source, ``scale`` and all, so 1 and 2 do not contain it. Whatever eta, a state
``alpha_t D + sigma_t n`` of the true data becomes ``alpha_s D + sigma_s n``; at eta 1 errors of
early steps are forgotten, at eta 0 they are kept. The step to t = 0 returns D.

Source: DDIM (Song et al. 2020) eqs. 12 and 16, there for variance-preserving schedules; variance
of the posterior for any schedule, variational diffusion models (Kingma et al. 2021) app. A.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from jointseg_jax.transport.dpm import GRIDS, Point, point
from jointseg_jax.transport.integrator import Row
from jointseg_jax.transport.schedules import Schedule
from jointseg_jax.transport.solvers import CHANGE_TIMES, Continuous
from jointseg_jax.types import require_one_of, require_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(Continuous):
    """DDIM on any schedule, by default as noisy as the posterior; ``steps`` network calls.

    | grid | equal intervals in |
    |---|---|
    | time_uniform | t |
    | time_quadratic | sqrt(t): shorter steps near the data end |
    | log_snr | lambda; it needs an ``end`` above 0 |
    """

    eta: float = 1.0  # fresh noise: 1 is the posterior's (DDPM), 0 none (DDIM)
    grid: str = "time_uniform"  # or "time_quadratic", "log_snr"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("ancestral: grid", self.grid, tuple(GRIDS), "Change `solver.grid`.")
        rule = "must be in [0, 1]; change `solver.eta`."
        require_values("ancestral", 0 <= self.eta <= 1, rule, eta=self.eta)
        rule = f"it steps towards the data only, so start must be above end; {CHANGE_TIMES}."
        good = self.start is None or self.start > self.end
        require_values("ancestral", good, rule, start=self.start, end=self.end)

    def rows(self, schedule: Schedule, t_max: float) -> list[Row]:
        """One row per step."""
        times = GRIDS[self.grid](schedule, *self.time_range(t_max), self.steps)
        points = [point(schedule, t) for t in times]
        return [ancestral_row(at, to, self.eta) for at, to in itertools.pairwise(points)]


def ancestral_row(at: Point, to: Point, eta: float) -> Row:
    """One step from a time to an earlier one, with a share eta of the posterior's deviation."""
    # (1) v^2 / sigma_s^2 = 1 - e^(2 (lambda_t - lambda_s)), exact where either is infinite
    spread = -np.expm1(2 * (at.log_snr - to.log_snr))
    # (2) x_s = alpha_s D + sqrt(sigma_s^2 - eta^2 v^2) (x_t - alpha_t D) / sigma_t + eta v n
    x_coef = to.sigma * np.sqrt(1 - eta**2 * spread) / at.sigma
    noise = eta * to.sigma * np.sqrt(spread)
    return Row(at.time, to.time, x_coef, (to.alpha - x_coef * at.alpha,), noise)

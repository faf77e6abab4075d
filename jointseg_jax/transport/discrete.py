"""Samplers on the knots of a discrete schedule, in the conventions of diffusers.

A label n in 0 .. N-1 is the knot ``t = (n + 1) / N``, whose alpha^2 is ``alphas_cumprod[n]``; t = 0
is the clean end. In formulas (a, s) are alpha and sigma at a step's label and (a', s') at the one
it goes to, D the data reading and n standard normal.

DDIM and DDPM always go N // steps labels down, whatever the spacing; past label 0 lies the clean
end (or, for DDIM without ``set_alpha_to_one``, label 0).

| spacing | labels of DDIM and DDPM | labels of MultistepDPM |
|---|---|---|
| linspace | linspace(0, N-1, steps) | linspace(0, N-1, steps + 1) without 0 |
| leading | (0 .. steps-1) (N // steps) + offset | (1 .. steps) (N // (steps + 1)) + offset |
| trailing | N - (0 .. steps-1) N / steps - 1 | the same |

all rounded, in falling order.

Source: DDIM (Song et al. 2020) eqs. 12, 16; DDPM (Ho et al. 2020) eqs. 6-7; DPM-Solver++
(Lu et al. 2022) alg. 2; Karras et al. 2022 eq. 5; spacings, Lin et al. 2023 table 2.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from jointseg_jax.transport.dpm import Point, multistep, point, span
from jointseg_jax.transport.integrator import Row
from jointseg_jax.transport.schedules import ScaledLinear, Schedule
from jointseg_jax.transport.solvers import FixedStepSolver
from jointseg_jax.types import require_one_of, require_values

SPACINGS = ("linspace", "leading", "trailing")
KARRAS_RHO = 7.0
"""Karras et al.'s rho: the larger, the shorter the steps near the clean end."""


def knot(schedule: ScaledLinear, label: int) -> float:
    """The time of a label; below 0 the clean end."""
    return (label + 1) / schedule.steps if label >= 0 else 0.0


def labels(total: int, steps: int, spacing: str, offset: int, *, skip_last: bool) -> list[int]:
    """The labels of a spacing, falling; with ``skip_last`` those of MultistepDPM."""
    count = steps + skip_last
    if spacing == "linspace":
        spaced = np.linspace(0, total - 1, count)[::-1][:steps]
    elif spacing == "leading":
        spaced = (np.arange(count) * (total // count))[::-1][:steps] + offset
    else:
        # rounded before the 1 is taken off, as diffusers does: halves go to even numbers
        spaced = np.round(total - np.arange(steps) * (total / steps)) - 1
    rounded = np.round(spaced).astype(int).tolist()
    first = f"the first label is {rounded[0]} and must be below {total}"
    given = {"spacing": spacing, "steps_offset": offset, "steps": steps}
    require_values("solver", rounded[0] < total, f"{first}; change `solver.steps_offset`.", **given)
    return rounded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discrete(FixedStepSolver):
    """A sampler on the labels of a discrete schedule, ``steps`` network calls."""

    spacing: str = "leading"  # which labels: "linspace", "leading" or "trailing"
    steps_offset: int = 0  # added to the labels of ``leading``

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("solver: spacing", self.spacing, SPACINGS, "Change `solver.spacing`.")
        given = {"steps": self.steps, "steps_offset": self.steps_offset}
        rule = "at least one step and an offset of at least 0 are needed; change them in `solver`."
        require_values("solver", self.steps >= 1 and self.steps_offset >= 0, rule, **given)

    def knots(
        self, schedule: Schedule, *, skip_last: bool = False
    ) -> tuple[ScaledLinear, list[int]]:
        """The schedule, which must have labels, and those that the sampler stands on."""
        if not isinstance(schedule, ScaledLinear):
            raise ValueError(
                f"solver: {type(self).__name__} steps on the knots of scaled_linear and the stream "
                f"has {schedule}; change the stream's schedule, or the solver to dpm_solver_pp, "
                "euler or heun."
            )
        count = schedule.steps
        rule = f"{schedule} has {count} labels, too few; change `solver.steps`."
        require_values("solver", self.steps + skip_last <= count, rule, steps=self.steps)
        own = (self.steps, self.spacing, self.steps_offset)
        return schedule, labels(count, *own, skip_last=skip_last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(Discrete):
    """DDIM, deterministic at ``eta = 0`` and as noisy as DDPM at ``eta = 1``."""

    eta: float = 0.0
    set_alpha_to_one: bool = True  # the last step goes to the clean end rather than to label 0

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = "must be in [0, 1]; change `solver.eta`."
        require_values("ddim", 0 <= self.eta <= 1, rule, eta=self.eta)

    def rows(self, schedule: Schedule, t_max: float) -> list[Row]:
        """One row per label."""
        scaled, from_labels = self.knots(schedule)
        stride = scaled.steps // self.steps
        last = 0.0 if self.set_alpha_to_one else knot(scaled, 0)
        ends = [knot(scaled, n - stride) or last for n in from_labels]
        return [
            ddim_row(point(scaled, knot(scaled, n)), point(scaled, end), self.eta)
            for n, end in zip(from_labels, ends)
        ]


def ddim_row(at: Point, to: Point, eta: float) -> Row:
    """One step of DDIM, or with ``eta`` above 0 of its noisy kin."""
    # x' = a' D + sqrt(s'^2 - v^2) (x - a D) / s + v n, v = eta (s' / s) sqrt(1 - (a / a')^2)
    noise = eta * (to.sigma / at.sigma) * np.sqrt(1 - (at.alpha / to.alpha) ** 2)
    x_coef = np.sqrt(to.sigma**2 - noise**2) / at.sigma
    return Row(at.time, to.time, x_coef, (to.alpha - x_coef * at.alpha,), noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(Discrete):
    """Ancestral sampling."""

    variance: str = "fixed_small"  # or "fixed_large": the posterior's variance, or beta

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = ("fixed_small", "fixed_large")
        require_one_of("ddpm: variance", self.variance, allowed, "Change `solver.variance`.")

    def rows(self, schedule: Schedule, t_max: float) -> list[Row]:
        """One row per label."""
        scaled, from_labels = self.knots(schedule)
        stride = scaled.steps // self.steps
        return [ddpm_row(scaled, n, n - stride, self.variance) for n in from_labels]


def ddpm_row(schedule: ScaledLinear, label: int, previous: int, variance: str) -> Row:
    """One step of DDPM from a label to a previous one (below 0: the clean end)."""
    at, to = (point(schedule, knot(schedule, n)) for n in (label, previous))
    # x' = (a' b / s^2) D + (a s'^2 / (a' s^2)) x + v n, b = 1 - (a / a')^2; no noise at label 0
    beta = 1 - (at.alpha / to.alpha) ** 2
    rest = (to.sigma / at.sigma) ** 2
    spread = beta * rest if variance == "fixed_small" else beta  # v^2 = b s'^2 / s^2, or b
    x_coef, coef = at.alpha / to.alpha * rest, to.alpha * beta / at.sigma**2
    return Row(at.time, to.time, x_coef, (coef,), np.sqrt(spread) if label > 0 else 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultistepDPM(Discrete):
    """Multistep DPM-Solver(++) between labels, order 1, 2, .. up to ``order``."""

    spacing: str = "linspace"
    order: int = 2
    algorithm: str = "dpmsolver++"  # data readings, or "dpmsolver": noise readings
    solver_type: str = "midpoint"  # ``dpm``'s variant "dpm_solver", or "heun": "taylor"
    final_sigmas: str = "zero"
    """The last step goes to the clean end (``"zero"``, then at first order) or to label 0
    (``"sigma_min"``)."""
    karras: bool = False  # steps of equal size in sigma^(1/7); the network sees the nearest label
    lower_order_final: bool = True  # below 15 steps, the last two have orders 2 and 1
    euler_at_final: bool = False  # the last step has order 1

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "order": (1, 2, 3),
            "algorithm": ("dpmsolver++", "dpmsolver"),
            "solver_type": ("midpoint", "heun"),
            "final_sigmas": ("zero", "sigma_min"),
        }
        for name, allowed in choices.items():
            value, where = getattr(self, name), f"multistep_dpm: {name}"
            require_one_of(where, value, allowed, f"Change `solver.{name}`.")

    def rows(self, schedule: Schedule, t_max: float) -> list[Row]:
        """One row per step."""
        scaled, from_labels = self.knots(schedule, skip_last=True)
        times, t_network = [knot(scaled, n) for n in from_labels], [None] * self.steps
        if self.karras:
            times, t_network = karras_times(scaled, self.steps)
        end = 0.0 if self.final_sigmas == "zero" else knot(scaled, 0)
        points = [point(scaled, t) for t in (*times, end)]
        reading = "data" if self.algorithm == "dpmsolver++" else "noise"
        variant = "dpm_solver" if self.solver_type == "midpoint" else "taylor"
        rows = []
        for i, (at, to) in enumerate(itertools.pairwise(points)):
            past = points[i + 1 - self._order(i) : i + 1][::-1]  # newest first
            coefs = multistep(reading, variant, past, to)
            x_coef = span(reading, at, to).x_coef
            row = Row(at.time, to.time, x_coef, coefs, reading=reading, t_network=t_network[i])
            rows.append(row)
        return rows

    def _order(self, i: int) -> int:
        """The order of step i: what earlier readings allow, lowered towards the end."""
        left = self.steps - i
        short = self.lower_order_final and self.steps < 15
        # a step to sigma = 0 has an infinite width: only first order is finite there
        if left == 1 and (short or self.euler_at_final or self.final_sigmas == "zero"):
            return 1
        return min(i + 1, self.order, left if short else self.order)


def karras_times(schedule: ScaledLinear, steps: int) -> tuple[list[float], list[float]]:
    """Times at equal distances in sigma^(1/rho), and the nearest knots, which the network sees."""
    knots = np.arange(1, schedule.steps + 1) / schedule.steps
    spread = -schedule.log_snr(knots)  # log(sigma / alpha), [schedule.steps]
    first, last = np.exp(spread[[-1, 0]] / KARRAS_RHO)
    wanted = KARRAS_RHO * np.log(np.linspace(first, last, steps))  # log of sigma / alpha, [steps]
    nearest = np.round(np.interp(wanted, spread, np.arange(schedule.steps))).astype(int).tolist()
    return schedule.time_of(-wanted).tolist(), [knot(schedule, n) for n in nearest]

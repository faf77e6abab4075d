"""Noise schedules: how much data and how much source a state holds at a time t in [0, 1].

1. ``x_t = alpha(t) data + sigma(t) source``; t = 0 is the data end, t = 1 the source end.
2. ``lambda(t) = log(alpha(t) / sigma(t))``, the half log-SNR, falls strictly with t;
   ``time_of`` is its inverse.
3. ``velocity = d_data(t) data + d_source(t) source`` is what a velocity network predicts. Every
   schedule obeys ``alpha d_source - sigma d_data = 1``, so that (x, velocity) gives back
   ``data = d_source x - sigma velocity`` and ``source = alpha velocity - d_data x``.
4. Variance preserving (``alpha^2 + sigma^2 = 1``): ``d_data = -sigma``, ``d_source = alpha``;
   with ``l = log alpha``: ``alpha' = alpha l'`` and ``sigma' = -alpha^2 l' / sigma``.

Every method takes numbers or numpy arrays, and then computes in float64 on the host, or JAX
arrays, and then computes in their dtype.

A *label* is the number that a network sees in place of t:

| schedule | label | which alpha-bar it stands for |
|---|---|---|
| scaled_linear, time_offset 1 | 1000 t, in 1 .. 1000 | abar_n = prod_{i <= n} (1 - beta_i) |
| scaled_linear, time_offset 0 | 1000 t - 1, in 0 .. 999 | alphas_cumprod[n] = abar_{n+1} |
| the others | 1000 t | |

Source: DDPM (Ho et al. 2020) eq. 4; DPM-Solver (Lu et al. 2022) app. D; progressive distillation
(Salimans & Ho 2022) app. D for the velocity; rectified flow (Liu et al. 2022) eq. 1.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax.types import require_values

if TYPE_CHECKING:  # a static checker finds no operators on the union
    Numbers: TypeAlias = Any
else:
    Numbers = int | float | np.ndarray | np.generic | jax.Array
"""A number or a numpy array (computed on the host in float64), or a JAX array (in its dtype)."""

LABELS = 1000  # networks are shown t as a number of this range
PLACE = "in the schedule's config"

Method = TypeVar("Method", bound=Callable[..., Any])


@runtime_checkable
class Schedule(Protocol):
    """What processes, solvers and systems ask of a schedule."""

    @property
    def t_max(self) -> float: ...
    def log_alpha(self, t: Numbers) -> Numbers: ...
    def alpha(self, t: Numbers) -> Numbers: ...
    def sigma(self, t: Numbers) -> Numbers: ...
    def log_snr(self, t: Numbers) -> Numbers: ...
    def time_of(self, log_snr: Numbers) -> Numbers: ...
    def velocity_weights(self, t: Numbers) -> tuple[Numbers, Numbers]: ...
    def derivative(self, t: Numbers) -> tuple[Numbers, Numbers]: ...
    def label(self, t: Numbers) -> Numbers: ...
    def time(self, label: Numbers) -> Numbers: ...


def _module(t: Numbers) -> tuple[ModuleType, Any]:
    """The array module to compute with, and ``t`` as its array."""
    # numpy's float64 by hand: under jax's default settings jnp would compute in float32
    return (jnp, t) if isinstance(t, jax.Array) else (np, np.asarray(t, np.float64)[()])


def _quiet(method: Method) -> Method:
    """Lets numpy reach the infinities at the ends (sigma = 0, alpha = 0) without warning."""
    return np.errstate(divide="ignore", invalid="ignore")(method)


class ThousandLabels:
    """Labels are 1000 t."""

    def label(self, t: Numbers) -> Numbers:
        """The number that a network sees for t."""
        return LABELS * _module(t)[1]

    def time(self, label: Numbers) -> Numbers:
        """The time of a network's number."""
        return _module(label)[1] / LABELS


class VariancePreserving(ThousandLabels, abc.ABC):
    """Everything that follows from ``log_alpha``, its slope and its inverse."""

    t_max: float

    @abc.abstractmethod
    def log_alpha(self, t: Numbers) -> Numbers:
        """log alpha(t)."""

    @abc.abstractmethod
    def _slope(self, t: Numbers) -> Numbers:
        """d log alpha / dt."""

    @abc.abstractmethod
    def _time_at(self, log_alpha: Numbers) -> Numbers:
        """The time at which log alpha has this value."""

    def alpha(self, t: Numbers) -> Numbers:
        """Weight of the data."""
        xp, t = _module(t)
        return xp.exp(self.log_alpha(t))

    def sigma(self, t: Numbers) -> Numbers:
        """Weight of the source, sqrt(1 - alpha^2) without cancellation near t = 0."""
        xp, t = _module(t)
        # (4) sigma^2 = 1 - alpha^2 = -expm1(2 l); 0.0 - x, since -x would be -0.0 at t = 0
        return xp.sqrt(0.0 - xp.expm1(2 * self.log_alpha(t)))

    @_quiet
    def log_snr(self, t: Numbers) -> Numbers:
        """lambda(t) = log(alpha / sigma), inf at t = 0."""
        xp, t = _module(t)
        # (2) from log alpha, which is exact where alpha itself is rounded to 1
        return self.log_alpha(t) - xp.log(self.sigma(t))

    def time_of(self, log_snr: Numbers) -> Numbers:
        """The time of a lambda, the inverse of ``log_snr``."""
        xp, log_snr = _module(log_snr)
        # log alpha = -log(1 + exp(-2 lambda)) / 2, without overflow
        return self._time_at(-0.5 * xp.logaddexp(0.0, -2 * log_snr))

    def velocity_weights(self, t: Numbers) -> tuple[Numbers, Numbers]:
        """(d_data, d_source) = (-sigma, alpha)."""
        return -self.sigma(t), self.alpha(t)

    @_quiet
    def derivative(self, t: Numbers) -> tuple[Numbers, Numbers]:
        """(d alpha / dt, d sigma / dt); the second is infinite at t = 0."""
        slope, alpha = self._slope(t), self.alpha(t)
        # (4) alpha' = alpha l', sigma' = -alpha^2 l' / sigma
        return alpha * slope, -(alpha**2) * slope / self.sigma(t)


@functools.lru_cache(maxsize=16)
def _knots(beta_start: float, beta_end: float, steps: int) -> np.ndarray:
    """log alpha at t = 1/steps .. 1, ``[steps]`` (read-only)."""
    betas = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    knots = 0.5 * np.cumsum(np.log1p(-betas))  # log prod_{j <= i} (1 - beta_j)^(1/2)
    knots.flags.writeable = False
    return knots


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledLinear(VariancePreserving):
    """The latent-diffusion betas, squares of a line, with log alpha linear between their knots.

    Knot i lies at t = i/steps and has alpha^2 = prod_{j <= i} (1 - beta_j). Left of the first knot
    the line of the next interval goes on, up to log alpha = 0.

    Source: Stable Diffusion (Rombach et al. 2022) and U-ViT (Bao et al. 2023), the same betas.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000  # knots
    time_offset: int = 1  # 1: labels 1 .. steps; 0: labels 0 .. steps-1, as diffusers counts
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check = functools.partial(require_values, "scaled_linear")
        ends = {"beta_start": self.beta_start, "beta_end": self.beta_end}
        rule = f"0 < beta_start <= beta_end < 1 must hold; change them {PLACE}."
        check(0 < self.beta_start <= self.beta_end < 1, rule, **ends)
        rule = f"at least 2 knots are needed to interpolate; change steps {PLACE}."
        check(self.steps >= 2, rule, steps=self.steps)
        rule = "must be 1 (labels 1..steps) or 0 (labels 0..steps-1); change time_offset " + PLACE
        check(self.time_offset in (0, 1), rule + ".", time_offset=self.time_offset)

    @property
    def betas(self) -> np.ndarray:
        """beta_1 .. beta_steps."""
        return np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps) ** 2

    def _segment(self, t: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """(left knot's index, log alpha there, rise over the interval)."""
        xp, t = _module(t)
        knots = _knots(self.beta_start, self.beta_end, self.steps)
        # knot i (from 0) lies at t = (i + 1) / steps; left of the first knot its line goes on
        index = xp.clip(xp.floor(t * self.steps).astype(int) - 1, 0, self.steps - 2)
        knots = knots if xp is np else jnp.asarray(knots, t.dtype)
        return index, knots[index], knots[index + 1] - knots[index]

    def log_alpha(self, t: Numbers) -> Numbers:
        """Linear between the knots."""
        xp, t = _module(t)
        index, left, rise = self._segment(t)
        # at most 0: the line left of the first knot would pass it before t = 0
        return xp.minimum(left + (t * self.steps - (index + 1)) * rise, 0.0)

    def _slope(self, t: Numbers) -> Numbers:
        return self._segment(t)[2] * self.steps

    def _time_at(self, log_alpha: Numbers) -> Numbers:
        xp, log_alpha = _module(log_alpha)
        knots = _knots(self.beta_start, self.beta_end, self.steps)
        knots = knots if xp is np else jnp.asarray(knots, log_alpha.dtype)
        # searchsorted wants a rising list, and log alpha falls
        index = xp.clip(xp.searchsorted(-knots, -log_alpha) - 1, 0, self.steps - 2)
        share = (log_alpha - knots[index]) / (knots[index + 1] - knots[index])
        return (index + 1 + share) / self.steps

    def label(self, t: Numbers) -> Numbers:
        """steps t, or max(steps t - 1, 0) where labels start at 0."""
        xp, t = _module(t)
        return t * self.steps if self.time_offset else xp.maximum(t * self.steps - 1, 0.0)

    def time(self, label: Numbers) -> Numbers:
        """The time of a label; the inverse of ``label`` on the knots and between them."""
        return (_module(label)[1] + (1 - self.time_offset)) / self.steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class BetaLinear(VariancePreserving):
    """The continuous schedule with beta(t) linear: log alpha = -(b1 - b0) t^2 / 4 - b0 t / 2.

    Source: score SDE (Song et al. 2021) eq. 33; DPM-Solver app. D.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        ends = {"beta_min": self.beta_min, "beta_max": self.beta_max}
        rule = f"0 < beta_min < beta_max must hold; change them {PLACE}."
        require_values("beta_linear", 0 < self.beta_min < self.beta_max, rule, **ends)

    def log_alpha(self, t: Numbers) -> Numbers:
        """The integral of -beta / 2 from 0 to t."""
        _, t = _module(t)
        # log alpha = -(b1 - b0) t^2 / 4 - b0 t / 2
        return -0.25 * (self.beta_max - self.beta_min) * t**2 - 0.5 * self.beta_min * t

    def _slope(self, t: Numbers) -> Numbers:
        _, t = _module(t)
        return -0.5 * (self.beta_max - self.beta_min) * t - 0.5 * self.beta_min

    def _time_at(self, log_alpha: Numbers) -> Numbers:
        xp, log_alpha = _module(log_alpha)
        # t = -4 l / (b0 + sqrt(b0^2 - 4 (b1 - b0) l)): the root without cancellation near t = 0
        root = xp.sqrt(self.beta_min**2 - 4 * (self.beta_max - self.beta_min) * log_alpha)
        return -4 * log_alpha / (self.beta_min + root)


BELOW_RIGHT_ANGLE = 1.5707962
"""The largest float32 below pi / 2, cut off."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(VariancePreserving):
    """alpha = cos(pi/2 (t + shift) / (1 + shift)), scaled to 1 at t = 0, and more noise on request.

    1. ``noise`` = k multiplies sigma / alpha, so that the log SNR is 2 log k lower at every time.

    Source: improved DDPM (Nichol & Dhariwal 2021) eq. 17; t_max as in DPM-Solver; 1 simple
    diffusion (Hoogeboom et al. 2023) eq. 4.
    """

    shift: float = 0.008  # keeps sigma from being tiny near t = 0
    t_max: float = 0.9946  # alpha is 0 at t = 1, so solvers start before
    noise: float = 1.0
    """Above 1 more of the times are spent where a stream's layout is decided: a label map of many
    equal pixels is readable under much more noise than its single pixels are."""

    def __post_init__(self) -> None:
        good = self.shift >= 0 and 0 < self.t_max < 1
        rule = f"shift >= 0 and 0 < t_max < 1 must hold (alpha is 0 at t = 1); change them {PLACE}."
        require_values("cosine", good, rule, shift=self.shift, t_max=self.t_max)
        rule = f"must be positive; change it {PLACE}."
        require_values("cosine", 0 < self.noise < math.inf, rule, noise=self.noise)

    def _angle(self, t: Numbers) -> Numbers:
        xp, t = _module(t)
        # rounded up, the angle at t = 1 would be above pi / 2, its cosine negative and its log nan
        return xp.minimum((t + self.shift) / (1 + self.shift) * (np.pi / 2), BELOW_RIGHT_ANGLE)

    def log_alpha(self, t: Numbers) -> Numbers:
        """log(cos(angle(t)) / cos(angle(0))), less what further noise takes."""
        xp, t = _module(t)
        plain = self._plain(xp, t)
        return plain if self.noise == 1 else plain - 0.5 * xp.log1p(self._more(xp, plain))

    def _plain(self, xp: Any, t: Numbers) -> Numbers:
        """log alpha without further noise."""
        return xp.log(xp.cos(self._angle(t))) - float(np.log(np.cos(self._angle(0.0))))

    def _more(self, xp: Any, plain: Numbers) -> Numbers:
        """(1) a^2 + k^2 s^2 - 1 = (k^2 - 1) s^2, of log a = plain and s^2 = 1 - a^2."""
        return (self.noise**2 - 1) * -xp.expm1(2 * plain)

    def _slope(self, t: Numbers) -> Numbers:
        xp, t = _module(t)
        slope = -xp.tan(self._angle(t)) * (np.pi / 2 / (1 + self.shift))
        if self.noise == 1:
            return slope
        return slope * self.noise**2 / (1 + self._more(xp, self._plain(xp, t)))

    def _time_at(self, log_alpha: Numbers) -> Numbers:
        xp, log_alpha = _module(log_alpha)
        if self.noise != 1:
            # log a = log alpha + log k - log(1 + (k^2 - 1) alpha^2) / 2
            more = xp.log1p((self.noise**2 - 1) * xp.exp(2 * log_alpha))
            log_alpha = log_alpha + math.log(self.noise) - 0.5 * more
        cosine = xp.exp(log_alpha) * float(np.cos(self._angle(0.0)))
        return xp.arccos(cosine) * (2 / np.pi * (1 + self.shift)) - self.shift


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(ThousandLabels):
    """Rectified flow: a straight line between data and source, alpha = 1 - t, sigma = t.

    Source: rectified flow (Liu et al. 2022) eq. 1.
    """

    t_max: float = 1.0
    """Where solvers start; below 1 it keeps some data in the start, which a network that predicts
    noise needs (see ``Process``)."""

    def __post_init__(self) -> None:
        rule = f"0 < t_max <= 1 must hold; change it {PLACE}."
        require_values("linear", 0 < self.t_max <= 1, rule, t_max=self.t_max)

    def alpha(self, t: Numbers) -> Numbers:
        """Weight of the data."""
        return 1 - _module(t)[1]

    def sigma(self, t: Numbers) -> Numbers:
        """Weight of the source."""
        return _module(t)[1] + 0.0  # a new value, and never -0.0

    @_quiet
    def log_alpha(self, t: Numbers) -> Numbers:
        """log(1 - t), -inf at t = 1."""
        xp, t = _module(t)
        return xp.log1p(-t)

    @_quiet
    def log_snr(self, t: Numbers) -> Numbers:
        """lambda(t) = log((1 - t) / t)."""
        xp, t = _module(t)
        return xp.log1p(-t) - xp.log(t)

    def time_of(self, log_snr: Numbers) -> Numbers:
        """The time of a lambda, without overflow."""
        xp, log_snr = _module(log_snr)
        # t = 1 / (1 + e^lambda) = exp(-log(e^0 + e^lambda))
        return xp.exp(-xp.logaddexp(0.0, log_snr))

    def velocity_weights(self, t: Numbers) -> tuple[Numbers, Numbers]:
        """(-1, 1): the velocity is source - data."""
        xp, t = _module(t)
        return -xp.ones_like(t), xp.ones_like(t)

    def derivative(self, t: Numbers) -> tuple[Numbers, Numbers]:
        """``velocity_weights``: on a straight line the predicted velocity is dx/dt."""
        return self.velocity_weights(t)


SCHEDULES = {
    "scaled_linear": ScaledLinear,
    "beta_linear": BetaLinear,
    "cosine": Cosine,
    "linear": Linear,
}

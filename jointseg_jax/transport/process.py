"""How one stream moves between its data end and its source end, and what the network says of it.

1. ``x_t = alpha data + sigma source``; the source is ``scale`` times a normal draw, or the other
   data end of a bridge.
2. TARGET: a training target, noise, data or velocity, is a weighted sum of (data, source).
3. INVERSE: (data, source) are weighted sums of (x, output), the inverse of 1 and 2 together.
4. ``dx/dt = alpha' data + sigma' source``
5. The loss is the mean of ``w(t) (output - target)^2``, with w from ``loss_weight``.

Two tables, so that n predictions need 2 n entries rather than n^2 conversions. ``scale`` is in the
source's draws and in the noise prediction only: the updates of the solvers, which are written in
terms of data and source, do not contain it.

Source: 1 and the velocity, see ``schedules``; scale is the kappa of PDM, sec. 3 and app. B.3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jointseg_jax import rng
from jointseg_jax.transport.loss_weight import UNIFORM, LossWeight
from jointseg_jax.transport.schedules import Numbers, Schedule
from jointseg_jax.types import require_values

Pair = tuple[Numbers, Numbers]
Latent = Float[Array, "batch ..."]


def _inverse_noise(process: Process, t: Numbers) -> tuple[Pair, Pair]:
    alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
    # source = scale output, data = (x - sigma source) / alpha
    return (1.0 / alpha, -sigma * process.scale / alpha), (0.0, process.scale)


def _inverse_data(process: Process, t: Numbers) -> tuple[Pair, Pair]:
    alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
    # data = output, source = (x - alpha data) / sigma
    return (0.0, 1.0), (1.0 / sigma, -alpha / sigma)


def _inverse_velocity(process: Process, t: Numbers) -> tuple[Pair, Pair]:
    alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
    d_data, d_source = process.schedule.velocity_weights(t)
    # data = d_source x - sigma output, source = alpha output - d_data x: the determinant
    # alpha d_source - sigma d_data of (x, velocity) is 1 for every schedule
    return (d_source, -sigma), (-d_data, alpha)


TARGET: dict[str, Callable[[Process, Numbers], Pair]] = {
    "noise": lambda process, t: (0.0, 1.0 / process.scale),
    "data": lambda process, t: (1.0, 0.0),
    "velocity": lambda process, t: process.schedule.velocity_weights(t),  # (d_data, d_source)
}
"""Weights of (data, source) in a target."""

INVERSE: dict[str, Callable[[Process, Numbers], tuple[Pair, Pair]]] = {
    "noise": _inverse_noise,
    "data": _inverse_data,
    "velocity": _inverse_velocity,
}
"""Weights of (x, output) in data, and in source."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """One stream's motion and its network's prediction."""

    schedule: Schedule  # alpha and sigma over time
    predicts: str = "noise"  # "noise", "data" or "velocity"
    scale: float = 1.0  # standard deviation of the source end
    clip: float | None = None  # solvers clamp data readings to [-clip, clip]; None leaves them
    weight: LossWeight = UNIFORM
    """How much the output's squared error counts at a time: ``{"name": ..}`` of uniform,
    inverse_sigma (cap 5), min_snr (gamma 5) or loss_of (target, cap 100)."""

    def __post_init__(self) -> None:
        rule = "not a schedule; give one of SCHEDULES, built, in the stream's `schedule`."
        good = isinstance(self.schedule, Schedule)
        require_values("process", good, rule, schedule=self.schedule)
        rule = "not a weight; give one of WEIGHTS, built, in the process's `weight`."
        require_values("process", isinstance(self.weight, LossWeight), rule, weight=self.weight)
        checks = {
            "predicts": (self.predicts in INVERSE, f"must be one of {', '.join(INVERSE)}"),
            "scale": (0 < self.scale < math.inf, "the deviation must be positive and finite"),
            "clip": (self.clip is None or self.clip > 0, "must be positive; None does not clamp"),
        }
        for name, (holds, rule) in checks.items():
            rule += f"; change `{name}` of the stream's process."
            require_values("process", holds, rule, **{name: getattr(self, name)})
        if self.predicts == "noise" and self.schedule.alpha(self.schedule.t_max) == 0:
            raise ValueError(
                f"process: predicts='noise' with {self.schedule}: at t_max="
                f"{self.schedule.t_max} alpha is 0, so the state is all noise and the prediction "
                "says nothing about the data; change `predicts` to 'velocity' or 'data', or "
                "the schedule's t_max to below 1."
            )

    def source(self, keys: rng.Keys, like: Latent) -> Latent:
        """Normal draws of standard deviation ``scale``, row i from ``keys[i]`` alone."""
        return self.scale * rng.normal(keys, like)

    def interpolate(self, data: Latent, source: Latent, t: Numbers) -> Latent:
        """The state at time t, of clean data and their source; t is one number or one per row."""
        # (1) x_t = alpha data + sigma source
        return combine((self.schedule.alpha(t), self.schedule.sigma(t)), data, source)

    def target(self, data: Latent, source: Latent, t: Numbers) -> Latent:
        """What the network should say at time t: noise, data or velocity."""
        return combine(TARGET[self.predicts](self, t), data, source)

    def weigh(self, squares: Latent, t: Numbers) -> Latent:
        """Squared errors of outputs ``[b, ...]``, each row times the weight of its time."""
        if self.weight == UNIFORM:
            return squares  # not times 1, which a program would contain
        # (5) w(t) (output - target)^2
        return over_rows(self.weight(self, t), squares) * squares

    def error_ratio(self, prediction: str, t: Numbers) -> Numbers:
        """The error that an output error of 1, at a known state, makes in another prediction."""
        if prediction == self.predicts:
            return 1.0  # the sum below has 0 times infinity at t = 0
        of_data, of_source = TARGET[prediction](self, t)
        (_, data), (_, source) = INVERSE[self.predicts](self, t)
        return of_data * data + of_source * source

    def to_data_source(self, output: Latent, x: Latent, t: Numbers) -> tuple[Latent, Latent]:
        """(data, source) as the network's output at (x, t) implies them."""
        data, source = INVERSE[self.predicts](self, t)
        return combine(data, x, output), combine(source, x, output)

    def data(self, output: Latent, x: Latent, t: Numbers) -> Latent:
        """The data that the network's output at (x, t) implies; finite at t = 0."""
        return combine(INVERSE[self.predicts](self, t)[0], x, output)

    def velocity(self, output: Latent, x: Latent, t: Numbers) -> Latent:
        """dx/dt along the flow, as the network's output at (x, t) implies it."""
        return combine(self.reading_weights("velocity", t), x, output)

    def reading_weights(self, reading: str, t: Numbers) -> Pair:
        """Weights of (x, output) in ``"data"``, ``"noise"`` (the source) or ``"velocity"``."""
        data, source = INVERSE[self.predicts](self, t)
        if reading != "velocity":
            return {"data": data, "noise": source}[reading]
        d_alpha, d_sigma = self.schedule.derivative(t)
        # (4) dx/dt = alpha' data + sigma' source, each of them a sum over (x, output)
        of_x, of_output = (d_alpha * d + d_sigma * s for d, s in zip(data, source))
        return of_x, of_output


def combine(weights: Pair, first: Latent, second: Latent) -> Latent:
    """``w0 first + w1 second``; a weight is a number or one number per row."""
    dtype = jnp.result_type(first, second)
    first, second = first.astype(dtype), second.astype(dtype)
    return over_rows(weights[0], first) * first + over_rows(weights[1], second) * second


def over_rows(weight: Numbers, like: Latent) -> Array:
    """A per-row (or single) weight in the shape and dtype in which it multiplies ``like``."""
    if jnp.ndim(weight) == 0:
        return jnp.asarray(weight, like.dtype)
    # [b] -> [b, 1, 1, 1], by hand: rank promotion is an error under the tests
    return jnp.asarray(weight, like.dtype).reshape(-1, *(1,) * (like.ndim - 1))

"""How one stream moves between its data end and its source end, and what the network says of it.

1. ``x_t = alpha data + sigma source`` (``interpolate``); the source is ``scale`` times a normal
   draw, or the other data end of a bridge.
2. TARGET: a training target is a weighted sum of (data, source):

   | predicts | target |
   |---|---|
   | noise | source / scale |
   | data | data |
   | velocity | d_data data + d_source source |

3. INVERSE: (data, source) are weighted sums of (x, output), the inverse of 1 and 2 together:

   | predicts | data | source |
   |---|---|---|
   | noise | (x - sigma scale output) / alpha | scale output |
   | data | output | (x - alpha output) / sigma |
   | velocity | d_source x - sigma output | alpha output - d_data x |

4. ``dx/dt = alpha' data + sigma' source`` (``velocity``).

Two tables read and write, so that n predictions need 2 n entries rather than n^2 conversions.
``scale`` is in the start and in the noise prediction only: the updates of the solvers, which are
written in terms of data and source, do not contain it.

Source: 1 and the velocity, see ``schedules``; scale is the kappa of PDM, sec. 3 and app. B.3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jointseg_jax import rng as row_keys
from jointseg_jax.transport.schedules import Numbers, Schedule

Pair = tuple[Numbers, Numbers]
Latent = Float[Array, "batch ..."]


def _target_noise(process: Process, t: Numbers) -> Pair:
    return 0.0, 1.0 / process.scale


def _target_data(process: Process, t: Numbers) -> Pair:
    return 1.0, 0.0


def _target_velocity(process: Process, t: Numbers) -> Pair:
    return process.schedule.velocity_weights(t)


def _inverse_noise(process: Process, t: Numbers) -> tuple[Pair, Pair]:
    alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
    return (1.0 / alpha, -sigma * process.scale / alpha), (0.0, process.scale)


def _inverse_data(process: Process, t: Numbers) -> tuple[Pair, Pair]:
    alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
    return (0.0, 1.0), (1.0 / sigma, -alpha / sigma)


def _inverse_velocity(process: Process, t: Numbers) -> tuple[Pair, Pair]:
    alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
    d_data, d_source = process.schedule.velocity_weights(t)
    return (d_source, -sigma), (-d_data, alpha)


TARGET: dict[str, Callable[[Process, Numbers], Pair]] = {
    "noise": _target_noise,
    "data": _target_data,
    "velocity": _target_velocity,
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
    """One stream's motion and its network's prediction.

    Attributes:
      schedule: alpha and sigma over time.
      predicts: ``"noise"``, ``"data"`` or ``"velocity"``.
      scale: standard deviation of the source end.
      clip: solvers clamp their data readings to [-clip, clip]; None leaves them.
    """

    schedule: Schedule
    predicts: str = "noise"
    scale: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise ValueError(
                f"process: schedule={self.schedule!r} is not a schedule; give one of "
                "transport.schedules.SCHEDULES, built, in the stream's `schedule`."
            )
        if self.predicts not in INVERSE:
            raise ValueError(
                f"process: predicts={self.predicts!r}: must be one of {', '.join(INVERSE)}; change "
                "`predicts` of the stream's process."
            )
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(
                f"process: scale={self.scale}: the standard deviation of the source must be "
                "positive and finite; change `scale` of the stream's process."
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(
                f"process: clip={self.clip}: must be positive, or None for no clamping; change "
                "`clip` of the stream's process."
            )
        if self.predicts == "noise" and self.schedule.alpha(self.schedule.t_max) == 0:
            raise ValueError(
                f"process: predicts='noise' with {self.schedule}: at t_max="
                f"{self.schedule.t_max} alpha is 0, so the state is all noise and the prediction "
                "says nothing about the data; change `predicts` to 'velocity' or 'data', or "
                "the schedule's t_max to below 1."
            )

    def source(self, keys: row_keys.Keys, like: Latent) -> Latent:
        """Normal draws of standard deviation ``scale``, row i from ``keys[i]`` alone."""
        return self.scale * row_keys.normal(keys, like)

    def interpolate(self, data: Latent, source: Latent, t: Numbers) -> Latent:
        """The state at time t.  Source: equation 1."""
        return combine((self.schedule.alpha(t), self.schedule.sigma(t)), data, source)

    def target(self, data: Latent, source: Latent, t: Numbers) -> Latent:
        """What the network should say at time t.  Source: table 2."""
        return combine(TARGET[self.predicts](self, t), data, source)

    def to_data_source(self, output: Latent, x: Latent, t: Numbers) -> tuple[Latent, Latent]:
        """(data, source) as the network's output at (x, t) implies them.  Source: table 3."""
        data, source = INVERSE[self.predicts](self, t)
        return combine(data, x, output), combine(source, x, output)

    def data(self, output: Latent, x: Latent, t: Numbers) -> Latent:
        """The data reading alone; finite at t = 0."""
        return combine(INVERSE[self.predicts](self, t)[0], x, output)

    def velocity(self, output: Latent, x: Latent, t: Numbers) -> Latent:
        """dx/dt along the flow.  Source: equation 4."""
        return combine(self.reading_weights("velocity", t), x, output)

    def reading_weights(self, reading: str, t: Numbers) -> Pair:
        """Weights of (x, output) in ``"data"``, ``"noise"`` (the source) or ``"velocity"``."""
        data, source = INVERSE[self.predicts](self, t)
        if reading != "velocity":
            return {"data": data, "noise": source}[reading]
        d_alpha, d_sigma = self.schedule.derivative(t)
        return tuple(d_alpha * d + d_sigma * s for d, s in zip(data, source))


def combine(weights: Pair, first: Latent, second: Latent) -> Latent:
    """``w0 first + w1 second``; a weight is a number or one number per row."""
    dtype = jnp.result_type(first, second)
    first, second = first.astype(dtype), second.astype(dtype)
    return over_rows(weights[0], first) * first + over_rows(weights[1], second) * second


def over_rows(weight: Numbers, like: Latent) -> Array:
    """A per-row (or single) weight in the shape and dtype in which it multiplies ``like``."""
    if jnp.ndim(weight) == 0:
        return jnp.asarray(weight, like.dtype)
    return jnp.asarray(weight, like.dtype).reshape(-1, *(1,) * (like.ndim - 1))

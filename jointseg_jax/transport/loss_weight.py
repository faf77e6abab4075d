"""How much the squared error of a stream's output counts at a time.

With ``d = scale sigma`` (the noise in a state has this deviation), ``SNR = alpha^2 / d^2`` and
``r_p``, the error that an output error of 1 makes in the prediction p:

| name | weight w(t) of the squared error of the output |
|---|---|
| uniform | 1 |
| inverse_sigma | min(1 / d, cap) |
| min_snr | min(SNR, gamma) r_data^2: the data's error counts min(SNR, gamma) |
| loss_of | min(r_target^2, cap): the loss of a network that predicts the target |

| r, row: the output; column: p | noise | data | velocity |
|---|---|---|---|
| noise | 1 | d / alpha | scale / alpha |
| data | alpha / d | 1 | 1 / sigma |
| velocity | alpha / scale | sigma | 1 |

A state, and what can be known of its data, are the same whether scale or sigma holds the noise's
deviation, so weights of a data prediction depend on their product d; only a velocity contains the
source with its scale. For data predictions and scale 1, ``inverse_sigma`` is the geometric mean
of the loss of data, 1, and that of a velocity, 1 / sigma^2.

Source: min-SNR, Hang et al. 2023 (2303.09556) sec. 3.4; losses of different predictions
as weights of each other, Salimans & Ho 2022 sec. 4.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from jointseg_jax.transport.schedules import Numbers, Schedule
from jointseg_jax.types import require_one_of, require_values

PREDICTIONS = ("noise", "data", "velocity")
PLACE = "change it in the process's `weight`."


@runtime_checkable
class Predicted(Protocol):
    """What a weight asks of a process."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def scale(self) -> float: ...
    def error_ratio(self, prediction: str, t: Numbers) -> Numbers: ...


@runtime_checkable
class LossWeight(Protocol):
    """The weight w(t), at one time or at one per row."""

    def __call__(self, process: Predicted, t: Numbers) -> Numbers: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """All times count alike."""

    def __call__(self, process: Predicted, t: Numbers) -> Numbers:
        """1."""
        return 1.0


UNIFORM = Uniform()


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSigma:
    """The less noise in the state, the more its error counts: min(1 / (scale sigma), cap)."""

    cap: float = 5.0  # the largest weight; reached where the noise's deviation is 1 / cap

    def __post_init__(self) -> None:
        _require_positive("inverse_sigma", cap=self.cap)

    def __call__(self, process: Predicted, t: Numbers) -> Numbers:
        """The weight of the squared error of the output, whatever that predicts."""
        return jnp.minimum(1 / (process.scale * process.schedule.sigma(t)), self.cap)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinSNR:
    """The data's squared error counts min(SNR, gamma), whatever the network predicts."""

    gamma: float = 5.0  # SNR above which states count alike

    def __post_init__(self) -> None:
        _require_positive("min_snr", gamma=self.gamma)

    def __call__(self, process: Predicted, t: Numbers) -> Numbers:
        """min(SNR, gamma) for data, min(SNR, gamma) / SNR for noise."""
        alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
        snr = (alpha / (process.scale * sigma)) ** 2
        return jnp.minimum(snr, self.gamma) * process.error_ratio("data", t) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOf:
    """The loss is that of a network that predicts the target, up to a cap."""

    target: str  # "noise", "data" or "velocity"
    cap: float = 100.0  # the largest weight: data predictions have 1 / sigma^2 near t = 0

    def __post_init__(self) -> None:
        require_one_of("loss_of: target", self.target, PREDICTIONS, PLACE.capitalize())
        _require_positive("loss_of", cap=self.cap)

    def __call__(self, process: Predicted, t: Numbers) -> Numbers:
        """The square of the error that an output error of 1 makes in the target."""
        return jnp.minimum(jnp.square(process.error_ratio(self.target, t)), self.cap)


def _require_positive(where: str, **value: float) -> None:
    good = all(0 < number < float("inf") for number in value.values())
    require_values(where, good, f"must be positive and finite; {PLACE}", **value)


WEIGHTS = {
    "uniform": Uniform,
    "inverse_sigma": InverseSigma,
    "min_snr": MinSNR,
    "loss_of": LossOf,
}

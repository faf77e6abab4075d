"""Optimizers and learning-rate schedules from optax, chosen by name.

``update = clip -> direction -> decay where the rules say so -> -lr(step) -> lr_scale by rules``
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from jointseg_jax import rules
from jointseg_jax.specs import make
from jointseg_jax.training.muon import Axes, scale_by_muon

DECAY_MATRICES = ((r"(bias|scale|position|embedding)$", False), (r"", True))
"""Weight decay on kernels only."""

DECAY_ALL = ((r"", True),)
"""Weight decay on every parameter, as U-ViT, PDM and JoDiffusion train."""


def constant(*, lr: float, steps: int, warmup: int = 0) -> optax.Schedule:
    """Linear warm-up, then ``lr`` at all further ``steps``."""
    flat = optax.constant_schedule(lr)
    if not warmup:
        return flat
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), flat], [warmup])


def linear(*, lr: float, steps: int, warmup: int = 0, final: float = 0.0) -> optax.Schedule:
    """Linear warm-up, then a straight line to ``final * lr`` at the last step."""
    down = optax.linear_schedule(lr, final * lr, max(steps - warmup, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, lr, max(warmup, 1)), down], [warmup])


def cosine(*, lr: float, steps: int, warmup: int = 0, final: float = 0.0) -> optax.Schedule:
    """Linear warm-up, then half a cosine to ``final * lr`` at the last step."""
    return optax.warmup_cosine_decay_schedule(0.0, lr, warmup, max(steps, warmup + 1), final * lr)


MATRICES: rules.Rules = (
    (r"/qkv/kernel$", ((-4,), (-2, -1))),  # queries, keys and values apart
    (r"/attn/out/kernel$", ((-3, -2), (-1,))),
    (r"double_\d+/kernel$", ((-2,), (-4, -3, -1))),
    (r"/(conv(_\w+)?|widen_\d+|halve_\d+)/kernel$", ((-4, -3, -2), (-1,))),
    (r"/kernel$", ((-2,), (-1,))),
    (r"", None),
)
"""What Muon takes as a matrix: (input axes, output axes), counted from the end because scanned
blocks have a leading axis; None goes to AdamW."""

SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine}

# dead="allow": the default rules speak of layers that a network may lack
_match = functools.partial(rules.match, prefix="params/", dead="allow")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with clipping by global norm."""

    schedule: Mapping[str, Any]  # name (``SCHEDULES``), lr and what else that schedule takes
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # times the learning rate at each step
    clip: float = 0.0  # largest global norm of the gradient; 0: off
    decay: rules.Rules = DECAY_MATRICES  # path rules: which parameters decay
    lr_scale: rules.Rules = ((r"", 1.0),)  # path rules: factor of the learning rate
    mu_dtype: str = "float32"  # of the first moment

    def __post_init__(self) -> None:
        if not 0 <= self.b1 < 1 or not 0 <= self.b2 < 1:
            raise ValueError(f"b1, b2 = {self.b1}, {self.b2} must lie in [0, 1).")
        if self.weight_decay < 0 or self.clip < 0 or self.eps <= 0:
            raise ValueError(
                f"weight_decay {self.weight_decay} and clip {self.clip} must be >= 0, "
                f"eps {self.eps} > 0."
            )
        lr = self.schedule.get("lr", 0.0)
        if lr <= 0 or self.warmup < 0:
            raise ValueError(
                f"schedule.lr {lr} must be > 0 and schedule.warmup {self.warmup} >= 0."
            )

    @property
    def warmup(self) -> int:
        """Steps until the learning rate is reached."""
        return self.schedule.get("warmup", 0)

    def learning_rate(self, steps: int) -> optax.Schedule:
        """The learning rate as a function of the step."""
        return make(SCHEDULES, self.schedule, where="optimizer.schedule", steps=steps)

    def build(self, steps: int, *, stacked: bool = False) -> optax.GradientTransformation:
        """The optax transformation for a run of ``steps`` updates.

        Args:
          stacked: parameters lie whole on every device, so that those of one shape may be worked
            on together.
        """
        # before the direction, whose moments then see the clipped gradient
        parts = [optax.clip_by_global_norm(self.clip)] if self.clip else []
        descent = optax.chain(
            self._direction(stacked),
            optax.add_decayed_weights(self.weight_decay, self._decayed),
            optax.scale_by_learning_rate(self.learning_rate(steps)),
        )
        return optax.chain(*parts, descent, optax.stateless(self._scaled))

    def _direction(self, stacked: bool) -> optax.GradientTransformation:
        del stacked  # each number by itself
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype)

    def _decayed(self, params: PyTree) -> PyTree:
        return _match(params, self.decay, where="optimizer.decay")

    def _scaled(self, updates: PyTree, _: PyTree) -> PyTree:
        # matched while the update is traced: the factors are constants of the program, not state
        factors = _match(updates, self.lr_scale, where="optimizer.lr_scale")
        return jax.tree.map(lambda u, f: u * f, updates, factors)


@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Muon on matrices, AdamW on the rest: orthogonalised momentum, far fewer steps when small.

    Both parts have Nesterov momentum. ``b1``, ``b2`` and ``eps`` are those of the AdamW part.

    Source: Jordan et al. 2024, as in optax.contrib.muon.
    """

    matrices: rules.Rules = MATRICES  # path rules, as there
    beta: float = 0.95  # momentum of the matrices
    ns_steps: int = 5  # Newton-Schulz iterations
    lr_ratio: float = 1.0  # length of AdamW's steps relative to Muon's; the decay is alike for both

    def _direction(self, stacked: bool) -> optax.GradientTransformation:
        matrices = scale_by_muon(
            self._matrices,
            beta=self.beta,
            eps=self.eps,
            ns_steps=self.ns_steps,
            mu_dtype=self.mu_dtype,
            stacked=stacked,
        )
        rest = optax.scale_by_adam(
            self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype, nesterov=True
        )
        # optax.contrib.muon has more links; checkpoints of its state are read, so they stay
        link = optax.identity()
        return optax.partition(
            {
                "muon": optax.chain(matrices, link, link, link),
                "adam": optax.chain(rest, link, optax.scale(self.lr_ratio)),
            },
            lambda params: jax.tree.map(
                lambda _, axes: "adam" if axes is None else "muon", params, self._matrices(params)
            ),
        )

    def _matrices(self, params: PyTree) -> PyTree:
        axes = tuple((p, None if v is None else Axes(*v)) for p, v in self.matrices)
        return _match(params, axes, where="optimizer.matrices")


OPTIMIZERS = {"adamw": AdamW, "muon": Muon}

"""What a run saves: parameters, optimizer state, average, step and the two fault counters."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


class TrainState(flax.struct.PyTreeNode):
    """Everything that an update reads and writes: arrays, or their shapes or shardings."""

    params: PyTree  # all parameters, the frozen ones too
    # Frozen leaves are None (an empty tree node) in these two: they cost no optimizer memory, and
    # no gradient is computed for them.
    opt: PyTree  # of the trainable parameters
    ema: PyTree  # running average of the trainable parameters
    step: PyTree  # int32, updates so far, which is also the position in the data
    skipped: PyTree  # int32, updates refused in a row because loss or gradient was not finite
    retries: PyTree  # int32, roll-backs so far; folded into the noise keys so that a retry differs


def split(params: PyTree, is_trainable: PyTree) -> tuple[PyTree, PyTree]:
    """The trainable and the frozen half of ``params``; leaves of the other half are ``None``.

    Args:
      is_trainable: a bool for each parameter.
    """
    trainable = jax.tree.map(lambda p, t: p if t else None, params, is_trainable)
    frozen = jax.tree.map(lambda p, t: None if t else p, params, is_trainable)
    return trainable, frozen


def merge(trainable: PyTree, frozen: PyTree) -> PyTree:
    """The inverse of ``split``."""
    # is_leaf: None is no leaf for jax, so that the two halves would not have one structure
    return jax.tree.map(
        lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None
    )


def create(
    params: PyTree, is_trainable: PyTree, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first update; the average starts at the given (loaded) parameters."""
    trainable, _ = split(params, is_trainable)
    return TrainState(
        params=params,
        opt=optimizer.init(trainable),
        # + 0 makes a copy: the update donates params and ema, which must not share memory
        ema=jax.tree.map(lambda p: p + jnp.zeros((), p.dtype), trainable),
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        retries=jnp.zeros((), jnp.int32),
    )


def averaged(params: PyTree, ema: PyTree) -> PyTree:
    """Parameters for sampling and evaluation: averages, and frozen leaves as they are."""
    return merge(ema, params)

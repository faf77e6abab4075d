"""What a run saves: parameters, optimizer state, average, step and the two fault counters.

Frozen leaves stay in ``params`` and appear as ``None`` (an empty tree node) in ``opt`` and ``ema``:
they cost no optimizer memory, and no gradient is computed for them.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Everything that an update reads and writes; the data position is ``step``.

    The leaves are arrays, or shapes or shardings in their place.
    """

    params: Any
    opt: Any
    ema: Any
    step: Any
    skipped: Any  # updates refused in a row because loss or gradient was not finite
    retries: Any  # roll-backs so far; folded into the noise keys so that a retry differs


def split(params: Any, trainable: Any) -> tuple[Any, Any]:
    """``(trainable, fixed)`` halves of ``params``; the other half's leaves are ``None``."""
    chosen = jax.tree.map(lambda p, t: p if t else None, params, trainable)
    rest = jax.tree.map(lambda p, t: None if t else p, params, trainable)
    return chosen, rest


def merge(chosen: Any, rest: Any) -> Any:
    """The inverse of ``split``."""
    return jax.tree.map(
        lambda c, r: r if c is None else c, chosen, rest, is_leaf=lambda x: x is None
    )


def create(params: Any, trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update; the average starts at the given (loaded) parameters."""
    chosen, _ = split(params, trainable)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        params=params,
        opt=optimizer.init(chosen),
        ema=jax.tree.map(lambda p: p + jnp.zeros((), p.dtype), chosen),
        step=zero,
        skipped=jnp.zeros((), jnp.int32),
        retries=jnp.zeros((), jnp.int32),
    )


def averaged(params: Any, ema: Any) -> Any:
    """Parameters for sampling and evaluation: the average where one is kept."""
    return merge(ema, params)

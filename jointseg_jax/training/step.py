"""One update as a pure function of (state, frozen, batch).

1. row keys from (seed + retries, step, global row)
2. loss and gradient, summed over ``accumulate`` strided micro-batches (a micro-batch takes rows
   ``j, j + n, ...`` so that each device keeps its own rows)
3. optimizer, average; all of it discarded when the loss or the gradient norm is not finite
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jointseg_jax.rng import row_keys
from jointseg_jax.systems.system import Objective
from jointseg_jax.training.state import TrainState, merge, split
from jointseg_jax.types import Array

Update = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Array]]]


def make_update(
    system: Objective,
    optimizer: optax.GradientTransformation,
    trainable: Any,
    *,
    seed: int,
    ema: float,
    accumulate: int = 1,
    learning_rate: optax.Schedule | None = None,
) -> Update:
    """The update function of a run.

    Args:
      system: gives the loss.
      optimizer: sees trainable leaves only.
      trainable: tree of booleans shaped like the parameters.
      seed: of the run's noise.
      ema: decay of the average; early steps use ``(1 + step) / (10 + step)`` when that is smaller.
      accumulate: number of micro-batches per update.
      learning_rate: reported among the metrics when given.
    """

    def update(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        rows = jnp.arange(jax.tree.leaves(batch)[0].shape[0], dtype=jnp.uint32)
        keys = row_keys(seed, state.step, rows)
        keys = jax.vmap(lambda k: jax.random.fold_in(k, state.retries))(keys)
        chosen, fixed = split(state.params, trainable)

        def loss(chosen: Any, batch: Any, keys: Array) -> tuple[Array, dict[str, Array]]:
            return system.loss(merge(chosen, fixed), frozen, batch, keys)

        (_, metrics), grads = _accumulated(loss, chosen, batch, keys, accumulate)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        updates, opt = optimizer.update(grads, state.opt, chosen)
        moved = optax.apply_updates(chosen, updates)
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(
            lambda e, p: (decay * e + (1.0 - decay) * p).astype(e.dtype), state.ema, moved
        )

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        metrics |= {"grad_norm": norm, "finite": finite}
        if learning_rate is not None:
            metrics["lr"] = jnp.asarray(learning_rate(state.step), jnp.float32)
        new = state.replace(
            params=merge(kept(moved, chosen), fixed),
            opt=kept(opt, state.opt),
            ema=kept(average, state.ema),
            step=state.step + 1,
            skipped=jnp.where(finite, 0, state.skipped + 1),
        )
        return new, metrics

    return update


def _accumulated(
    loss: Callable, chosen: Any, batch: Any, keys: Array, parts: int
) -> tuple[Any, Any]:
    """Mean loss, metrics and gradient over strided micro-batches."""
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return gradient(chosen, batch, keys)

    def strided(x: Array) -> Array:
        return jnp.swapaxes(x.reshape((x.shape[0] // parts, parts, *x.shape[1:])), 0, 1)

    def body(total: Any, part: Any) -> tuple[Any, None]:
        result = gradient(chosen, *part)
        return jax.tree.map(jnp.add, total, result), None

    stacked = jax.tree.map(strided, (batch, keys))
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, chosen, *first)
    )
    total, _ = jax.lax.scan(body, zeros, stacked)
    return jax.tree.map(lambda x: x / parts, total)

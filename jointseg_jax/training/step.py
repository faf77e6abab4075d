"""One update as a pure function of (state, frozen, batch), and how its state lies on a mesh.

1. row keys from (seed + retries, step, global row)
2. loss and gradient, summed over ``accumulate`` strided micro-batches
3. optimizer, average; all of it discarded when the loss or the gradient norm is not finite

Training compiles the update for the devices at hand, ``perf`` for devices that need not exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jointseg_jax import chips, rules, sharding
from jointseg_jax.config import RunConfig
from jointseg_jax.rng import row_keys
from jointseg_jax.specs import make
from jointseg_jax.systems.system import Batch, Objective
from jointseg_jax.training import init_from
from jointseg_jax.training.optimizer import OPTIMIZERS
from jointseg_jax.training.state import TrainState, create, merge, split
from jointseg_jax.types import Array, UserError

CONVOLUTION = r"(^|/)conv(_\w+)?/kernel$"
"""Paths of the kernels of convolutions."""

Metrics = dict[str, Array]
Update = Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]


def make_update(
    system: Objective,
    optimizer: optax.GradientTransformation,
    trainable: PyTree,
    *,
    seed: int,
    ema: float,
    accumulate: int = 1,
    learning_rate: optax.Schedule | None = None,
) -> Update:
    """The update function of a run.

    Args:
      optimizer: sees trainable leaves only.
      trainable: tree of booleans shaped like the parameters.
      ema: decay of the average; early steps use ``(1 + step) / (10 + step)`` when that is smaller.
      accumulate: number of micro-batches per update.
      learning_rate: reported among the metrics when given.
    """

    def update(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        rows = jnp.arange(jax.tree.leaves(batch)[0].shape[0], dtype=jnp.uint32)  # [b], global
        keys = row_keys(seed, state.step, rows)  # [b]
        # Going back to a checkpoint draws other noise: the same would give the same fault again.
        keys = jax.vmap(lambda k: jax.random.fold_in(k, state.retries))(keys)
        learning, fixed = split(state.params, trainable)

        # ------------------------------------------------------- loss and gradient
        def loss(learning: PyTree, batch: Batch, keys: Array) -> tuple[Array, Metrics]:
            return system.loss(merge(learning, fixed), frozen, batch, keys)

        gradient = jax.value_and_grad(loss, has_aux=True)
        if accumulate == 1:
            (_, metrics), grads = gradient(learning, batch, keys)
        else:
            (_, metrics), grads = _accumulated(gradient, learning, batch, keys, accumulate)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

        # -------------------------------------------------------- optimizer, average
        updates, opt = optimizer.update(grads, state.opt, learning)
        moved = optax.apply_updates(learning, updates)
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(
            lambda e, p: (decay * e + (1.0 - decay) * p).astype(e.dtype), state.ema, moved
        )

        # --------------------------------------- all of it, or nothing if not finite
        def keep(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        metrics |= {"grad_norm": norm, "finite": finite}
        if learning_rate is not None:
            metrics["lr"] = jnp.asarray(learning_rate(state.step), jnp.float32)
        new = state.replace(
            params=merge(keep(moved, learning), fixed),
            opt=keep(opt, state.opt),
            ema=keep(average, state.ema),
            step=state.step + 1,
            skipped=jnp.where(finite, 0, state.skipped + 1),
        )
        return new, metrics

    return update


def _accumulated(
    gradient: Callable, learning: PyTree, batch: Batch, keys: Array, parts: int
) -> tuple:
    """Mean loss, metrics and gradient over micro-batches."""

    def strided(x: Array) -> Array:  # [b, ...] -> [parts, b / parts, ...]
        # Micro-batch j takes rows j, j + parts, ...: each device keeps the rows that it has.
        return jnp.swapaxes(x.reshape((x.shape[0] // parts, parts, *x.shape[1:])), 0, 1)

    def body(total: PyTree, part: tuple) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, gradient(learning, *part)), None

    stacked = jax.tree.map(strided, (batch, keys))
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, learning, *first)
    )
    total, _ = jax.lax.scan(body, zeros, stacked)
    return jax.tree.map(lambda x: x / parts, total)


# ----------------------------------------------------------------------- on a mesh


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """What a run compiles, with the layout of its state over the mesh."""

    params: PyTree  # shapes of the parameters
    init: Callable[[Array, init_from.Leaves], TrainState]  # (key, leaves to start from)
    state: TrainState  # shapes of the state, with their shardings
    shardings: TrainState  # the shardings alone
    update: jax.stages.Wrapped  # (state, frozen, batch) -> (state, metrics); uses up the state
    options: Mapping[str, str]  # of the compiler, for the chips of the mesh


def make_train_step(system: Objective, config: RunConfig, mesh: jax.sharding.Mesh) -> TrainStep:
    """The update of a config's system, jitted for a mesh; nothing is compiled yet.

    Raises:
      UserError: an optimizer that cannot be built, or rules that do not fit the parameters.
    """
    optimizer = make(OPTIMIZERS, config.optimizer, where="optimizer")
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    trainable = rules.match(shapes, config.trainable, where="trainable", prefix="params/")
    transform = optimizer.build(config.steps, stacked=mesh.size == 1)

    def init(key: Array, leaves: init_from.Leaves) -> TrainState:
        return create(init_from.insert(system.init(key), leaves), trainable, transform)

    abstract = jax.eval_shape(init, jax.random.key(0), {})
    shardings = sharding.state_shardings(abstract, config.sharding, mesh)
    update = make_update(
        system,
        transform,
        trainable,
        seed=config.seed,
        ema=config.ema,
        accumulate=config.accumulate,
        learning_rate=optimizer.learning_rate(config.steps),
    )
    everywhere = sharding.replicated(mesh)
    convolutions = any(re.search(CONVOLUTION, path) for path in rules.paths(shapes))
    options = chips.compiler_options(mesh, convolutions=convolutions)
    jitted = jax.jit(
        update,
        in_shardings=(shardings, everywhere, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
        compiler_options=options,
    )
    return TrainStep(
        params=shapes,
        init=init,
        state=with_shardings(abstract, shardings),
        shardings=shardings,
        update=jitted,
        options=options or {},
    )


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Shapes that know where they lie."""
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
    )


def check_batch(config: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Refuses (UserError) a batch that devices and micro-batches cannot share evenly."""
    check_rows(config, sharding.data_parallel(mesh))


def check_rows(config: RunConfig, shards: int) -> None:
    """Refuses (UserError) a batch that ``shards`` data shards cannot share evenly."""
    parts = shards * config.accumulate
    if config.batch % parts:
        nearest = max(round(config.batch / parts), 1) * parts
        raise UserError(
            f"config.batch = {config.batch}: must be a multiple of data shards x accumulate = "
            f"{shards} x {config.accumulate}; the nearest is {nearest}."
        )

"""The program of a run: how its state is laid out over a mesh, and its jitted update.

Training compiles it for the devices at hand, ``aot`` for devices that need not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jointseg_jax import chips, rules, sharding
from jointseg_jax.config import make
from jointseg_jax.systems.system import Objective
from jointseg_jax.training import init_from
from jointseg_jax.training import state as states
from jointseg_jax.training.optimizer import OPTIMIZERS
from jointseg_jax.training.step import make_update
from jointseg_jax.types import UserError


class Program(NamedTuple):
    """What a run compiles.

    Attributes:
      params: shapes of the parameters.
      init: ``(key, leaves to start from) -> state``.
      state: shapes and places of the state.
      shardings: the places alone.
      update: jitted ``(state, frozen, batch) -> (state, metrics)``; the state given is used up.
      options: of the compiler, for the chips of the mesh.
    """

    params: Any
    init: Callable[[jax.Array, Mapping[str, Any]], states.TrainState]
    state: states.TrainState
    shardings: Any
    update: Any
    options: Mapping[str, str]


def make_program(system: Objective, config: Mapping[str, Any], mesh: jax.sharding.Mesh) -> Program:
    """The program of a config's system on a mesh.

    Raises:
      UserError: an optimizer that cannot be built, or rules that do not fit the parameters.
    """
    optimizer = make(OPTIMIZERS, config["optimizer"], where="optimizer")
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    trainable = rules.match(
        shapes, config.get("trainable", ((r"", True),)), where="trainable", prefix="params/"
    )
    transform = optimizer.build(config["steps"])

    def init(key: jax.Array, given: Mapping[str, Any]) -> states.TrainState:
        return states.create(init_from.insert(system.init(key), given), trainable, transform)

    abstract = jax.eval_shape(init, jax.random.key(0), {})
    places = sharding.state_shardings(abstract, config["sharding"], mesh)
    update = make_update(
        system,
        transform,
        trainable,
        seed=config["seed"],
        ema=config["ema"],
        accumulate=config.get("accumulate", 1),
        learning_rate=optimizer.learning_rate(config["steps"]),
    )
    everywhere, options = sharding.replicated(mesh), chips.compiler_options(mesh)
    jitted = jax.jit(
        update,
        in_shardings=(places, everywhere, sharding.batch_sharding(mesh)),
        out_shardings=(places, everywhere),
        donate_argnums=0,
        compiler_options=options,
    )
    return Program(shapes, init, placed(abstract, places), places, jitted, options or {})


def placed(shapes: Any, places: Any) -> Any:
    """Shapes that know where they lie."""
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )


def check_batch(config: Mapping[str, Any], mesh: jax.sharding.Mesh) -> None:
    """Refuses (UserError) a batch that devices and micro-batches cannot share evenly."""
    check_rows(config, sharding.data_parallel(mesh))


def check_rows(config: Mapping[str, Any], shards: int) -> None:
    """Refuses (UserError) a batch that so many data shards cannot share evenly."""
    batch = config["batch"]
    parts = shards * config.get("accumulate", 1)
    if batch % parts:
        nearest = max(round(batch / parts), 1) * parts
        raise UserError(
            f"config.batch = {batch}: must be a multiple of data shards x accumulate = "
            f"{shards} x {parts // shards}; the nearest is {nearest}."
        )

"""What a person sees while a model trains: fixed samples, drawn from the averaged parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jointseg_jax import build, sharding
from jointseg_jax.annotations import viz
from jointseg_jax.data.pipeline import evaluation_batches
from jointseg_jax.rng import sample_keys
from jointseg_jax.training import state as states
from jointseg_jax.types import UserError

Draw = Callable[[states.TrainState, Any], np.ndarray]


def previewer(
    system: Any,
    config: Mapping[str, Any],
    info: build.DatasetInfo,
    mesh: jax.sharding.Mesh,
    transforms: tuple[Any, ...],
    tokenizer: Any,
) -> Draw:
    """``draw(state, frozen) -> sheet``: the same validation records and seeds every time."""
    shards = sharding.data_parallel(mesh)
    count = shards * max(1, config["preview"]["count"] // shards)
    with evaluation_batches(
        build.source(config, "val"),
        batch=count,
        transforms=transforms,
        tokenizer=tokenizer.encode if tokenizer else None,
        host=jax.process_index(),
        hosts=jax.process_count(),
        instances=build.instances(config),
    ) as source:
        batch = sharding.global_batch(next(source), mesh)

    @jax.jit
    def pairs(params: Any, ema: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        keys = sample_keys(config["seed"], jnp.arange(count, dtype=jnp.uint32))
        made = system.preview(states.averaged(params, ema), frozen, batch, keys)
        return jax.lax.with_sharding_constraint(made, sharding.batch_sharding(mesh))

    def draw(state: states.TrainState, frozen: Any) -> np.ndarray:
        made = pairs(state.params, state.ema, frozen, batch)
        if jax.process_count() > 1:
            made = multihost_utils.process_allgather(made, tiled=True)
        made = jax.tree.map(np.asarray, made)
        return sheet(made, info)

    return draw


def sheet(
    made: Mapping[str, np.ndarray], info: build.DatasetInfo, *, columns: int = 8
) -> np.ndarray:
    """What was made as one picture: pairs, or only the half that there is.

    Raises:
      UserError: cached latents without their decoder, and no annotation either.
    """
    made = {k: list(rows) for k, rows in made.items()}
    if "labels" in made:
        unseen = [np.zeros((*labels.shape, 3), np.uint8) for labels in made["labels"]]
        return viz.pair_sheet(
            made.get("image", unseen),
            made["labels"],
            info.classes,
            segments=made.get("segments"),
        )
    if "image" not in made:
        raise UserError(
            "config.preview: this run makes cached latents alone, which cannot be drawn; set "
            "config.preview.every=0."
        )
    images = made["image"]
    scale = max(1, round(viz.READABLE / len(images[0])))
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    return viz.contact_sheet(rows, scale=scale)

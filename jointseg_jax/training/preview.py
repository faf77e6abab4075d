"""What a person sees while a model trains: fixed samples, drawn from the averaged parameters.

Of scenes that the oracle judges they are measured, too (``scene_report.glance``): few pairs, whose
figures show where training goes rather than where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jointseg_jax import build, chips, sharding
from jointseg_jax.annotations import viz
from jointseg_jax.config import RunConfig
from jointseg_jax.data.pipeline import evaluation_batches
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.data.tokenizer import Words
from jointseg_jax.evaluation.scene_report import glance, scene_source
from jointseg_jax.rng import sample_keys
from jointseg_jax.systems.system import Batch, Generator, Objective, Pairs
from jointseg_jax.training import state as states
from jointseg_jax.types import UserError


class Preview(NamedTuple):
    """What one call draws."""

    sheet: np.ndarray
    """Pairs, uint8 [height, width, 3]."""
    measures: dict[str, float]
    """Of these pairs, by name; none where no oracle judges them."""


class Previewer:
    """Draws the same validation records from the same seeds at every call.

    Args:
      mesh: the rows of a preview lie over all its devices.
      tokenizer: of the training data; None where text is no words.
    """

    def __init__(
        self,
        config: RunConfig,
        system: Objective,
        info: DatasetInfo,
        mesh: jax.sharding.Mesh,
        tokenizer: Words | None,
    ):
        shards = sharding.data_parallel(mesh)
        # every device draws as many rows as the others
        self._count = shards * max(1, config.preview.count // shards)
        self._system, self._seed, self._info = system, config.seed, info
        self.hint = what_to_look_at(system)
        self._rows = sharding.batch_sharding(mesh)
        self._pairs = jax.jit(self._made, compiler_options=chips.compiler_options(mesh))
        records = build.source(config, "val")
        self._scenes = scene_source(config)
        self._prompts: list[str] | None = None
        if self._scenes is not None and follows_record(system):
            indices = (min(i, len(records) - 1) for i in range(self._count))
            self._prompts = [self._scenes[i]["captions"][0] for i in indices]
        with evaluation_batches(
            records,
            config.data,
            batch=self._count,
            transforms=build.transforms(config.data),
            tokenizer=tokenizer.encode if tokenizer else None,
            host=jax.process_index(),
            hosts=jax.process_count(),
            instances=build.instances(config),
        ) as source:
            self._batch = sharding.global_batch(next(source), mesh)

    def _made(self, params: PyTree, ema: PyTree, frozen: PyTree, batch: Batch) -> Pairs:
        keys = sample_keys(self._seed, jnp.arange(self._count, dtype=jnp.uint32))
        made = self._system.preview(states.averaged(params, ema), frozen, batch, keys)
        return jax.lax.with_sharding_constraint(made, self._rows)

    def __call__(self, state: states.TrainState, frozen: PyTree) -> Preview:
        """What the averaged parameters make; every process draws its part."""
        made = self._pairs(state.params, state.ema, frozen, self._batch)
        if jax.process_count() > 1:
            made = multihost_utils.process_allgather(made, tiled=True)
        made = jax.tree.map(np.asarray, made)
        return Preview(sheet(made, self._info), self._measures(made))

    def _measures(self, made: Mapping[str, np.ndarray]) -> dict[str, float]:
        if self._scenes is None or "image" not in made:
            return {}
        return glance(made["image"], made.get("labels"), self._prompts, self._scenes)


def follows_record(system: Objective) -> bool:
    """Returns True if a preview shows what its record says: its text, its map or its image."""
    if not isinstance(system, Generator) or system.text is not None:
        return True
    try:
        system.check_condition(())
    except ValueError:  # it starts from what is given
        return True
    return False


def what_to_look_at(system: Objective) -> str:
    """What a person may expect of the first samples, in words."""
    if isinstance(system, Generator):
        return (
            "look at it: flat colours come first, then large areas, then blobs for the things, "
            "outlines last; is each image what the mask beside it says?"
        )
    return (
        "look at it: large areas come back first, edges last; is each image what the mask beside "
        "it says?"
    )


def sheet(made: Mapping[str, np.ndarray], info: DatasetInfo, *, columns: int = 8) -> np.ndarray:
    """What was made as one picture: pairs, or only the half that there is.

    Raises:
      UserError: cached latents without their decoder, and no annotation either.
    """
    parts = {k: list(rows) for k, rows in made.items()}
    if "labels" in parts:
        # a run from cached latents makes labels alone: their images stay black
        unseen = [np.zeros((*labels.shape, 3), np.uint8) for labels in parts["labels"]]
        images, segments = parts.get("image", unseen), parts.get("segments")
        return viz.pair_sheet(images, parts["labels"], info.classes, segments=segments)
    if "image" not in parts:
        raise UserError(
            "config.preview: this run makes cached latents alone, which cannot be drawn; set "
            "config.preview.every=0."
        )
    images = parts["image"]
    scale = max(1, round(viz.READABLE / len(images[0])))
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    return viz.contact_sheet(rows, scale=scale)

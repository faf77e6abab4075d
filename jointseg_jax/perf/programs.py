"""The real programs of a config, lowered for devices that need not exist.

Both are what the loops run: the update of ``training.step`` with the config's mesh, sharding,
trainable rules and optimizer, and the sampler of ``generation.sampler``, which splits rows over
all devices and keeps a whole copy of the parameters on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jointseg_jax import build, profiling, sharding
from jointseg_jax.config import RunConfig, SystemConfig
from jointseg_jax.generation.sampler import PER_DEVICE, jit_sample_batch, sampling_params
from jointseg_jax.perf import abstract
from jointseg_jax.perf.abstract import System
from jointseg_jax.perf.costs import ideal_bytes
from jointseg_jax.systems.system import LATENTS, Generator
from jointseg_jax.training.step import check_batch, make_train_step, with_shardings
from jointseg_jax.types import Params, UserError


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A program before the compiler has it."""

    program: Any  # jax.stages.Lowered
    mesh: tuple[int, ...]  # sizes of (data, fsdp, model)
    batch: int  # rows over all devices
    flops: float | None  # that the network needs for the batch by its sizes; None: unknown
    notes: tuple[str, ...]  # what was made up
    attention: float = 0.0  # part of ``flops`` that are scores and weighted sums
    lengths: tuple[int, ...] = ()  # numbers of tokens that attend to each other
    passes: float = 1.0  # of attention by a kernel, in units of ``flops``; see ``KERNEL_PASSES``
    ideal: int | None = None  # bytes of collectives that there must be on one chip; None: unknown


KERNEL_PASSES = {False: 3.5, True: 4.5}
"""Products of an attention kernel's update over those of its forward pass: 2 forward, 5 backward, 2
more where remat recomputes it."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What replaces data and runs that are not on this machine; see ``abstract``."""

    classes: int | None = None  # number of made-up classes
    codec: SystemConfig | None = None  # of the run that would train a codec
    cached: bool = False  # training reads latents of a cache that is still to be made


def lower_training(
    config: RunConfig,
    devices: Sequence[jax.Device],
    *,
    missing: Missing,
    per_chip: int | None = None,
) -> Lowered:
    """The update of a training run.

    Args:
      per_chip: rows for each data-parallel shard, instead of ``config.batch``.

    Raises:
      UserError: what would refuse the run too: mesh, batch, rules, fields.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    if per_chip is not None:
        config = config.replace({"batch": per_chip * sharding.data_parallel(mesh)})
    try:
        check_batch(config, mesh)
    except UserError as error:
        raise UserError(f"{error} Or give rows per chip: --batch_per_chip=N.") from error
    system, frozen, note = _system(config, missing)
    # The same function that training calls, so that the program is the run's to the letter.
    program, cached = make_train_step(system, config, mesh), frozen if missing.cached else None
    batch = abstract.training_shapes(config, system, config.batch, cached)
    # Codecs are whole on every chip.
    everywhere, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        lowered = program.update.lower(program.state, _at(frozen, everywhere), _at(batch, rows))
    denoiser = getattr(system, "denoiser", None)
    latents = [name.removeprefix(LATENTS) for name in batch if name.startswith(LATENTS)]
    return Lowered(
        program=lowered,
        mesh=tuple(mesh.devices.shape),
        batch=config.batch,
        flops=profiling.training_flops(system, config.batch),
        notes=(note, *_named("latents read from a cache: ", latents)),
        attention=profiling.attention_share(system),
        lengths=profiling.lengths(system),
        passes=KERNEL_PASSES[getattr(denoiser, "remat", "none") == "full"] / 3.0,
        ideal=ideal_bytes(program, getattr(denoiser, "dtype", jnp.float32)),
    )


def lower_sampling(
    config: RunConfig,
    devices: Sequence[jax.Device],
    *,
    missing: Missing,
    per_chip: int | None = None,
    steps: int | None = None,
    given: str | None = None,
) -> Lowered:
    """The sampler of a trained run.

    Args:
      per_chip: pairs on each device.
      steps: of the solver, instead of the config's.
      given: ``image`` or ``labels``: the batch field to start from.

    Raises:
      UserError: the config makes no pairs, or it must be given something else.
    """
    # Sampling splits rows alone: every chip has the whole network.
    mesh = sharding.make_mesh((-1, 1, 1), devices)
    system, frozen, note = _system(config, missing)
    system = abstract.sampling_system(system, steps, given)
    batch = (per_chip or PER_DEVICE) * len(devices)
    fields = abstract.batch_shapes(config, system, batch)
    known = {given: fields[given]} if given else {}
    # Shapes alone: a billion parameters are never in this machine's memory.
    params = jax.eval_shape(
        lambda key: sampling_params(system, system.init(key)), jax.random.key(0)
    )
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    text = fields["text"] if system.text is not None else None
    indices, seed = (jax.ShapeDtypeStruct(shape, jnp.uint32) for shape in ((batch,), ()))
    with jax.set_mesh(mesh):
        lowered = jit_sample_batch(system, mesh).lower(
            *_at((params, frozen), everywhere),
            *_at((text, known), rows),
            _at(seed, everywhere),
            _at(indices, rows),
        )
    each = profiling.sampling_flops(system, known)
    kinds = {name: stream.codec.kind for name, stream in system.streams.items()}
    latents = [name for name, kind in kinds.items() if kind == "latents" and name != "text"]
    return Lowered(
        program=lowered,
        mesh=tuple(mesh.devices.shape),
        batch=batch,
        flops=each * batch if each else None,
        notes=(note, *_named("not decoded, for their latents were cached: ", latents)),
        attention=profiling.attention_share(system),
        lengths=profiling.lengths(system),
        ideal=0,  # rows do not meet
    )


def _system(config: RunConfig, missing: Missing) -> tuple[System | Generator, Params, str]:
    """The system, the shapes of its frozen parameters, and what was made up."""
    info = abstract.dataset_info(config, missing.classes)
    codecs = abstract.codecs(config, info, missing.codec)
    words = f"{len(info.vocabulary)} words" if info.vocabulary else "no words"
    note = f"{len(info.classes)} classes, {words}"
    return build.system(config.system, info, codecs.specs), codecs.frozen, note


def _named(text: str, names: Sequence[str]) -> tuple[str, ...]:
    return (text + ", ".join(names),) if names else ()


def _at(shapes: PyTree, place: jax.sharding.NamedSharding) -> PyTree:
    """The shapes, all of them with one sharding."""
    return with_shardings(shapes, jax.tree.map(lambda _: place, shapes))

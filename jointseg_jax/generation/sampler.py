"""Batches of pairs on the devices of one process: solver, decoders and uint8 in one jitted call.

The batch size is the same at every call (a short last batch is filled up), so there is one
compilation. Several processes take the batches in turn, each on its own devices, without exchanging
anything: a pair depends on (seed, index) alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax import chips, rules, sharding
from jointseg_jax.rng import sample_keys
from jointseg_jax.systems.system import Generator, Pairs
from jointseg_jax.training.workdir import Run
from jointseg_jax.types import Array, Params, UserError, require_seed

Item = TypeVar("Item")

Text = np.ndarray | None  # a row of token ids or features per index; None for a run without text
Fields = Mapping[str, np.ndarray]  # batch fields to start from, a row per index

PER_DEVICE = 16  # pairs that a device makes at a time
ANNOTATIONS = {"labels", "panoptic"}  # kinds of codecs that decode to labels

ROUNDED = (
    r"^denoiser/.*(in_blocks|mid_block|out_blocks)/(\d+/)?(attn|mlp|join|join_skip|kernel|bias)\b"
)
"""Paths of the parameters that blocks round; the last two are the exchange's of two streams."""


def with_options(system: object, *, steps: int | None, guidance: float | None) -> Generator:
    """Returns the system with another number of solver steps, or one guidance for all streams.

    Raises:
      UserError: the system makes no pairs, or cannot take these options.
    """
    if not isinstance(system, Generator):
        raise UserError("this workdir holds a codec; pairs are sampled from a joint or bridge run.")
    kinds = {k: s.codec.kind for k, s in system.streams.items()}
    # A bridge has no streams, and always both ends.
    if kinds and ("image" not in kinds.values() or not ANNOTATIONS & set(kinds.values())):
        raise UserError(
            f"the streams of this run decode to {kinds}; sampling writes an image and its labels. "
            "A run on cached latents needs an image codec that can decode them instead."
        )
    if guidance is not None and system.text is None:
        raise UserError("--guidance: this run has no text to be guided by; leave it out.")
    # Solvers and streams check their own fields: what they refuse is a mistake in the flags here.
    try:
        if steps is not None:
            solver = dataclasses.replace(system.solver, steps=steps)
            system = dataclasses.replace(system, solver=solver)
        if guidance is not None:
            streams = system.streams.items()
            guided = {k: dataclasses.replace(s, guidance=guidance) for k, s in streams}
            system = dataclasses.replace(system, streams=guided)
        return system
    except ValueError as error:
        raise UserError(f"--steps {steps}, --guidance {guidance}: {error}") from error


def sampling_params(system: object, params: Params) -> Params:
    """Returns the parameters as the network multiplies by them: half the memory, the same pairs.

    A network of dtype bfloat16 rounds the kernels of its blocks before every product; here that is
    done once. Norms and what is outside the blocks compute in float32 and stay.
    """
    dtype = getattr(getattr(system, "denoiser", None), "dtype", None)
    if dtype is None or jnp.dtype(dtype).itemsize != 2:
        return params
    # Rounding twice changes nothing, so what the network rounds again stays equal bit for bit.
    return jax.tree_util.tree_map_with_path(
        lambda p, x: jnp.asarray(x, dtype) if re.search(ROUNDED, rules.path_of(p)) else x, params
    )


def jit_sample_batch(system: Generator, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """Returns jitted ``(params, frozen, text, condition, seed, indices) -> pairs``.

    Text (ids or features of the prompts, None without any) and the batch fields of the condition
    have a row per index; the rows lie over the mesh.
    """

    def sample_batch(
        params: Params,
        frozen: Params,
        text: Array | None,
        condition: Mapping[str, Array],
        seed: Array,
        indices: Array,
    ) -> Pairs:
        # The key of a pair follows from (seed, index), not from the batch, device or process.
        keys = sample_keys(seed, indices)
        pairs = system.generate(params, frozen, text, keys, condition=dict(condition))
        return jax.lax.with_sharding_constraint(pairs, sharding.batch_sharding(mesh))

    return jax.jit(sample_batch, compiler_options=chips.compiler_options(mesh))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """Makes the pairs of given indices on the devices of this process."""

    sample_batch: Callable[..., Pairs]
    """(params, frozen, text, condition, seed, indices) -> pairs, jitted or compiled."""
    mesh: jax.sharding.Mesh
    params: Params  # on every device, as ``sampling_params`` returns them
    frozen: Params  # of the codecs, on every device
    batch_size: int  # number of indices of a call; another number would be compiled again

    def __call__(self, seed: int, indices: np.ndarray, text: Text, condition: Fields) -> Pairs:
        """Starts a batch and returns its pairs before they are done; {} without indices."""
        if not len(indices):
            return {}
        # The mesh is set for ``sharding.constrain``, which does nothing outside of one.
        with jax.set_mesh(self.mesh):
            inputs = self.inputs(seed, indices, text, condition)
            return self.sample_batch(self.params, self.frozen, *inputs)

    def inputs(
        self, seed: int, indices: np.ndarray, text: Text, condition: Fields
    ) -> tuple[Any, ...]:
        """Returns text, condition, seed and indices of a batch, each row on its device."""
        require_seed("seed", seed)
        rows = sharding.batch_sharding(self.mesh)
        values = jax.device_put((text, condition, indices.astype(np.uint32)), rows)
        return *values[:2], jnp.uint32(seed), values[2]


def make_sampler(run: Run, system: Generator, *, per_device: int = PER_DEVICE) -> Sampler:
    """Returns the sampler of a trained run; ``system`` is the run's, or one ``with_options``."""
    mesh = sharding.own_mesh()
    params = sampling_params(system, run.params)
    params, frozen = jax.device_put((params, run.frozen), sharding.replicated(mesh))
    jitted, size = jit_sample_batch(system, mesh), per_device * mesh.size
    return Sampler(sample_batch=jitted, mesh=mesh, params=params, frozen=frozen, batch_size=size)


class PendingBatch(NamedTuple):
    """Indices of a whole batch, and which of them are needed."""

    indices: np.ndarray
    needed: np.ndarray


def pending_batches(
    start: int,
    stop: int,
    batch_size: int,
    is_needed: Callable[[np.ndarray], np.ndarray] = lambda indices: indices >= 0,
) -> Iterator[PendingBatch]:
    """Yields the batches that this process is to make of the pairs ``start .. stop - 1``, in order.

    All processes get the same number of batches, the last of which may be empty.

    Args:
      is_needed: marks the indices whose pairs are not there; batches without any are left out.
    """
    # From a multiple of the batch on: a run that goes on makes the batches of one that was not
    # interrupted, and with the same rows beside it a pair has the same bytes.
    firsts = range(start - start % batch_size, stop, batch_size)
    batches = (np.arange(first, first + batch_size) for first in firsts)
    marked = (PendingBatch(i, is_needed(i) & (i >= start) & (i < stop)) for i in batches)
    pending = (batch for batch in marked if batch.needed.any())
    # A round is one batch for each process; all processes know all rounds.
    while batches_of_round := list(itertools.islice(pending, jax.process_count())):
        own = batches_of_round[jax.process_index() :][:1]
        yield own[0] if own else PendingBatch(np.arange(0), np.zeros(0, bool))


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yields each item after the one that follows it was asked for.

    Of batches on the devices: the next one is being made while the reader writes this one.
    """
    # Both loops draw from one iterator: the inner one takes all that follows the first item.
    rest = iter(items)
    for item in rest:
        for ahead in rest:
            yield item
            item = ahead
        yield item

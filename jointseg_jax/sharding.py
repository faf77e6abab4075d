"""Where arrays live on a device mesh.

``make_mesh`` builds the mesh ``(data, fsdp, model)`` of a run. ``state_shardings`` gives every leaf
of a train state its place by path rules whose values are tactics:

| tactic | meaning |
|---|---|
| ``"replicate"`` | a whole copy on every device |
| ``"fsdp"`` | split over mesh axis ``fsdp`` along the largest axis that divides evenly |
| ``"zero"`` | as ``fsdp`` but over ``data`` and ``fsdp`` together (optimizer state, ZeRO-1) |
| a tuple | an explicit ``PartitionSpec``, of one layer where layers are scanned |

Small tensors, and those without an axis that divides evenly, are replicated by every tactic.

``constrain`` names the axes of an activation by meaning; the table below says which mesh axes
each meaning may use. Only the mesh axes that exist take part, so that one network serves a laptop
and a pod.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jointseg_jax import rules
from jointseg_jax.types import UserError

AXES = ("data", "fsdp", "model")
Leaf = jax.Array | np.ndarray | jax.ShapeDtypeStruct

SMALL = 2**16
"""Tensors with fewer elements are replicated by the ``fsdp`` and ``zero`` tactics."""

FSDP: rules.Rules = (
    # positions, embeddings and heads are small, and activations would take their layout over
    (r"/position$|/\w+_(in|out)/", "replicate"),
    (r"^(params|opt|ema)/", "fsdp"),
    (r"", "replicate"),
)

HEADS_AND_HIDDEN: rules.Rules = (
    (r"/attn/qkv/kernel$", ("fsdp", None, "model", None)),
    (r"/attn/qkv/bias$", (None, "model", None)),
    (r"/attn/out/kernel$", ("model", None, "fsdp")),
    (r"/mlp/fc1/kernel$", ("fsdp", "model")),
    (r"/mlp/fc1/bias$", ("model",)),
    (r"/mlp/fc2/kernel$", ("model", "fsdp")),
)
"""Tensor parallelism: heads and hidden units over ``model``, two sums over it in each block."""

PRESETS: Mapping[str, rules.Rules] = {
    "replicate": ((r"", "replicate"),),
    "zero1": ((r"^(opt|ema)/", "zero"), (r"", "replicate")),
    "fsdp": FSDP,
    "fsdp+model": (*HEADS_AND_HIDDEN, *FSDP),
}
"""Sharding rules by name; a config may also give its own list."""

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": (),
    "width": (),
    "heads": ("model",),
}
"""Mesh axes over which an activation axis of this meaning is split."""


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pins the layout of an activation; does nothing outside ``jax.set_mesh``.

    Flax's ``with_logical_constraint`` was rejected: it replicates on a misspelt axis and is
    silently inert under ``with mesh:``.

    Args:
      axes: one name of ``LOGICAL_AXES`` per axis of ``x``.

    Raises:
      ValueError: an unknown name (checked without a mesh too), or not one name per axis.
    """
    unknown = [a for a in axes if a not in LOGICAL_AXES]
    if unknown:
        raise ValueError(
            f"constrain: axis {unknown[0]!r} is unknown; "
            f"the names are {', '.join(LOGICAL_AXES)} (sharding.LOGICAL_AXES)."
        )
    if len(axes) != x.ndim:
        raise ValueError(f"constrain: {len(axes)} names {axes} for an array of shape {x.shape}.")
    if jax.sharding.get_abstract_mesh().empty:
        return x  # one device, or tests of a network alone
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[free_axes(a) or None for a in axes]))


def free_axes(meaning: str) -> tuple[str, ...]:
    """The axes of the mesh in force that split an activation axis of this meaning.

    An axis that ``shard_map`` has made manual is split already: the block sees its own part only.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    manual = AxisType.Manual
    return tuple(n for n in LOGICAL_AXES[meaning] if kinds.get(n, manual) != manual)


def shards_of(meaning: str) -> int:
    """Parts into which the mesh in force splits an activation axis of this meaning; none: 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[n] for n in free_axes(meaning))


def on_shards(run: Callable, *axes: tuple[str, int] | None) -> Callable:
    """``run`` on each device's own part of its arguments, and of what it returns.

    Args:
      axes: of every argument: a name of ``LOGICAL_AXES`` and how many units can be shared, or None.
        What does not divide evenly stays whole, and each device computes all of it.
    """
    if all(axis is None or shards_of(axis[0]) == 1 for axis in axes):
        return run  # no mesh, or a shard_map has split them already

    def split(axis: tuple[str, int] | None) -> tuple[str, ...] | None:
        return free_axes(axis[0]) if axis and axis[1] % shards_of(axis[0]) == 0 else None

    spec = PartitionSpec(*map(split, axes))
    return jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=False)


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh ``(data, fsdp, model)``; one entry may be -1 and takes the devices left over.

    ``jax.make_mesh`` was rejected: its axes are Explicit by default, which refuses activation
    constraints, and it silently leaves devices unused.

    Raises:
      UserError: the product of the shape is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_sizes(shape)
    fixed = math.prod(n for n in shape if n != -1)
    if -1 in shape and len(devices) % fixed == 0:
        shape = tuple(len(devices) // fixed if n == -1 else n for n in shape)
    if math.prod(n if n > 0 else 1 for n in shape) != len(devices):
        raise UserError(
            f"config.mesh = {shape} {AXES}: its product must be the number of devices, "
            f"{len(devices)}; for example ({len(devices)}, 1, 1) or (-1, 1, 1)."
        )
    # model is innermost: its all-reduces, two in each block, run between neighbouring devices
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(shape: Sequence[object]) -> tuple[int, ...]:
    """The sizes of a mesh as they are written, -1 still in its place.

    Raises:
      UserError: they are not three sizes of which one may be -1.
    """
    shape = tuple(shape)
    sizes = tuple(n for n in shape if isinstance(n, int) and (n >= 1 or n == -1))
    if sizes != shape or len(sizes) != len(AXES) or sizes.count(-1) > 1:
        raise UserError(f"config.mesh = {shape}: give three sizes {AXES}; one of them may be -1.")
    return sizes


def own_mesh() -> Mesh:
    """A mesh ``(data, fsdp, model)`` of this process's devices, with rows over all of them."""
    return make_mesh((-1, 1, 1), jax.local_devices())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over every data-parallel axis."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_AXES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def global_batch(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The batch of all hosts from the rows of this one; what only the host needs stays out."""
    sharding = batch_sharding(mesh)
    return {
        k: jax.make_array_from_process_local_data(sharding, v)
        for k, v in rows.items()
        if k not in ("index", "valid")
    }


def data_parallel(mesh: Mesh) -> int:
    """Number of shards of a batch."""
    return math.prod(mesh.shape[a] for a in LOGICAL_AXES["batch"])


def preset_rules(preset: str | rules.Rules) -> rules.Rules:
    """The rules that a preset's name stands for; rules stand for themselves.

    Raises:
      UserError: an unknown name.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise UserError(f"config.sharding = {preset!r} is unknown; one of: {', '.join(PRESETS)}.")
    return PRESETS[preset] if isinstance(preset, str) else preset


def state_shardings(shapes: PyTree, preset: str | rules.Rules, mesh: Mesh | AbstractMesh) -> PyTree:
    """A ``NamedSharding`` per leaf of ``shapes`` (arrays or ``ShapeDtypeStruct``).

    Raises:
      UserError: an unknown preset or tactic, or rules that do not cover the leaves.
    """
    own_rules = preset_rules(preset)
    leaves, structure = jax.tree.flatten(shapes)
    # tactics may be tuples, and so may the state's own nodes (optax): only its structure can tell
    matched = rules.match(shapes, own_rules, where="sharding", dead="allow")
    names, tactics = rules.paths(shapes), structure.flatten_up_to(matched)
    specs = [_spec(*x, mesh) for x in zip(names, leaves, tactics, strict=True)]
    return jax.tree.unflatten(structure, [NamedSharding(mesh, s) for s in specs])


def _spec(
    path: str, leaf: Leaf, tactic: str | Sequence[Any], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    # the leading axis of scanned blocks counts layers: splitting it would serialise the scan
    scanned = "_blocks/" in path and not path.split("_blocks/")[1][0].isdigit()
    if isinstance(tactic, tuple | list):  # a list where the config went through JSON
        entries = [tuple(a) if isinstance(a, list) else a for a in tactic]
        if scanned and leaf.ndim == len(entries) + 1:
            # an explicit spec is that of one layer
            entries = [None, *entries]
        return _checked(path, leaf, PartitionSpec(*entries), mesh)
    if tactic == "replicate":
        return PartitionSpec()
    if tactic not in ("fsdp", "zero"):
        raise UserError(
            f"sharding rules: {path}: tactic {tactic!r} is none of replicate, fsdp, zero."
        )
    axes = ("fsdp",) if tactic == "fsdp" else LOGICAL_AXES["batch"]
    parts = math.prod(mesh.shape[a] for a in axes)
    first = 1 if scanned and leaf.ndim > 1 else 0
    divisible = [i for i in range(first, leaf.ndim) if leaf.shape[i] % parts == 0]
    if parts == 1 or not divisible or math.prod(leaf.shape) < SMALL:
        return PartitionSpec()
    largest = max(divisible, key=lambda i: leaf.shape[i])
    return PartitionSpec(*[axes if i == largest else None for i in range(leaf.ndim)])


def _checked(
    path: str, leaf: Leaf, spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """An explicit spec whose every axis divides evenly."""
    for size, entry in zip(leaf.shape, spec):
        axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        parts = math.prod(mesh.shape[a] for a in axes)
        if size % parts:
            raise UserError(
                f"config.sharding: {path} {tuple(leaf.shape)} is to be split as {spec}, but "
                f"{size} does not divide into {parts} parts; change config.mesh = "
                f"{tuple(mesh.shape.values())} {AXES}, or the rule."
            )
    return spec

"""A state tree as arrays on disk: what is written for each leaf and how it comes back.

Orbax stores numbers only. A typed PRNG key is stored as its key data, an empty array not at all;
both come back from the abstract leaf. Every path is a chain of names, so the file reads as a
nested dict in any Orbax program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jointseg_jax.rules import path_of
from jointseg_jax.training import digest
from jointseg_jax.types import UserError

Leaves = dict[str, tuple[tuple[str, ...], Any]]
"""``{path: (the names on the way to it, leaf)}``."""

_SHOWN = 10
_PASSING = (
    "out of memory",
    "resource_exhausted",
    "unavailable",
    "deadline_exceeded",
    "permission",
    "unauthenticated",
    "too many open files",
)


class Damage(Exception):
    """Why a checkpoint cannot be used: ``cause`` is one word, the text says more."""

    def __init__(self, cause: str, text: str):
        super().__init__(text)
        self.cause = cause


def leaves(tree: Any) -> Leaves:
    """The leaves of a tree of arrays (or shapes) by path."""
    found: Leaves = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = path_of(key_path)
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            raise ValueError(f"checkpoints: {path} is a {type(leaf).__name__}, not a jax array.")
        if path in found:
            raise ValueError(f"checkpoints: two leaves have the path {path}.")
        found[path] = (tuple(path_of([key]) for key in key_path), leaf)
    return found


def within(paths: Iterable[str], prefixes: Sequence[str]) -> set[str]:
    """Those of ``paths`` that lie under one of ``prefixes``; all of them if there is none."""
    return {p for p in paths if not prefixes or any(f"{p}/".startswith(f"{q}/") for q in prefixes)}


def encode(state: Leaves) -> dict[str, Any]:
    """The nested dict of plain arrays that Orbax writes."""
    return _nest(
        (names, jax.random.key_data(x) if digest.is_key(x) else x)
        for names, x in state.values()
        if x.size
    )


def read(folder: epath.Path, wanted: Leaves) -> dict[str, jax.Array]:
    """The arrays ``wanted`` (abstract, with shardings) by path; nothing else is allocated.

    Raises:
      Damage: the files are incomplete or unreadable, found by any process.
    """
    stored = {path: (names, _stored(x)) for path, (names, x) in wanted.items() if x.size}
    item = _nest(stored.values())
    how = jax.tree.map(
        lambda s: ocp.ArrayRestoreArgs(sharding=s.sharding, global_shape=s.shape, dtype=s.dtype),
        item,
    )
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    # the handler and not the manager, whose barriers would hang when one process alone fails
    restored = _agreed(lambda: ocp.PyTreeCheckpointHandler().restore(folder, args=arguments))
    arrays = {path: array for path, (_, array) in leaves(restored).items()}
    return {path: _decode(arrays.get(path), x) for path, (_, x) in wanted.items()}


def require_fit(saved: Mapping[str, str], wanted: Mapping[str, str], where: str) -> None:
    """Refuses, leaf by leaf, when the saved arrays are not those of this model."""
    absent = "absent"
    lines = [
        f"  {path}: {saved.get(path, absent)} saved, {wanted.get(path, absent)} wanted"
        for path in sorted({*saved, *wanted})
        if saved.get(path) != wanted.get(path)
    ]
    if lines:
        shown = "\n".join(lines[:_SHOWN])
        more = f"\n  ... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise UserError(
            f"checkpoint {where} does not fit this model, {len(lines)} arrays differ:\n{shown}{more}\n"
            "Restore the settings it was made with, or choose another --workdir."
        )


def _nest(items: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for names, value in items:
        node = tree
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = value
    return tree


def _stored(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of the array on disk that becomes ``leaf``."""
    place = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if not digest.is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    if isinstance(place, jax.sharding.NamedSharding):
        axes = [*place.spec, *[None] * (data.ndim - len(place.spec))]
        place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=place)


def _decode(array: jax.Array | None, leaf: Any) -> jax.Array:
    stored = _stored(leaf)
    if array is None:
        array = jnp.zeros(stored.shape, stored.dtype, device=stored.sharding)
    if not digest.is_key(leaf):
        return array
    return jax.random.wrap_key_data(array, impl=_key_impl(leaf))


def _key_impl(leaf: Any) -> Any:
    found: list[Any] = []  # ``key_impl`` takes arrays and tracers only
    jax.eval_shape(lambda k: found.append(jax.random.key_impl(k)), leaf)
    return found[0]


def _agreed(action: Callable[[], Any]) -> Any:
    """The result of ``action``; damage in the files seen by one process is damage for all."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    failed = failure is not None
    if jax.process_count() > 1:
        failed = bool(np.any(multihost_utils.process_allgather(np.asarray(failed))))
    if failure is not None and _is_passing(failure):
        raise failure  # the checkpoint may be whole: memory, permission or network are at fault
    if failed:
        raise Damage("unreadable", first_line(failure or "another process could not read it"))
    return result


def _is_passing(error: Exception) -> bool:
    text = str(error).lower()
    kinds = (MemoryError, PermissionError, TypeError, AttributeError, NotImplementedError)
    return isinstance(error, kinds) or any(word in text for word in _PASSING)


def first_line(error: object) -> str:
    """The start of an error's text, for one line of a log."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."

"""A state tree as arrays on disk: what is written for each leaf and how it comes back.

Orbax stores numbers only. A typed PRNG key is stored as its key data, an empty array not at all;
both come back from the abstract leaf. The file reads as a nested dict in any Orbax program. Beside
the arrays lies one JSON object, sealed by its SHA-256, with every leaf's dtype, shape and digest.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from jointseg_jax import distributed
from jointseg_jax.rules import by_path, nested, path_of
from jointseg_jax.training import digest
from jointseg_jax.types import UserError

Leaf = jax.Array | jax.ShapeDtypeStruct
Leaves = Mapping[str, Leaf]
"""Arrays, or their shapes, by path."""

Meta = dict[str, Any]
"""The JSON object beside the arrays: what the caller gave, ``step`` and ``checkpoint``."""

MAX_LISTED = 10  # arrays that an error names at most

# parts of messages that say nothing about the files: another attempt may succeed
_PASSING = re.compile(
    "RESOURCE_EXHAUSTED|Out of memory|Too many open files|UNAVAILABLE|DEADLINE_EXCEEDED|"
    "PERMISSION_DENIED|UNAUTHENTICATED"
)


class Damage(Exception):
    """Why a checkpoint cannot be used: ``cause`` is one word, the text says more."""

    def __init__(self, cause: str, text: str):
        super().__init__(text)
        self.cause = cause


def leaves(tree: PyTree) -> Leaves:
    """The leaves of a tree of arrays (or shapes) by path."""
    found: dict[str, Leaf] = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = path_of(key_path)
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            raise ValueError(f"checkpoints: {path} is a {type(leaf).__name__}, not a jax array.")
        if path in found:  # keys 1 and "1", say
            raise ValueError(f"checkpoints: two leaves have the path {path}.")
        found[path] = leaf
    return found


def within(paths: Iterable[str], prefixes: Sequence[str]) -> set[str]:
    """Those of ``paths`` that lie under one of ``prefixes``; all of them if there is none."""
    return {p for p in paths if not prefixes or any(f"{p}/".startswith(f"{q}/") for q in prefixes)}


def encode(state: Leaves) -> PyTree:
    """The nested dict of plain arrays that Orbax writes; empty arrays are left out."""

    def stored(x: Leaf) -> Leaf:
        return jax.random.key_data(x) if isinstance(x, jax.Array) and digest.is_key(x) else x

    return nested({path: stored(x) for path, x in state.items() if x.size})


def read(folder: epath.Path, wanted: Leaves) -> dict[str, jax.Array]:
    """The arrays ``wanted`` (abstract, with shardings) by path; nothing else is allocated.

    Raises:
      Damage: the files are incomplete or unreadable, found by any process.
    """
    item = nested({path: _stored(x) for path, x in wanted.items() if x.size})
    how = jax.tree.map(
        lambda s: ocp.ArrayRestoreArgs(sharding=s.sharding, global_shape=s.shape, dtype=s.dtype),
        item,
    )
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    # the handler, not the manager, whose barriers would hang when one process alone fails
    restored = _agreed(lambda: ocp.PyTreeCheckpointHandler().restore(folder, args=arguments))
    # what the files lack comes back as the shape that was asked for
    arrays = {p: x for p, x in by_path(restored).items() if isinstance(x, jax.Array)}
    return {path: _decode(arrays.get(path), x) for path, x in wanted.items()}


def require_fit(saved: Mapping[str, str], wanted: Mapping[str, str], where: str) -> None:
    """Refuses, leaf by leaf, when the saved arrays are not those of this model."""
    lines = [
        f"  {path}: {saved.get(path, 'absent')} saved, {wanted.get(path, 'absent')} wanted"
        for path in sorted({*saved, *wanted})
        if saved.get(path) != wanted.get(path)
    ]
    if lines:
        shown = "\n".join(lines[:MAX_LISTED])
        more = f"\n  ... and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
        raise UserError(
            f"checkpoint {where} does not fit this model, {len(lines)} arrays differ:\n{shown}"
            f"{more}\nRestore the settings it was made with, or choose another --workdir."
        )


def sealed(
    step: int, meta: Mapping[str, object], leaves: Leaves, digests: Mapping[str, str]
) -> Meta:
    """What the caller says about a state and what identifies each of its arrays, signed."""
    if "checkpoint" in meta or meta.get("step", step) != step:  # they would be overwritten
        raise ValueError("checkpoints: meta may not hold `checkpoint` or another `step`.")
    rows = {path: (digest.describe(x), digests[path]) for path, x in leaves.items()}
    own = {"format": 1, "digest": digest.tree_digest(rows), "leaves": rows}
    # through JSON, so that the seal is that of what will be read: tuples become lists there
    content = json.loads(json.dumps({**meta, "step": step, "checkpoint": own}))
    content["checkpoint"]["seal"] = _seal(content)
    return content


def _seal(content: Meta) -> str:
    own = {k: v for k, v in content["checkpoint"].items() if k != "seal"}
    text = json.dumps({**content, "checkpoint": own}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_sealed(folder: epath.Path) -> Meta:
    """The JSON object of one step folder, as it was written.

    Raises:
      Damage: it is missing, no JSON, or not what was written.
    """
    try:
        content = json.loads((folder / "meta" / "metadata").read_text())
        whole = content["checkpoint"]["seal"] == _seal(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damage("metadata", f"meta/metadata: {first_line(error)}") from error
    if not whole:
        raise Damage("metadata", "meta/metadata was changed after it was written")
    return content


def _stored(leaf: Leaf) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of the array on disk that becomes ``leaf``."""
    place = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if not digest.is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    # a key array has further axes as data, [..., words of a key], which stay whole on each device
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    if isinstance(place, jax.sharding.NamedSharding):
        axes = [*place.spec, *[None] * (data.ndim - len(place.spec))]
        place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=place)


def _decode(array: jax.Array | None, leaf: Leaf) -> jax.Array:
    stored = _stored(leaf)
    if array is None:  # it is empty, or lost, which its digest then tells
        array = jnp.zeros(stored.shape, stored.dtype, device=stored.sharding)
    if not digest.is_key(leaf):
        return array
    impl: list[Any] = []  # threefry, rbg, ...; ``key_impl`` takes no shapes: it is asked in a trace
    jax.eval_shape(lambda k: impl.append(jax.random.key_impl(k)), leaf)
    return jax.random.wrap_key_data(array, impl=impl[0])


def _agreed(action: Callable[[], PyTree]) -> PyTree:
    """The result of ``action``, if it succeeds on every process.

    Raises:
      Damage: one process found the files damaged; on all of them, so that all try the same step.
    """
    result, found, failure = None, "", None
    try:
        result = action()
    except Exception as error:
        passing = "passing" if _is_passing(error) else "damage"
        found, failure = f"{passing}: {first_line(_root(error))}", error
    first = next(filter(None, distributed.gather(found)), "")  # of the processes that failed
    kind, _, text = distributed.share(first).partition(": ")
    if kind == "passing":  # the files may be whole: memory, permission or network are at fault
        # not damage: a run must not set good checkpoints aside because a disk was away
        raise failure or RuntimeError(f"another process could not read the checkpoint: {text}")
    if kind:
        # The error holds the frames of reads that were never awaited; collected later, each would
        # print a traceback outside of `quiet`.
        failure = None
        gc.collect()
        raise Damage("unreadable", text)
    return result


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps reads that a failure left behind from printing their 60 lines each when collected."""
    old = sys.unraisablehook

    def hook(event: Any) -> None:  # sys.UnraisableHookArgs, which only type checkers can name
        text = str(event.exc_value)
        if not any(word in text for word in ("TensorStore", "Event loop is closed")):
            old(event)

    sys.unraisablehook = hook
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        sys.unraisablehook = old


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_passing(error: Exception) -> bool:
    root = _root(error)
    # TypeError and the two after it are mistakes in a program, not damage in a file
    kinds = (MemoryError, PermissionError, TypeError, AttributeError, NotImplementedError)
    return isinstance(root, kinds) or _PASSING.search(str(root)) is not None


def first_line(error: object) -> str:
    """The start of an error's text, for one line of a log."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."

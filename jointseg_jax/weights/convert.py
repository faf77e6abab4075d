"""Reference weights to our parameters and back, by a table, with every tensor accounted for.

A table is a list of ``Entry``: some reference tensors, some of ours, and the change of layout
between them. Layouts only move numbers, so that both directions are exact. Numpy arrays in, numpy
float32 arrays out. Files are safetensors only: a pickle can run code.

``stack_blocks`` and ``unstack_blocks`` turn the parameters of an unrolled network into those of a
scanned one and back; a half that is in the wanted form already stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax.rules import by_path, nested
from jointseg_jax.types import AnyArray, Params, UserError

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # zip (torch.save), and pickle protocol 2 or later
MAX_LISTED = 5  # tensors of each kind that an error names at most

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a group of reference arrays turns into a group of ours, and back."""

    ours: Callable[..., Sequence[Any]]
    theirs: Callable[..., Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Reference tensors ``theirs`` <-> our parameter paths ``ours``."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class Table:
    """All entries of one model in one reference layout."""

    name: str
    entries: tuple[Entry, ...]
    shapes: Mapping[str, tuple[int, ...]]  # of our parameters by path, blocks unrolled
    idle: tuple[str, ...] = ()  # reference tensors that a file may hold and that nothing uses

    def __post_init__(self) -> None:
        ours = [path for entry in self.entries for path in entry.ours]
        theirs = [key for entry in self.entries for key in entry.theirs]
        uncovered = set(ours) ^ set(self.shapes)
        # Compared with the lengths: a parameter named twice would be moved twice.
        if uncovered or len(set(ours)) != len(ours) or len(set(theirs)) != len(theirs):
            raise ValueError(
                f"Table {self.name!r} does not cover the model's parameters once each: "
                f"{sorted(uncovered)[:MAX_LISTED]}; fix the table (weights/tables.py)."
            )

    def reference_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the reference tensors that this model would have."""
        # Traced, not computed: a layout knows the shapes that it makes.
        ours = {p: jax.ShapeDtypeStruct(s, np.float32) for p, s in self.shapes.items()}
        theirs = jax.eval_shape(lambda flat: _apply(self, flat, "theirs"), ours)
        return {key: value.shape for key, value in theirs.items()}


def to_ours(weights: Weights, table: Table) -> Params:
    """Our parameters (nested, blocks unrolled) from a reference state dict.

    Raises:
      UserError: tensors missing, left over, or of another shape.
    """
    if all(key.startswith("module.") for key in weights):  # by data-parallel wrappers
        weights = {key.removeprefix("module."): a for key, a in weights.items()}
    # Before anything is moved, and in the reference's own words.
    _compare(weights, table.reference_shapes(), table.idle, where=f"{table.name} weights")
    return nested(_as_float32(_apply(table, weights, "ours")))


def to_theirs(params: Params, table: Table) -> dict[str, np.ndarray]:
    """A reference state dict from our parameters (blocks unrolled), without the idle tensors.

    Raises:
      UserError: parameters missing, left over, or of another shape.
    """
    flat = {p: np.asarray(a) for p, a in by_path(params).items()}
    _compare(flat, table.shapes, (), where=f"parameters to write as {table.name}")
    return _as_float32(_apply(table, flat, "theirs"))


def _as_float32(arrays: Weights) -> dict[str, np.ndarray]:
    # contiguous: safetensors writes the bytes as they lie, whatever the strides
    return {key: np.ascontiguousarray(a, dtype=np.float32) for key, a in arrays.items()}


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of one file as float32 (integers as they are).

    Raises:
      UserError: no such file, a pickle, or not a safetensors file.
    """
    import safetensors
    from safetensors.numpy import load_file

    path = Path(path)
    require_safetensors(path)
    try:
        tensors = load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"weights: {path} is not a whole safetensors file: {error}.") from error
    except AttributeError as error:  # what safetensors makes of a dtype that numpy lacks
        raise UserError(
            f"weights: {path} holds tensors of a dtype that is not read here ({error}); float64, "
            "float32, float16, bfloat16 and integers are. Convert them and give that file."
        ) from error
    # Not integers: they are counters and tables, which float32 could round.
    return {k: a if a.dtype.kind in "iub" else a.astype(np.float32) for k, a in tensors.items()}


def require_safetensors(path: str | Path) -> None:
    """Raises UserError for no file, or a pickle by its name or first bytes; unpickles nothing."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights: there is no file {path}.")
    with path.open("rb") as file:
        start = file.read(9)
    # By its content too: a pickle is one under any name. A safetensors file may begin with the same
    # byte: the length of its header (8 bytes, lowest first), and the header is JSON.
    length = int.from_bytes(start[:8], "little")
    whole = start[8:] == b"{" and length <= path.stat().st_size - 8
    if path.suffix in PICKLE_SUFFIXES or (start.startswith(PICKLE_STARTS) and not whole):
        raise UserError(
            f"weights: {path} is a pickle (torch.save) file and is refused: pickle can run code "
            "when it is read. Convert it where you trust it, with torch.load(FILE, "
            "weights_only=True) and safetensors.torch.save_file, and give the .safetensors file."
        )


def stack_blocks(params: Params) -> Params:
    """Parameters of a ``UViT`` or ``TwoStream`` as those of one with ``scan=True``."""

    def stack(*leaves: AnyArray) -> AnyArray:
        # Host arrays stay on the host: a checkpoint may be larger than the device.
        return (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves)

    def stacked(half: Params, mirrored: bool) -> Params:
        if "0" not in half:
            return half
        layers = [half[str(i)] for i in range(len(half))]
        # Out-block 0 takes the last in-block's skip: mirrored, layer i of both halves is a pair.
        return jax.tree.map(stack, *(layers[::-1] if mirrored else layers))

    return _over_halves(params, stacked)


def unstack_blocks(params: Params) -> Params:
    """Parameters of a ``UViT`` or ``TwoStream`` as those of one with ``scan=False``."""

    def unstacked(half: Params, mirrored: bool) -> Params:
        if "0" in half:
            return half
        length = len(jax.tree.leaves(half)[0])
        order = range(length)[::-1] if mirrored else range(length)
        return {str(i): jax.tree.map(lambda leaf, j=j: leaf[j], half) for i, j in enumerate(order)}

    return _over_halves(params, unstacked)


def _over_halves(params: Params, change: Callable[[Params, bool], Params]) -> Params:
    """The tree with its ``in_blocks`` and ``out_blocks``, at any depth, replaced."""

    def changed(name: str, part: Any) -> Any:
        if name in ("in_blocks", "out_blocks"):
            return change(part, name == "out_blocks")
        return _over_halves(part, change) if isinstance(part, Mapping) else part

    return {name: changed(name, part) for name, part in params.items()}


def _apply(table: Table, flat: Params, to: Literal["ours", "theirs"]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for entry in table.entries:
        names = {"ours": entry.ours, "theirs": entry.theirs}
        arrays = (flat[name] for name in names["theirs" if to == "ours" else "ours"])
        out |= dict(zip(names[to], getattr(entry.layout, to)(*arrays), strict=True))
    return out


def _compare(
    given: Weights, wanted: Mapping[str, tuple[int, ...]], idle: Sequence[str], *, where: str
) -> None:
    """Raises one error that names all tensors missing, left over or of another shape."""
    missing = [f"{k} {wanted[k]}" for k in sorted(set(wanted) - set(given))]
    unused = [f"{k} {given[k].shape}" for k in sorted(set(given) - set(wanted) - set(idle))]
    differ = [
        f"{k}: given {given[k].shape}, the model has {tuple(wanted[k])}"
        for k in sorted(set(given) & set(wanted))
        if given[k].shape != tuple(wanted[k])
    ]
    kinds = {"missing": missing, "left over": unused, "of another shape": differ}
    shown = {
        kind: [*n[:MAX_LISTED], *(["..."] * (len(n) > MAX_LISTED))] for kind, n in kinds.items()
    }
    errors = [f"{len(n)} {kind} ({'; '.join(shown[kind])})" for kind, n in kinds.items() if n]
    if errors:
        raise UserError(
            f"{where}: {', '.join(errors)}. Change the model's config to the one of these weights "
            "(depth, width, streams), or choose the layout they are in."
        )

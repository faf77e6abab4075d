"""Randomness that belongs to a row of the global batch, or to a sample.

1. ``step_key = fold_in(key(seed), step)``
2. ``row_key[r] = fold_in(step_key, r)`` with ``r`` the global row
3. a use of it (noise, time, text drop) folds in the number of its name

A row's draws depend on (seed, step, row) alone: the same on any mesh, host count and accumulation,
and whatever the rest of the batch is. A generated sample's depend on (seed, index) alone.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, UInt

from jointseg_jax.chips import target
from jointseg_jax.types import require_seed

Keys = Key[Array, " batch"]
Numbers = Int[Array, " batch"] | UInt[Array, " batch"]


def name_id(name: str) -> np.uint32:
    """A number for a name that does not depend on which other names exist."""
    # not hash(): Python salts it in every process
    return np.uint32(zlib.crc32(name.encode()))


def row_keys(seed: int, step: Int[Array, ""] | int, rows: Numbers) -> Keys:
    """One key per row of a training batch (global row numbers)."""
    step_key = jax.random.fold_in(_key(seed), step)  # (1)
    # (2) row_key[r] = fold_in(step_key, r), whatever host or device holds the row
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, rows)


def sample_keys(seed: Int[Array, ""] | UInt[Array, ""] | int, indices: Numbers) -> Keys:
    """One key per generated sample."""
    # the name keeps samples apart from training rows of the same seed and number.
    key = jax.random.fold_in(_key(seed), name_id("sample"))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


def _key(seed: Array | int | np.integer) -> Key[Array, ""]:
    # An array has 32 bits already; of a number, ``jax.random.key`` would keep the last 32.
    if not isinstance(seed, jax.Array):
        require_seed("seed", seed)
    return jax.random.key(seed)


def fold(keys: Keys, *uses: str | int | np.integer | Int[Array, ""]) -> Keys:
    """One new key per row, a function of the row's key and of ``uses``: names or numbers."""
    for use in uses:
        # (3) by name and not by a count of uses: a new use changes the draws of no other
        number = name_id(use) if isinstance(use, str) else use
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
    return keys


def normal(keys: Keys, like: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """Standard normal numbers of the shape and dtype of ``like``."""
    return _rows(jax.random.normal, keys, like.shape[1:], like.dtype)


def uniform(keys: Keys, shape: Sequence[int] = ()) -> Float[Array, "batch ..."]:
    """Float32 numbers in [0, 1), of ``shape`` in every row."""
    return _rows(jax.random.uniform, keys, shape, np.float32)


def _rows(
    draw: Callable[..., Array], keys: Keys, shape: Sequence[int], dtype: DTypeLike
) -> Float[Array, "batch ..."]:
    count = math.prod(shape)
    # Flat, then cut into axes: the same numbers, which the CPU compiler is done with in a fraction
    # of the time (0.8 s against 3.1 s for rows of [32, 32, 3]): it codes the hash once an axis.
    flat = jax.vmap(lambda key: draw(key, (count,), dtype))(keys)  # [b, count]
    return flat.reshape(flat.shape[0], *shape)


def flat(initialise: Callable[..., Array]) -> Callable[..., Array]:
    """An initialiser ``(key, shape, dtype)`` of independent numbers that draws them flat on a CPU.

    The numbers are the same, and compiled faster as in ``normal``: a kernel of 4 axes in 0.5 s, not
    2.5 s.
    """

    def draw(key: Array, shape: Sequence[int], dtype: DTypeLike = np.float32) -> Array:
        # on other chips as it is: a kernel that is split over several is then drawn split
        if target().platform != "cpu":
            return initialise(key, shape, dtype)
        return initialise(key, (math.prod(shape),), dtype).reshape(shape)

    return draw

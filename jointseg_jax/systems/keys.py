"""Randomness that belongs to a row of the global batch, or to a sample.

1. ``step_key = fold_in(key(seed), step)``
2. ``row_key[r] = fold_in(step_key, r)`` with ``r`` the global row
3. a use of it (noise, time, text drop) folds in the number of its name

A row's draws therefore depend on (seed, step, row) alone: the same on any mesh, host count and
accumulation. A generated sample's depend on (seed, index) alone.
"""

from __future__ import annotations

import jax
from jaxtyping import Int, Key, UInt

from jointseg_jax.transport import keys as transport_keys
from jointseg_jax.types import Array

Keys = Key[Array, " batch"]
Numbers = Int[Array, " batch"] | UInt[Array, " batch"]


def row_keys(seed: int, step: Int[Array, ""] | int, rows: Numbers) -> Keys:
    """One key per row of a training batch (global row numbers)."""
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, rows)


def sample_keys(seed: Int[Array, ""] | UInt[Array, ""] | int, indices: Numbers) -> Keys:
    """One key per generated sample."""
    key = jax.random.fold_in(jax.random.key(seed), transport_keys.name_id("sample"))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


def fold(keys: Keys, use: str | Int[Array, ""]) -> Keys:
    """The keys of one use (by its name, or by a step) of each row."""
    number = transport_keys.name_id(use) if isinstance(use, str) else use
    return transport_keys.fold(keys, number)

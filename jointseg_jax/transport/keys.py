"""Randomness that belongs to a row: folding and drawing with one typed key per row of the batch.

Row ``i`` of every result is a function of ``keys[i]`` alone, so it depends neither on the batch
around it nor on how many devices share the batch.
"""

import zlib

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

Keys = Key[Array, " batch"]


def name_id(name: str) -> np.uint32:
    """A number for a stream's name that does not depend on which other streams exist."""
    return np.uint32(zlib.crc32(name.encode()))


def fold(keys: Keys, *data: int | np.integer | Int[Array, ""]) -> Keys:
    """One new key per row, a function of the row's key and of ``data``."""
    for number in data:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
    return keys


def normal(keys: Keys, like: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """Standard normal numbers of the shape and dtype of ``like``."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(keys)


def uniform(keys: Keys) -> Float[Array, " batch"]:
    """One float32 number in [0, 1) per row."""
    return jax.vmap(lambda key: jax.random.uniform(key, (), np.float32))(keys)

"""A fingerprint of array data that does not depend on the mesh it lies on.

With w_i the 32-bit words of a leaf and i their linear index in C order, modulo 2^32,

  h_j = sum_i mix_j(w_i xor mix_j(i + c_j)) modulo 2^32,  j = 0, 1,

and the digest of the leaf is the 64-bit number h_0 h_1. ``mix_j`` is a xor-shift-multiply
finaliser, a bijection of 32-bit words: a change confined to one word is noticed with certainty, any
other change passes with probability about 2^-64.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jointseg_jax.rules import by_path
from jointseg_jax.types import ArrayT

Leaf = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct

# (c_j, first factor, shift, second factor) of mix_j
_SETS = ((0x9E3779B9, 0x7FEB352D, 15, 0x846CA68B), (0x3C6EF372, 0x85EBCA6B, 13, 0xC2B2AE35))
_ON_HOST = 1 << 16  # elements up to which a leaf is read on the host


def is_key(leaf: Leaf) -> bool:
    """Returns True for an array (or shape) of typed PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def leaf_digests(tree: PyTree) -> dict[str, str]:
    """The digest of every array of ``tree`` by path, as 16 hexadecimal digits."""
    # all leaves are launched before the first result is fetched
    words = jax.device_get({path: _words(leaf) for path, leaf in by_path(tree).items()})
    return {path: f"{h[0]:08x}{h[1]:08x}" for path, h in words.items()}


def tree_digest(rows: dict[str, tuple[str, str]]) -> str:
    """One fingerprint (32 digits) from ``{path: (description, digest)}``, ordered by path."""
    lines = "".join(f"{path}\t{kind}\t{digest}\n" for path, (kind, digest) in sorted(rows.items()))
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


def describe(leaf: Leaf) -> str:
    """The dtype and shape of an array, ``float32[3,4]``."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def state_digest(tree: PyTree) -> str:
    """One fingerprint of all paths, dtypes, shapes and bits of ``tree``."""
    leaves = by_path(tree)
    return tree_digest(
        {path: (describe(leaves[path]), d) for path, d in leaf_digests(tree).items()}
    )


def _words(leaf: Leaf) -> jax.Array | np.ndarray:
    """h_0 and h_1 of one leaf, ``[2]`` uint32."""
    if isinstance(leaf, jax.Array) and is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        whole = leaf.is_fully_addressable or leaf.is_fully_replicated
        # Small leaves are read on the host: their many shapes would each cost a compilation.
        if leaf.size > _ON_HOST or not whole:
            return _on_device(leaf.sharding)(leaf)
    words = _host_words(np.asarray(leaf))
    return _hash(words, np.arange(words.size, dtype=np.uint32), np)


@functools.lru_cache
def _on_device(sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    """The jitted hash; its result is replicated, so that every process can read it."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return jax.jit(_device_hash, out_shardings=everywhere)
    return jax.jit(_device_hash)


def _device_hash(x: jax.Array) -> jax.Array:
    words = _device_words(x)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, length in enumerate(words.shape):
        # not arange and reshape, which would move sharded data
        step = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index = index * jnp.uint32(length & 0xFFFFFFFF) + step
    return _hash(words, index, jnp)


def _hash(words: ArrayT, index: ArrayT, xp: ModuleType) -> ArrayT:
    """``[h_0, h_1]`` in numpy or jax.numpy: the same bits on the host and on the devices."""

    def one(offset: int, first: int, shift: int, second: int) -> Any:
        def mix(x: ArrayT) -> ArrayT:
            x = (x ^ (x >> xp.uint32(16))) * xp.uint32(first)
            x = (x ^ (x >> xp.uint32(shift))) * xp.uint32(second)
            return x ^ (x >> xp.uint32(16))

        # h_j = sum_i mix_j(w_i xor mix_j(i + c_j)). Sums of integers are associative: any sharding,
        # device count or order gives the same value.
        return xp.sum(mix(words ^ mix(index + xp.uint32(offset))), dtype=xp.uint32)

    return xp.stack([one(*constants) for constants in _SETS])


def _host_words(x: np.ndarray) -> np.ndarray:
    # elements of 1 and 2 bytes are widened to a word, elements of 8 bytes are two words
    flat = np.ascontiguousarray(x).reshape(-1)
    words = flat.view(f"uint{8 * min(x.dtype.itemsize, 4)}").astype(np.uint32)
    # numpy keeps a packed 4-bit element in a byte, whose other bits are not data
    return words & np.uint32((1 << min(_bits(x.dtype), 32)) - 1)


def _device_words(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):  # bitcast takes no complex numbers
        return _device_words(jnp.stack([x.real, x.imag], axis=-1))
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = jnp.dtype(f"uint{min(_bits(x.dtype), 32)}")
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _bits(dtype: np.dtype) -> int:
    """Bits of one element; below 8 for the packed types, which numpy keeps in a byte each."""
    if dtype == jnp.bool_:
        return 8
    kind = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return kind(dtype).bits * (2 if jnp.issubdtype(dtype, jnp.complexfloating) else 1)

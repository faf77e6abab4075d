"""The fastest matrix product that one chip reaches here, as the ceiling that MFU is measured by.

A maker's peak is reached by nothing, and XLA:CPU has none; a product of two large square matrices
in the network's own number type is the most that any network can hope for.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SIZES = {"cpu": (512, 1024, 2048)}
OTHERWISE = (4096, 8192)
"""Sides of the matrices, by platform."""

TRAINS = 5
"""How often each size is timed."""


class Ceiling(NamedTuple):
    """FLOP/s of one chip, and the product that reached it."""

    flops: float
    size: int
    dtype: str


def ceiling(dtype: Any, sizes: tuple[int, ...] = (), seconds: float = 0.1) -> Ceiling:
    """Times products of random matrices; the best of all sizes.

    Args:
      seconds: length of a train of products in a row; the fastest of ``TRAINS`` counts.
    """
    dtype = jnp.dtype(dtype)
    sizes = sizes or SIZES.get(jax.devices()[0].platform, OTHERWISE)
    rates = {size: 2.0 * size**3 / _seconds(size, dtype, seconds) for size in sizes}
    best = max(rates, key=rates.get)
    return Ceiling(rates[best], best, dtype.name)


def _seconds(size: int, dtype: jnp.dtype, length: float) -> float:
    device = jax.local_devices()[0]
    keys = jax.random.split(jax.random.key(size))
    draw = jax.jit(lambda key: jax.random.normal(key, (size, size), dtype))
    left, right = (jax.device_put(draw(key), device) for key in keys)
    product = jax.jit(jnp.matmul)
    product(left, right).block_until_ready()
    one = _train(product, left, right, 1)
    count = min(max(int(length / one), 1), 32)  # no more than fit into memory side by side
    return min(_train(product, left, right, count) / count for _ in range(TRAINS))


def _train(product: Any, left: jax.Array, right: jax.Array, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        made = product(left, right)
    made.block_until_ready()
    return time.perf_counter() - start

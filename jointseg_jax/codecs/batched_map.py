"""Batches in parts, so that the widest intermediate of a decoder is never alive for all images.

The rows of part i are i, i + parts, i + 2 parts, ...: interleaved, because a batch sharded over
devices in contiguous blocks then has rows of every device in every part, and the sequential loop
over parts moves nothing between devices. The number of parts follows from the rows *per device* of
the mesh in force, which is not always all there are (each process samples on its own; a program may
be compiled for a pod), so one device and eight devices with the same share of the batch compute the
same programs.
"""

from collections.abc import Callable
from typing import TypeVar

import jax

from jointseg_jax import sharding

Tree = TypeVar("Tree")
"""An array, or a tree of arrays."""

LIVE_VALUES = 2**28
"""Values of the widest intermediate that may be alive at once on one device (1 GiB of float32)."""


def map_rows(
    function: Callable[[jax.Array], Tree], rows: jax.Array, *, values_per_row: int
) -> Tree:
    """``function(rows)`` for a row-wise function, in as few parts as ``LIVE_VALUES`` allows.

    Args:
      function: maps ``[n, ...]`` to a tree of ``[n, ...]``, each row on its own.
      rows: ``[batch, ...]``.
      values_per_row: size of the widest intermediate that one row causes.
    """
    parts = part_count(rows.shape[0], values_per_row, sharding.shards_of("batch"))
    if parts == 1:
        return function(rows)
    # Interleaved, [parts, batch / parts, ...]: contiguous parts would be the rows of one device.
    split = rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]).swapaxes(0, 1)
    done = jax.lax.map(function, split)
    return jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(rows.shape[0], *y.shape[2:]), done)


def part_count(batch: int, values_per_row: int, devices: int) -> int:
    """The smallest divisor of the per-device batch whose parts fit into ``LIVE_VALUES``."""
    # A batch that does not divide among the devices is replicated: each has all of its rows.
    share = batch // devices if batch % devices == 0 else batch
    most = max(1, LIVE_VALUES // values_per_row)
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most)

"""What collectives an update needs at least, by the places of its parameters.

1. a parameter of n numbers that is whole on every chip: one all-reduce of its gradient, ``n``
2. split over ``fsdp``: gathered in the forward and in the backward pass, ``2 n``; its gradient
   reduce-scattered, ``n``, and the own part all-reduced over ``data``, ``n / fsdp``
3. whole, with its optimizer state split (zero1): gradient reduce-scattered, ``n``, and the new
   parameter gathered, ``n``

Each number is of the network's dtype, which is what its products see; only the new parameters of 3
are float32. A frozen parameter that is split is gathered once or, where a gradient passes through
it, twice; once is what counts here. Samplers need nothing.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jointseg_jax import rules
from jointseg_jax.training.program import Program


def ideal_bytes(program: Program, dtype: Any) -> int:
    """Bytes of all collectives on one chip, counted as ``costs`` counts them.

    Args:
      dtype: of the network's products.
    """
    wire = jnp.dtype(dtype).itemsize
    trained = set(rules.paths(program.state.ema))
    places = rules.by_path(program.state.params)
    moments = _split_moments(program)
    return sum(
        _bytes(leaf, wire, path in trained, path in moments) for path, leaf in places.items()
    )


def _split_moments(program: Program) -> set[str]:
    """Paths of parameters of which optimizer state of the same shape is split."""
    split = [
        path for path, leaf in rules.by_path(program.state.opt).items() if _parts(leaf.sharding) > 1
    ]
    return {p for p in rules.paths(program.state.params) if any(q.endswith("/" + p) for q in split)}


def _parts(place: jax.sharding.NamedSharding) -> int:
    names = [n for axes in place.spec if axes for n in ([axes] if isinstance(axes, str) else axes)]
    return math.prod(place.mesh.shape[n] for n in names)


def _bytes(leaf: Any, wire: int, trained: bool, split_moments: bool) -> int:
    """Source: the module's 1 to 3."""
    numbers, parts, chips = leaf.size, _parts(leaf.sharding), leaf.sharding.mesh.size
    if chips == 1:
        return 0
    if parts > 1:
        copies = chips > parts
        return wire * ((3 * numbers + (numbers // parts if copies else 0)) if trained else numbers)
    if not trained:
        return 0
    return numbers * (wire + 4) if split_moments else numbers * wire

"""The direction of Muon: momentum, made orthogonal matrix by matrix.

1. ``m = beta m + (1 - beta) g``, corrected for its start at zero and looked at one step ahead
2. ``x = m / |m|``, on its side if it has more rows than columns; then ``ns_steps`` times
   ``A = x x^T``, ``x = c0 x + (c1 A + c2 A A) x`` (Newton-Schulz)
3. ``sqrt(max(1, outputs / inputs)) x``

Matrices of one shape are iterated as one stack. The state is that of optax.contrib.muon.

Source: Jordan et al. 2024, as in optax.contrib.muon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree
from optax.contrib import MuonState

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # c0, c1, c2: steepest at 0 rather than exact at 1

Matrices = Float[Array, "count rows columns"]


class Axes(NamedTuple):
    """Which axes of a parameter are its matrices' inputs and outputs; the others count them."""

    inputs: Sequence[int]
    outputs: Sequence[int]


class Cut:
    """How a parameter is cut into matrices with no more rows than columns."""

    def __init__(self, shape: Sequence[int], axes: Axes):
        named = [tuple(a % len(shape) for a in part) for part in axes]
        inputs, outputs = (math.prod(shape[a] for a in part) for part in named)
        rest = tuple(a for a in range(len(shape)) if a not in named[0] + named[1])
        short, long = named if inputs <= outputs else named[::-1]
        self._axes = (*rest, *short, *long)
        self._shape = tuple(shape[a] for a in self._axes)
        count = math.prod(shape[a] for a in rest)
        self.shape = (count, min(inputs, outputs), max(inputs, outputs))
        self.scale = math.sqrt(max(1.0, outputs / inputs))  # (3)

    def matrices(self, x: Float[Array, "*shape"]) -> Matrices:
        """The parameter's matrices."""
        return x.transpose(self._axes).reshape(self.shape)

    def parameter(self, matrices: Matrices) -> Float[Array, "*shape"]:
        """The inverse of ``matrices``."""
        return matrices.reshape(self._shape).transpose(np.argsort(self._axes))


def orthogonal(
    x: Matrices, coefficients: Float[Array, " 3"], *, steps: int, eps: float
) -> Matrices:
    """Each matrix with singular values near 1 in place of its own (formula 2)."""
    c0, c1, c2 = coefficients.astype(x.dtype)
    x /= jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True)) + eps
    for _ in range(steps):
        a = x @ x.mT  # [count, rows, rows]
        x = c0 * x + (c1 * a + c2 * a @ a) @ x
    return x


def scale_by_muon(
    axes: Callable[[PyTree], PyTree],
    *,
    beta: float,
    eps: float,
    ns_steps: int,
    mu_dtype: str,
    stacked: bool,
) -> optax.GradientTransformation:
    """The transformation of a tree of parameters that are matrices.

    Args:
      axes: gives ``Axes`` for each leaf of a tree like the parameters.
      stacked: whether equal shapes are iterated together. Not where parameters lie on several
        devices: each stack would be gathered.
    """

    def init(params: PyTree) -> MuonState:
        momentum = optax.tree.zeros_like(params, dtype=jnp.dtype(mu_dtype))
        return MuonState(jnp.zeros([], jnp.int32), momentum, jnp.asarray(COEFFICIENTS))

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree = None
    ) -> tuple[PyTree, MuonState]:
        del params
        state = cast(MuonState, state)
        count = optax.safe_increment(state.count)
        momentum = optax.tree.update_moment(updates, state.mu, beta, 1)
        ahead = jax.tree.map(  # (1)
            lambda m, g: beta * m + (1 - beta) * g,
            optax.tree.bias_correction(momentum, beta, optax.safe_increment(count)),
            optax.tree.bias_correction(updates, beta, count),
        )
        leaves, structure = jax.tree.flatten(ahead)
        named = jax.tree.leaves(axes(updates), is_leaf=lambda node: isinstance(node, Axes))
        cuts = [Cut(x.shape, a) for x, a in zip(leaves, named, strict=True)]
        stacks: dict[object, list[int]] = {}
        for i, (x, cut) in enumerate(zip(leaves, cuts)):
            stacks.setdefault((cut.shape[1:], x.dtype) if stacked else i, []).append(i)
        for members in stacks.values():
            x = jnp.concatenate([cuts[i].matrices(leaves[i]) for i in members])
            x = orthogonal(x, jnp.asarray(state.ns_coeffs), steps=ns_steps, eps=eps)
            parts = jnp.split(x, np.cumsum([cuts[i].shape[0] for i in members])[:-1])
            for i, part in zip(members, parts):
                leaves[i] = cuts[i].scale * cuts[i].parameter(part)
        return jax.tree.unflatten(structure, leaves), MuonState(
            count, optax.tree.cast(momentum, mu_dtype), state.ns_coeffs
        )

    return optax.GradientTransformation(init, update)

"""Attention of all tokens to all tokens, by the backend that the device is best at.

1. ``y = softmax(q k^T / sqrt(d)) v`` over the keys ``0 .. count - 1``; the others are padding.
2. ``xla`` writes the scores ``[heads, N, N]`` to memory; ``cudnn`` (NVIDIA), ``packed`` (TPU, our
   own, see ``packed``) and ``splash`` (TPU, JAX's own, see ``splash``, for what ``packed`` does not
   take) walk over them in blocks that never leave the chip.

Source: 2 FlashAttention (Dao et al. 2022).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jointseg_jax import chips

ATTENTION = ("auto", "xla", "packed", "splash", "cudnn")
"""The names of backends; ``auto`` is one of the others, by the device and the sizes."""

SHORT = 256
"""Up to so many tokens plain products are at least as good: the scores are small."""

Heads = Float[Array, "batch tokens heads size"]


def chosen(name: str, *, dtype: Any, heads: int, size: int, tokens: int) -> str:
    """The backend that ``auto`` stands for where the program runs; any other name is itself.

    Args:
      size: of one head.
    """
    if name != "auto":
        return name
    target, half = chips.target(), jnp.dtype(dtype).itemsize == 2
    if target.platform == "tpu" and half and tokens > SHORT:
        from jointseg_jax.models.packed_attention import fits

        if fits(heads, size, tokens):
            return "packed"
        if size % 64 == 0:
            return "splash"
    nvidia = target.platform == "gpu" and "nvidia" in target.kind.lower()
    if nvidia and half and size % 8 == 0 and size <= 128:
        return "cudnn"
    return "xla"


def room(backend: str, tokens: int) -> int:
    """How many tokens every layer should have, so that they are not padded in each of them."""
    if backend == "packed":
        from jointseg_jax.models import packed_attention

        return packed_attention.room(tokens)
    if backend == "splash":
        from jointseg_jax.models import splash

        return splash.room(tokens)
    return tokens


def padding(name: str, *counts: int, **fields: Any) -> int:
    """How many tokens to append once, so that no layer pads these numbers of tokens and as many.

    Where no number suits all of them it is 0, and layers pad for themselves.

    Args:
      fields: what ``chosen`` takes beside the tokens.
    """
    backends = [chosen(name, **fields, tokens=n) for n in counts]
    rooms = [room(b, n) for b, n in zip(backends, counts, strict=True)]
    if len(counts) == 1:
        return rooms[0] - counts[0]
    found = sorted({n - count for n, count in zip(rooms, counts, strict=True)})
    suits = (p for p in found if all(room(b, n + p) == n + p for b, n in zip(backends, counts)))
    return next(suits, 0)


def attend_xla(q: Heads, k: Heads, v: Heads) -> Heads:
    """Attention by plain matrix products, softmax in float32."""
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def attend_cudnn(q: Heads, k: Heads, v: Heads) -> Heads:
    """Fused attention of cuDNN; bfloat16 or float16 on an NVIDIA GPU."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

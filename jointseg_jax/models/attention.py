"""Attention of all tokens to all tokens, by the backend that the device is best at.

1. ``y = softmax(q k^T / sqrt(d)) v`` over the keys ``0 .. count - 1``; the others are padding.
2. ``xla`` writes the scores ``[heads, N, N]`` to memory; ``cudnn`` (NVIDIA) and ``splash`` (TPU,
   see ``splash``) walk over them in blocks that never leave the chip.

Source: 2 FlashAttention (Dao et al. 2022).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jointseg_jax import accelerators

ATTENTION = ("auto", "xla", "splash", "cudnn")
"""The names of backends; ``auto`` is one of the others, by the device and the sizes."""

SHORT = 256
"""Up to so many tokens plain products are at least as good: the scores are small."""

Heads = Float[Array, "batch tokens heads size"]


def chosen(name: str, *, dtype: Any, size: int, tokens: int) -> str:
    """The backend that ``auto`` stands for where the program runs; any other name is itself.

    Args:
      size: of one head.
    """
    if name != "auto":
        return name
    target, half = accelerators.target(), jnp.dtype(dtype).itemsize == 2
    if target.platform == "tpu" and half and size % 64 == 0 and tokens > SHORT:
        return "splash"
    nvidia = target.platform == "gpu" and "nvidia" in target.kind.lower()
    if nvidia and half and size % 8 == 0 and size <= 128:
        return "cudnn"
    return "xla"


def attend_xla(q: Heads, k: Heads, v: Heads) -> Heads:
    """Attention by plain matrix products, softmax in float32."""
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def attend_cudnn(q: Heads, k: Heads, v: Heads) -> Heads:
    """Fused attention of cuDNN; bfloat16 or float16 on an NVIDIA GPU."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

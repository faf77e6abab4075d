"""Transformer blocks.

1. pre-norm block:  ``x += attention(LN x)``;  ``x += mlp(LN x)``.
2. post-norm block: ``x = LN(x + attention(x))``;  ``x = LN(x + mlp(x))``.
3. a block with a join begins with ``x = A x + B skip + b`` (the Linear of the concatenation, split
   in two so that no concatenation is stored), followed by a norm when ``join_norm``.

Parameters are float32; ``dtype`` is that of the matrix products. Norm statistics and the softmax
are float32 whatever ``dtype``. Initial values: Linear normal(0.02) (torch's ``trunc_normal_`` cuts
at +-2, a hundred deviations away) and bias 0, norms 1 and 0.

Source: U-ViT (arXiv 2209.12152) section 3; UniDiffuser (arXiv 2303.06555) appendix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jointseg_jax.sharding import constrain

NORM_EPSILON = 1e-5  # torch's; Flax's own default is 1e-6

normal = nn.initializers.normal(0.02)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact GELU; ``erf`` rather than ``jax.nn.gelu``'s ``erfc``, which costs a kernel on TPU."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 2**-0.5))


def attend_xla(q: Array, k: Array, v: Array) -> Array:
    """Attention by plain matrix products, softmax in float32."""
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def attend_cudnn(q: Array, k: Array, v: Array) -> Array:
    """Fused attention of cuDNN; bfloat16 or float16 on an NVIDIA GPU."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


ATTENTION: dict[str, Callable[[Array, Array, Array], Array]] = {
    "xla": attend_xla,
    "cudnn": attend_cudnn,
}
"""``[batch, tokens, heads, size]`` queries, keys, values -> the same shape. The only place where
an attention backend is chosen."""


def linear(features: Any, name: str, dtype: Any, *, axis: Any = -1, bias: bool = True) -> nn.Module:
    """A Linear layer with float32 parameters, on one or several axes."""
    return nn.DenseGeneral(
        features, axis=axis, use_bias=bias, dtype=dtype, kernel_init=normal, name=name
    )


def layer_norm(name: str, dtype: Any) -> nn.Module:
    """LayerNorm with float32 parameters and statistics."""
    return nn.LayerNorm(epsilon=NORM_EPSILON, dtype=dtype, name=name)


class Attention(nn.Module):
    """Full self-attention; kernels ``qkv [width, 3, heads, d]`` and ``out [heads, d, width]``."""

    heads: int
    qkv_bias: bool
    dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        width = x.shape[-1]
        qkv = linear((3, self.heads, width // self.heads), "qkv", self.dtype, bias=self.qkv_bias)(x)
        y = ATTENTION[self.attention](qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        y = checkpoint_name(y, "attn_out")
        return linear(width, "out", self.dtype, axis=(-2, -1))(y)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        h = gelu(linear(self.hidden, "fc1", self.dtype)(x))
        return linear(x.shape[-1], "fc2", self.dtype)(h)


class Block(nn.Module):
    """One transformer block, joined with a skip first when it is given one."""

    heads: int
    mlp_ratio: int | float = 4
    norm: str = "pre"
    join_norm: bool = False
    qkv_bias: bool = False
    dtype: Any = jnp.float32
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        skip: Float[Array, "batch tokens width"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        width = x.shape[-1]
        attention = Attention(self.heads, self.qkv_bias, self.dtype, self.attention, name="attn")
        mlp = Mlp(int(width * self.mlp_ratio), self.dtype, name="mlp")
        attn_norm, mlp_norm = (
            layer_norm("attn_norm", self.dtype),
            layer_norm("mlp_norm", self.dtype),
        )
        if skip is not None:
            x = linear(width, "join", self.dtype)(x) + linear(
                width, "join_skip", self.dtype, bias=False
            )(skip)
            if self.join_norm:
                x = layer_norm("join_norm", self.dtype)(x)
        if self.norm == "pre":
            x = x + attention(attn_norm(x))
            x = x + mlp(mlp_norm(x))
        else:
            x = attn_norm(x + attention(x))
            x = mlp_norm(x + mlp(x))
        return x if self.is_initializing() else constrain(x, "batch", "tokens", "width")

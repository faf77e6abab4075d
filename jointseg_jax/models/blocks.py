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

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jointseg_jax.models.attention import attend_cudnn, attend_xla, chosen
from jointseg_jax.sharding import constrain

NORM_EPSILON = 1e-5  # torch's; Flax's own default is 1e-6

normal = nn.initializers.normal(0.02)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact GELU; ``erf`` rather than ``jax.nn.gelu``'s ``erfc``, which costs a kernel on TPU."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 2**-0.5))


def linear(features: Any, name: str, dtype: Any, *, axis: Any = -1, bias: bool = True) -> nn.Module:
    """A Linear layer with float32 parameters, on one or several axes."""
    return nn.DenseGeneral(
        features, axis=axis, use_bias=bias, dtype=dtype, kernel_init=normal, name=name
    )


def layer_norm(name: str, dtype: Any) -> nn.Module:
    """LayerNorm with float32 parameters and statistics."""
    return nn.LayerNorm(epsilon=NORM_EPSILON, dtype=dtype, name=name)


class Parameters(nn.Module):
    """The parameters of a ``linear``, for products that are written otherwise."""

    shape: tuple[int, ...]
    outputs: int | None

    @nn.compact
    def __call__(self) -> tuple[Array, Array | None]:
        """Kernel, and bias over the last ``outputs`` axes (None: no bias)."""
        kernel = self.param("kernel", normal, self.shape)
        if self.outputs is None:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, self.shape[-self.outputs :])


class Attention(nn.Module):
    """Full self-attention; kernels ``qkv [width, 3, heads, d]`` and ``out [heads, d, width]``."""

    heads: int
    qkv_bias: bool
    dtype: Any
    attention: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], count: int | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Tokens from ``count`` on (None: none) are padding, which only TPU kernels take."""
        width, size = x.shape[-1], x.shape[-1] // self.heads
        fields = {"dtype": self.dtype, "heads": self.heads, "size": size}
        backend = chosen(self.attention, **fields, tokens=x.shape[1])
        if backend in ("packed", "splash") and not self.is_initializing():
            run = self._packed if backend == "packed" else self._splash
            kernel, offset = Parameters((width, 3, self.heads, size), self._biases, name="qkv")()
            # the scale of the scores is given to the queries, where it costs nothing
            scales = (size**-0.5, 1.0, 1.0)
            kernels = [kernel[:, i].astype(self.dtype) * s for i, s in enumerate(scales)]
            offsets = [None] * 3
            if offset is not None:
                offsets = [offset[i].astype(self.dtype) * s for i, s in enumerate(scales)]
            return run(x.astype(self.dtype), kernels, offsets, count)
        qkv = linear((3, self.heads, size), "qkv", self.dtype, bias=self.qkv_bias)(x)
        attend = attend_cudnn if backend == "cudnn" else attend_xla
        y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        y = checkpoint_name(y, "attn_out")
        return linear(width, "out", self.dtype, axis=(-2, -1))(y)

    @property
    def _biases(self) -> int | None:
        return 3 if self.qkv_bias else None

    def _packed(self, x: Array, kernels: list, offsets: list, count: int | None) -> Array:
        """The same from the same parameters, the heads of a token side by side all the way."""
        from jointseg_jax.models.packed_attention import attend_packed

        width = x.shape[-1]
        heads = []
        for kernel, offset in zip(kernels, offsets, strict=True):
            y = x @ kernel.reshape(width, width)
            heads.append(y if offset is None else y + offset.reshape(1, 1, width))
        y = attend_packed(*heads, heads=self.heads, count=count)
        kernel, offset = Parameters((self.heads, width // self.heads, width), 1, name="out")()
        y = y @ kernel.astype(self.dtype).reshape(width, width)
        return y + offset.astype(self.dtype)[None, None]

    def _splash(self, x: Array, kernels: list, offsets: list, count: int | None) -> Array:
        """The same from the same parameters, heads before tokens all the way."""
        from jointseg_jax.models.splash import attend_splash

        width = x.shape[-1]
        heads = []
        for kernel, offset in zip(kernels, offsets, strict=True):
            y = jnp.einsum("bnd,dhk->bhnk", x, kernel)
            heads.append(y if offset is None else y + offset[None, :, None])
        y = attend_splash(*heads, count)
        kernel, offset = Parameters((self.heads, width // self.heads, width), 1, name="out")()
        y = jnp.einsum("bhnk,hkd->bnd", y, kernel.astype(self.dtype))
        return y + offset.astype(self.dtype)[None, None]


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
    attention: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        skip: Float[Array, "batch tokens width"] | None = None,
        count: int | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Tokens from ``count`` on (None: none) are padding that no other token sees."""
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
            x = x + attention(attn_norm(x), count)
            x = x + mlp(mlp_norm(x))
        else:
            x = attn_norm(x + attention(x, count))
            x = mlp_norm(x + mlp(x))
        return x if self.is_initializing() else constrain(x, "batch", "tokens", "width")

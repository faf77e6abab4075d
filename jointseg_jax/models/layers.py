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
        biases = 3 if self.qkv_bias else None
        way_in = Parameters((width, 3, self.heads, size), biases, name="qkv")()
        way_out = Parameters((self.heads, size, width), 1, name="out")()
        if self.is_initializing():
            return x
        x, way_in, way_out = jax.tree.map(lambda a: a.astype(self.dtype), (x, way_in, way_out))
        if backend == "splash":
            return self._splash(x, way_in, way_out, count)
        # products with all heads at once: their gradients are plain products too
        flat = (width, width)
        q, k, v = (x @ kernel.reshape(flat) for kernel in self._parts(way_in[0], backend))
        if way_in[1] is not None:
            offsets = self._parts(way_in[1][None], backend)
            q, k, v = (y + b.reshape(1, 1, width) for y, b in zip((q, k, v), offsets, strict=True))
        y = self._attend(backend, q, k, v, count)
        return y @ way_out[0].reshape(flat) + way_out[1][None, None]

    def _parts(self, x: Array, backend: str) -> list[Array]:
        """``[n, 3, heads, size]`` as three; our own kernels want the queries scaled, which costs
        nothing here."""
        size = x.shape[-1]
        scale = size**-0.5 if backend in ("packed", "splash") else 1.0
        return [x[:, 0] * scale, x[:, 1], x[:, 2]]

    def _attend(self, backend: str, q: Array, k: Array, v: Array, count: int | None) -> Array:
        """Attention of the heads that lie side by side in ``[batch, tokens, width]``."""
        if backend == "packed":
            from jointseg_jax.models.packed import attend_packed  # Pallas takes a second to import

            return attend_packed(q, k, v, heads=self.heads, count=count)
        attend = attend_cudnn if backend == "cudnn" else attend_xla
        y = attend(*(z.reshape(*z.shape[:2], self.heads, -1) for z in (q, k, v)))
        return checkpoint_name(y.reshape(q.shape), "attn_out")

    def _splash(self, x: Array, way_in: Any, way_out: Any, count: int | None) -> Array:
        """The same from the same parameters, heads before tokens all the way."""
        from jointseg_jax.models.splash import attend_splash

        heads = [jnp.einsum("bnd,dhk->bhnk", x, w) for w in self._parts(way_in[0], "splash")]
        if way_in[1] is not None:
            offsets = self._parts(way_in[1][None], "splash")
            heads = [y + b[0][None, :, None] for y, b in zip(heads, offsets, strict=True)]
        y = attend_splash(*heads, count)
        return jnp.einsum("bhnk,hkd->bnd", y, way_out[0]) + way_out[1][None, None]


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

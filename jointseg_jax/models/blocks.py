"""Transformer blocks.

1. pre-norm block:  ``x += attention(LN x)``;  ``x += mlp(LN x)``.
2. post-norm block: ``x = LN(x + attention(x))``;  ``x = LN(x + mlp(x))``.
3. a block with a join begins with ``x = A x + B skip + b``, then a norm when ``join_norm``.

Parameters are float32; ``dtype`` is that of the matrix products. Norm statistics and the softmax
are float32 whatever ``dtype``.

Source: U-ViT (arXiv 2209.12152) section 3; UniDiffuser (arXiv 2303.06555) appendix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jointseg_jax.models.attention import attend_cudnn, attend_splash, attend_xla, chosen
from jointseg_jax.rng import flat
from jointseg_jax.sharding import constrain

NORM_EPSILON = 1e-5  # torch's; Flax's own default is 1e-6

# torch's ``trunc_normal_`` cuts at +-2, a hundred deviations away: the same draw in practice
normal = flat(nn.initializers.normal(0.02))


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact GELU, ``x Phi(x)``."""
    # erf, where jax.nn.gelu has erfc, which costs a kernel of its own on TPU
    return 0.5 * x * (1.0 + jax.lax.erf(x * 2**-0.5))


def linear(
    features: int | tuple[int, ...],
    name: str,
    dtype: DTypeLike,
    *,
    axis: int | tuple[int, ...] = -1,
    bias: bool = True,
) -> nn.Module:
    """Returns a Linear layer with float32 parameters, from ``axis`` to ``features`` axes."""
    return nn.DenseGeneral(
        features, axis=axis, use_bias=bias, dtype=dtype, kernel_init=normal, name=name
    )


def layer_norm(name: str, dtype: DTypeLike) -> nn.Module:
    """Returns a LayerNorm with float32 parameters and statistics."""
    return nn.LayerNorm(epsilon=NORM_EPSILON, dtype=dtype, name=name)


class Parameters(nn.Module):
    """The parameters of a ``linear``, for products that are written otherwise."""

    shape: tuple[int, ...]  # of the kernel
    outputs: int  # how many of the kernel's last axes the bias has
    use_bias: bool = True

    @nn.compact
    def __call__(self) -> tuple[Array, Array | None]:
        weight = self.param("kernel", normal, self.shape)
        if not self.use_bias:
            return weight, None
        return weight, self.param("bias", nn.initializers.zeros, self.shape[-self.outputs :])


class Attention(nn.Module):
    """Full self-attention; kernels ``qkv [width, 3, heads, d]`` and ``out [heads, d, width]``."""

    heads: int
    qkv_bias: bool
    dtype: DTypeLike  # of the matrix products
    attention: str  # a name of ``attention.ATTENTION``

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], count: int | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Tokens from ``count`` on (None: none) are padding, which only TPU kernels take."""
        width, size = x.shape[-1], x.shape[-1] // self.heads
        sizes = {"heads": self.heads, "size": size, "tokens": x.shape[1]}
        backend = chosen(self.attention, dtype=self.dtype, **sizes)
        # initial values are drawn by the plain layers: one set, whatever backend runs later
        if backend in ("packed", "splash") and not self.is_initializing():
            return self._by_kernel(x.astype(self.dtype), backend, count)
        qkv = linear((3, self.heads, size), "qkv", self.dtype, bias=self.qkv_bias)(x)
        attend = attend_cudnn if backend == "cudnn" else attend_xla
        y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])  # [b, n, 3, h, d] -> [b, n, h, d]
        y = checkpoint_name(y, "attn_out")
        return linear(width, "out", self.dtype, axis=(-2, -1))(y)

    def _by_kernel(
        self, x: Float[Array, "batch tokens width"], backend: str, count: int | None
    ) -> Float[Array, "batch tokens width"]:
        """The TPU kernels, from the parameters of the plain layers, each in the layout it reads."""
        # imported here: only TPU programs pay for Pallas
        from jointseg_jax.models.packed_attention import attend_packed

        packed, width, size = backend == "packed", x.shape[-1], x.shape[-1] // self.heads

        def project(weight: Array, bias: Array | None) -> Array:
            if packed:
                # Heads side by side along the 128 lanes: as [b, n, h, d] each head of 64 would be
                # stored in 128, and moved before the tokens.
                y = x @ weight.reshape(width, width)  # [b, n, h * d]
                return y if bias is None else y + bias.reshape(1, 1, width)
            y = jnp.einsum("bnd,dhk->bhnk", x, weight)  # [b, h, n, d]
            return y if bias is None else y + bias[None, :, None]

        shape = (width, 3, self.heads, size)
        weights, biases = Parameters(shape, 3, self.qkv_bias, name="qkv")()
        qkv = []
        # The kernels take q scaled: 1 / sqrt(d) is given to its weights, where it costs nothing.
        for i, scale in enumerate((size**-0.5, 1.0, 1.0)):
            bias = None if biases is None else biases[i].astype(self.dtype) * scale  # [h, d]
            qkv.append(project(weights[:, i].astype(self.dtype) * scale, bias))
        q, k, v = qkv
        attend = functools.partial(attend_packed, heads=self.heads) if packed else attend_splash
        y = attend(q, k, v, count=count)
        weight, bias = Parameters((self.heads, size, width), 1, name="out")()
        weight = weight.astype(self.dtype)
        y = y @ weight.reshape(width, width) if packed else jnp.einsum("bhnk,hkd->bnd", y, weight)
        return y if bias is None else y + bias.astype(self.dtype)[None, None]  # [b, n, width]


class Activation(NamedTuple):
    """What lies between the two layers of an MLP."""

    function: Callable[[Array], Array]
    bias: bool  # of both layers


ACTIVATIONS = {
    "gelu": Activation(gelu, bias=True),
    "relu2": Activation(lambda x: jnp.square(nn.relu(x)), bias=False),
}
"""Exact GELU, as all published networks have, or relu(x)^2 (Primer, So et al. 2021): on a CPU much
of a block's time goes to erf and to the gradients of biases."""


class Mlp(nn.Module):
    """Linear, activation, Linear."""

    hidden: int  # width between the two layers
    dtype: DTypeLike
    activation: str = "gelu"  # a name of ``ACTIVATIONS``

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        activate, bias = ACTIVATIONS[self.activation]
        h = activate(linear(self.hidden, "fc1", self.dtype, bias=bias)(x))  # [b, n, hidden]
        return linear(x.shape[-1], "fc2", self.dtype, bias=bias)(h)


class Block(nn.Module):
    """One transformer block, joined with a skip first when it is given one."""

    heads: int
    mlp_ratio: int | float = 4  # hidden size of the MLP / width
    norm: str = "pre"  # where the norms are: "pre" or "post"
    join_norm: bool = False  # a norm after the join
    qkv_bias: bool = False
    dtype: DTypeLike = jnp.float32  # of the matrix products
    attention: str = "auto"  # a name of ``attention.ATTENTION``
    activation: str = "gelu"  # of the MLP, a name of ``ACTIVATIONS``

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
        mlp = Mlp(int(width * self.mlp_ratio), self.dtype, self.activation, name="mlp")
        attn_norm = layer_norm("attn_norm", self.dtype)
        mlp_norm = layer_norm("mlp_norm", self.dtype)
        if skip is not None:
            # x = A x + B skip + b: the Linear of the concatenation [x, skip], which is never stored
            own = linear(width, "join", self.dtype)(x)
            x = own + linear(width, "join_skip", self.dtype, bias=False)(skip)
            if self.join_norm:
                x = layer_norm("join_norm", self.dtype)(x)
        if self.norm == "pre":
            x = x + attention(attn_norm(x), count)
            x = x + mlp(mlp_norm(x))
        else:
            x = attn_norm(x + attention(x, count))
            x = mlp_norm(x + mlp(x))
        # in init there may be no mesh yet, and its arrays are thrown away
        return x if self.is_initializing() else constrain(x, "batch", "tokens", "width")

"""The network of the label autoencoder: convolutions down, transposed convolutions up.

1. Encoder: conv(w0) silu [conv(w_i) conv_stride2(w_i) silu]_i conv(middle_width)
   [residual]*middle_blocks group_norm silu conv(2 latent_channels).
2. Decoder: conv(middle_width) [residual]*middle_blocks [double(u_i) layer_norm silu]_i
   group_norm silu conv(outputs).

There is no activation between the two convolutions of a halving. Epsilons: group norms 1e-6, but
1e-5 at the decoder's end; layer norm 1e-6. Kernels and biases start uniform in +-1/sqrt(fan in).

Source: JoDiffusion (2512.13014), section 3.2, ``LightweightLabelVAE``.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from jointseg_jax.types import Array


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """Uniform in +-1/sqrt(fan_in), which the original's layers use for kernel and bias alike."""

    def initialise(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialise


def conv(
    x: Array, features: int, name: str, dtype: Any, *, stride: int = 1, bias: bool = True
) -> Array:
    """3 x 3 convolution with one pixel of zeros on every side, also at stride 2."""
    start = uniform_fan_in(9 * x.shape[-1])
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=((1, 1), (1, 1)),  # not "SAME": at stride 2 that pads one side only
        use_bias=bias,
        dtype=dtype,
        kernel_init=start,
        bias_init=start,
        name=name,
    )(x)


def norm_silu(x: Array, groups: int, epsilon: float, name: str, dtype: Any) -> Array:
    """Group norm, then SiLU."""
    norm = nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)
    return nn.silu(norm(x))


class Double(nn.Module):
    """Transposed 2 x 2 convolution of stride 2: every pixel becomes 2 x 2, without overlap.

    out[2i + y, 2j + x] = in[i, j] @ kernel[y, x] + bias, as one matrix product: no kernel flips.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w d"]:
        start = uniform_fan_in(4 * self.features)  # the original counts its fan-in on the output
        kernel = self.param("kernel", start, (2, 2, x.shape[-1], self.features))
        bias = self.param("bias", start, (self.features,))
        x, kernel, bias = (v.astype(self.dtype) for v in (x, kernel, bias))
        folded = jnp.einsum("bhwc,yxcd->bhywxd", x, kernel) + bias.reshape(1, 1, 1, 1, 1, -1)
        return rearrange(folded, "b h y w x d -> b (h y) (w x) d")


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = x
        for i in (1, 2):
            y = norm_silu(y, self.groups, 1e-6, f"norm_{i}", self.dtype)
            y = conv(y, x.shape[-1], f"conv_{i}", self.dtype)
        return x + y


class Encoder(nn.Module):
    """Analog bits to latent moments."""

    widths: tuple[int, ...]
    middle_width: int
    middle_blocks: int
    latent_channels: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b rows columns moments"]:
        x = nn.silu(conv(x, self.widths[0], "conv_in", self.dtype))
        for i, width in enumerate(self.widths[1:]):
            x = conv(x, width, f"widen_{i}", self.dtype)
            x = nn.silu(conv(x, width, f"halve_{i}", self.dtype, stride=2))
        x = conv(x, self.middle_width, "conv_middle", self.dtype)
        for i in range(self.middle_blocks):
            x = Residual(self.groups, dtype=self.dtype, name=f"middle_{i}")(x)
        x = norm_silu(x, self.groups, 1e-6, "norm_out", self.dtype)
        return conv(x, 2 * self.latent_channels, "conv_out", jnp.float32)


class Decoder(nn.Module):
    """Latents to outputs (float32) at the decoder's own resolution."""

    up_widths: tuple[int, ...]
    middle_width: int
    middle_blocks: int
    outputs: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b rows columns c"]) -> Float[Array, "b h w outputs"]:
        x = conv(x, self.middle_width, "conv_in", self.dtype)
        for i in range(self.middle_blocks):
            x = Residual(self.groups, dtype=self.dtype, name=f"middle_{i}")(x)
        for i, width in enumerate(self.up_widths):
            x = Double(width, dtype=self.dtype, name=f"double_{i}")(x)
            norm = nn.LayerNorm(1e-6, self.dtype, use_fast_variance=False, name=f"norm_{i}")
            x = nn.silu(norm(x))
        x = norm_silu(x, self.groups, 1e-5, "norm_out", self.dtype)
        return conv(x, self.outputs, "conv_out", self.dtype).astype(jnp.float32)

"""The network of the label autoencoder: convolutions down, transposed convolutions up.

Convolutions are 3 x 3; kernels and biases start uniform in +-1/sqrt(fan in).

Source: JoDiffusion (2512.13014), section 3.2, ``LightweightLabelVAE``.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float

from jointseg_jax.codecs.layers import FLOAT32, conv, uniform_fan_in
from jointseg_jax.types import Array


def norm_silu(x: Array, groups: int, epsilon: float, name: str, dtype: np.dtype) -> Array:
    """Group norm, then SiLU."""
    # The fast variance, mean(x^2) - mean(x)^2, cancels in float32 where the mean is large.
    norm = nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)
    return nn.silu(norm(x))


class Double(nn.Module):
    """Transposed 2 x 2 convolution of stride 2: every pixel becomes 2 x 2, without overlap.

    out[2i + y, 2j + x] = in[i, j] @ kernel[y, x] + bias, as one matrix product: no kernel flips.
    """

    features: int
    dtype: np.dtype = FLOAT32  # of the activations

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w d"]:
        start = uniform_fan_in(4 * self.features)  # the original counts its fan-in on the output
        kernel = self.param("kernel", start, (2, 2, x.shape[-1], self.features))
        bias = self.param("bias", start, (self.features,))
        x, kernel, bias = (v.astype(self.dtype) for v in (x, kernel, bias))
        # [b, h, 2, w, 2, d]: rows y and columns x of each pixel's 2 x 2 block
        folded = jnp.einsum("bhwc,yxcd->bhywxd", x, kernel) + bias.reshape(1, 1, 1, 1, 1, -1)
        return rearrange(folded, "b h y w x d -> b (h y) (w x) d")


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    groups: int
    dtype: np.dtype = FLOAT32  # of the activations

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = x  # [b, h, w, c], all along
        for i in (1, 2):
            y = norm_silu(y, self.groups, 1e-6, f"norm_{i}", self.dtype)
            y = conv(y, x.shape[-1], f"conv_{i}", self.dtype)
        return x + y


class Encoder(nn.Module):
    """Analog bits to latent moments (float32): means, then log variances.

    conv(w0) silu [conv(w_i) conv_stride2(w_i) silu]_i conv(middle_width)
    [residual]*middle_blocks group_norm silu conv(2 latent_channels).
    """

    widths: tuple[int, ...]  # each after the first halves
    middle_width: int
    middle_blocks: int  # residual blocks
    latent_channels: int  # half of the outputs
    groups: int  # of the group norms
    dtype: np.dtype = FLOAT32  # of the activations

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b rows columns moments"]:
        x = nn.silu(conv(x, self.widths[0], "conv_in", self.dtype))
        for i, width in enumerate(self.widths[1:]):
            # [b, h / 2^i, w / 2^i, w_i] -> [b, h / 2^(i+1), w / 2^(i+1), width]. There is no
            # activation between the two convolutions of a halving, as in the original.
            x = conv(x, width, f"widen_{i}", self.dtype)
            x = nn.silu(conv(x, width, f"halve_{i}", self.dtype, stride=2))
        x = conv(x, self.middle_width, "conv_middle", self.dtype)
        for i in range(self.middle_blocks):
            x = Residual(self.groups, dtype=self.dtype, name=f"middle_{i}")(x)
        x = norm_silu(x, self.groups, 1e-6, "norm_out", self.dtype)
        # In float32 whatever the dtype: bfloat16 moments would quantise the latents.
        return conv(x, 2 * self.latent_channels, "conv_out", FLOAT32)  # [b, rows, columns, 2 c]


class Decoder(nn.Module):
    """Latents to outputs (float32) at the decoder's own resolution.

    conv(middle_width) [residual]*middle_blocks [double(u_i) layer_norm silu]_i
    group_norm silu conv(outputs).
    """

    up_widths: tuple[int, ...]  # each doubles
    middle_width: int
    middle_blocks: int  # residual blocks
    outputs: int  # channels
    groups: int  # of the group norms
    dtype: np.dtype = FLOAT32  # of the activations

    @nn.compact
    def __call__(self, x: Float[Array, "b rows columns c"]) -> Float[Array, "b h w outputs"]:
        x = conv(x, self.middle_width, "conv_in", self.dtype)
        for i in range(self.middle_blocks):
            x = Residual(self.groups, dtype=self.dtype, name=f"middle_{i}")(x)
        for i, width in enumerate(self.up_widths):
            x = Double(width, dtype=self.dtype, name=f"double_{i}")(x)  # [b, 2 h, 2 w, width]
            norm = nn.LayerNorm(1e-6, self.dtype, use_fast_variance=False, name=f"norm_{i}")
            x = nn.silu(norm(x))
        # 1e-5, torch's default, in this norm alone; 1e-6 in all others, as in the original.
        x = norm_silu(x, self.groups, 1e-5, "norm_out", self.dtype)
        return conv(x, self.outputs, "conv_out", self.dtype).astype(jnp.float32)

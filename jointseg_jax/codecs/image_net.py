"""The network of the image autoencoder: residual blocks of three convolutions, and no norms.

1. Block: relu(x + conv(act(conv(act(conv(x)))))).
2. Encoder: conv(w_0) [block]*n_0 { halve(w_i) [block]*n_i }_i conv(latent channels); ``halve`` is a
   convolution of stride 2 without bias.
3. Decoder: act(conv(w_0)) [block]*n_0 { nearest 2 x, conv_up(w_i) [block]*n_i }_i conv(channels);
   ``conv_up`` has no bias.

All convolutions are 3 x 3. Kernels and biases start uniform in +-1/sqrt(fan in).

Source: TAESD (github.com/madebyollin/taesd), as diffusers' ``AutoencoderTiny``.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
from einops import repeat
from jaxtyping import Float

from jointseg_jax.codecs.label_net import conv
from jointseg_jax.types import Array

Activation = Literal["relu", "silu", "gelu"]

ACTIVATIONS = {
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class Block(nn.Module):
    """Three convolutions added to what they see."""

    activation: Activation
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        act, y = ACTIVATIONS[self.activation], x
        for i in (1, 2):
            y = act(conv(y, x.shape[-1], f"conv_{i}", self.dtype))
        return nn.relu(x + conv(y, x.shape[-1], "conv_3", self.dtype))


class ImageEncoder(nn.Module):
    """Images to latents (float32)."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    outputs: int
    activation: Activation
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b rows columns d"]:
        x = conv(x, self.widths[0], "conv_in", self.dtype)
        for i, (width, count) in enumerate(zip(self.widths, self.blocks)):
            if i > 0:
                x = conv(x, width, f"halve_{i}", self.dtype, stride=2, bias=False)
            for j in range(count):
                x = Block(self.activation, self.dtype, name=f"block_{i}_{j}")(x)
        return conv(x, self.outputs, "conv_out", self.dtype).astype("float32")


class ImageDecoder(nn.Module):
    """Latents to images (float32), not clipped."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    outputs: int
    activation: Activation
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b rows columns c"]) -> Float[Array, "b h w d"]:
        act = ACTIVATIONS[self.activation]
        x = act(conv(x, self.widths[0], "conv_in", self.dtype))
        for i, (width, count) in enumerate(zip(self.widths, self.blocks)):
            if i > 0:
                x = repeat(x, "b h w c -> b (h y) (w x) c", y=2, x=2)
                x = conv(x, width, f"conv_up_{i}", self.dtype, bias=False)
            for j in range(count):
                x = Block(self.activation, self.dtype, name=f"block_{i}_{j}")(x)
        return conv(x, self.outputs, "conv_out", self.dtype).astype("float32")

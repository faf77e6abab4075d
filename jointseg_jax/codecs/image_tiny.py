"""Images through a small convolutional autoencoder: a few latent channels, one cell per patch.

1. Networks: residual blocks of three 3 x 3 convolutions, and no norms. Kernels and biases start
   uniform in +-1/sqrt(fan in).
2. encode: scale * encoder((x + 1) / 2). decode: u = 2 decoder(3 tanh(z / 3)) - 1, clipped to
   [-1, 1].
3. loss, of u not clipped, with e = u - x and A_n the mean over n x n pixels:
   sum over n in (1, 2, 4) of mean |A_n e|  (details, and colours of whole patches)
   + ``edges`` mean |e's differences of neighbouring pixels|
   + ``tether`` mean max(|z| - 2, 0)^2

The defaults are the published network. ``scaled`` puts latents of [-3, 3] into [0, 1] for 8-bit
storage, ``unscaled`` takes them back.

Source: TAESD (github.com/madebyollin/taesd), as diffusers' ``AutoencoderTiny``; the loss is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce, repeat
from jaxtyping import Float, Key, Num

from jointseg_jax import rng
from jointseg_jax.codecs.batched_map import map_rows
from jointseg_jax.codecs.codec import CHANGE, AnyLatents, Keys, Kind, LatentMaps, LossAndMetrics
from jointseg_jax.codecs.layers import apply, conv
from jointseg_jax.codecs.pixels import cells, normalise
from jointseg_jax.types import AnyArray, Array, ArrayT, Params, UserError, require

AnyImages = Num[AnyArray, "batch height width channels"]
Images = Float[Array, "batch height width 3"]
Activation = Literal["relu", "silu", "gelu"]

ACTIVATIONS = {
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

CHANNELS = 3
MAGNITUDE = 3.0  # latents that leave +-MAGNITUDE do not change the image any more
KNEE = 2.0  # where the loss begins to hold latents back
AVERAGES = (1, 2, 4)  # sides in pixels of the patches whose means the loss compares


def scaled(latents: Float[ArrayT, "..."]) -> Float[ArrayT, "..."]:
    """Unscaled latents of [-3, 3] as numbers in [0, 1], clipped; numpy stays numpy."""
    return (latents / (2 * MAGNITUDE) + 0.5).clip(0, 1)


def unscaled(values: Float[ArrayT, "..."]) -> Float[ArrayT, "..."]:
    """The latents of such numbers; numpy stays numpy."""
    return (values - 0.5) * (2 * MAGNITUDE)


class Block(nn.Module):
    """Three convolutions added to what they see: relu(x + conv(act(conv(act(conv(x))))))."""

    activation: Activation
    dtype: np.dtype  # of the activations

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        act, y = ACTIVATIONS[self.activation], x  # [b, h, w, c], all along
        for i in (1, 2):
            y = act(conv(y, x.shape[-1], f"conv_{i}", self.dtype))
        # The last activation is a ReLU whatever the others are, as in diffusers.
        return nn.relu(x + conv(y, x.shape[-1], "conv_3", self.dtype))


class Network(nn.Module):
    """What encoder and decoder are made of."""

    widths: tuple[int, ...]  # of the levels, in the order of the pass
    blocks: tuple[int, ...]  # residual blocks of each level
    outputs: int  # channels
    activation: Activation
    dtype: np.dtype  # of the activations


class ImageEncoder(Network):
    """Images in [0, 1] to latents (float32).

    conv(w_0) [block]*n_0 { halve(w_i) [block]*n_i }_i conv(latent channels).
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b rows columns d"]:
        x = conv(x, self.widths[0], "conv_in", self.dtype)
        for i, (width, count) in enumerate(zip(self.widths, self.blocks)):
            if i > 0:
                # Level i is [b, h / 2^i, w / 2^i, width]. Only convolutions that change the size
                # have no bias.
                x = conv(x, width, f"halve_{i}", self.dtype, stride=2, bias=False)
            for j in range(count):
                x = Block(self.activation, self.dtype, name=f"block_{i}_{j}")(x)
        return conv(x, self.outputs, "conv_out", self.dtype).astype("float32")


class ImageDecoder(Network):
    """Latents to images in [0, 1] (float32), not clipped.

    act(conv(w_0)) [block]*n_0 { nearest 2 x, conv_up(w_i) [block]*n_i }_i conv(channels).
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b rows columns c"]) -> Float[Array, "b h w d"]:
        act = ACTIVATIONS[self.activation]
        x = act(conv(x, self.widths[0], "conv_in", self.dtype))
        for i, (width, count) in enumerate(zip(self.widths, self.blocks)):
            if i > 0:
                # [b, h, w, c] -> [b, 2 h, 2 w, c], nearest; as in the encoder without a bias
                x = repeat(x, "b h w c -> b (h y) (w x) c", y=2, x=2)
                x = conv(x, width, f"conv_up_{i}", self.dtype, bias=False)
            for j in range(count):
                x = Block(self.activation, self.dtype, name=f"block_{i}_{j}")(x)
        return conv(x, self.outputs, "conv_out", self.dtype).astype("float32")


@dataclass(frozen=True, kw_only=True)
class ImageTiny:
    """The image autoencoder as a codec."""

    widths: Sequence[int] = (64, 64, 64, 64)  # of the encoder's levels, pixels to latents
    blocks: Sequence[int] = (1, 3, 3, 3)  # residual blocks of each
    up_widths: Sequence[int] = (64, 64, 64, 64)  # of the decoder's levels, latents to pixels
    up_blocks: Sequence[int] = (3, 3, 3, 1)
    latent_channels: int = 4
    activation: Activation = "relu"
    scale: float = 1.0  # of the latents that leave; 1 / their standard deviation suits a model
    noise: float = 0.0  # standard deviation of noise on the latents, in training
    edges: float = 1.0  # weight of the differences of neighbouring pixels in the loss
    tether: float = 0.1  # weight of what holds latents within +-KNEE
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; parameters, latents and images are float32."""
    kind: ClassVar[Kind] = "image"

    def __post_init__(self) -> None:
        levels = len(self.widths)
        for name in ("widths", "blocks", "up_widths", "up_blocks"):
            numbers = tuple(getattr(self, name))
            object.__setattr__(self, name, numbers)  # hashable: jit takes a codec as static
            least = 1 if name.endswith("widths") else 0
            good = len(numbers) == levels > 0 and min(numbers) >= least
            rule = f"{levels or 'one or more'} numbers of at least {least}"
            require(f"image_tiny codec: {name}", numbers, good, rule, CHANGE)
        checks = {
            "latent_channels": (self.latent_channels >= 1, "at least 1"),
            "activation": (self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
            "scale": (self.scale > 0, "positive"),
            "noise": (self.noise >= 0, "at least 0"),
            "edges": (self.edges >= 0, "at least 0"),
            "tether": (self.tether >= 0, "at least 0"),
            "dtype": (self.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
        }
        for name, (holds, rule) in checks.items():
            require(f"image_tiny codec: {name}", getattr(self, name), holds, rule, CHANGE)

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side: every level but the first halves."""
        return 2 ** (len(self.widths) - 1)

    @property
    def encoder(self) -> ImageEncoder:
        """The Linen module of params["encoder"]."""
        widths, blocks = tuple(self.widths), tuple(self.blocks)
        dtype = jnp.dtype(self.dtype)
        return ImageEncoder(widths, blocks, self.latent_channels, self.activation, dtype)

    @property
    def decoder(self) -> ImageDecoder:
        """The Linen module of params["decoder"]."""
        widths, blocks = tuple(self.up_widths), tuple(self.up_blocks)
        return ImageDecoder(widths, blocks, CHANNELS, self.activation, jnp.dtype(self.dtype))

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters: ``{"encoder": ..., "decoder": ...}``."""
        first, second = jax.random.split(key)
        pixels = jnp.zeros((1, self.factor, self.factor, CHANNELS))
        latents = jnp.zeros((1, 1, 1, self.latent_channels))
        return {
            "encoder": self.encoder.init(first, pixels)["params"],
            "decoder": self.decoder.init(second, latents)["params"],
        }

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """One cell per ``factor`` x ``factor`` pixels."""
        return (*cells("image_tiny codec", size, self.factor), self.latent_channels)

    def encode(self, params: Params, image: AnyImages, *, keys: Keys | None = None) -> LatentMaps:
        """Scaled latents of uint8 images, or of floats in [-1, 1]; nothing here is random."""
        return self.scale * self._latents(params, self._floats(image))

    def decode(self, params: Params, latents: AnyLatents) -> Images:
        """Images in [-1, 1], as many at a time as fit."""
        # The last level's activations are the largest: [h, w, up_widths[-1]] per image.
        widest = latents.shape[1] * latents.shape[2] * self.factor**2 * self.up_widths[-1]

        def images(rows: Array) -> Array:
            return jnp.clip(self.unclipped(params, rows), -1, 1)

        return map_rows(images, jnp.asarray(latents, jnp.float32), values_per_row=widest)

    def unclipped(self, params: Params, latents: AnyLatents) -> Images:
        """Images as the network gives them, which may leave [-1, 1]."""
        z = jnp.asarray(latents, jnp.float32) / self.scale  # [b, h / factor, w / factor, c]
        # (2) 3 tanh(z / 3): nearly z up to 2, and flat beyond 3
        z = MAGNITUDE * jnp.tanh(z / MAGNITUDE)
        return 2 * apply(self.decoder, params["decoder"], z) - 1

    def loss(self, params: Params, images: AnyImages, keys: Keys) -> LossAndMetrics:
        """The loss and its parts, PSNR in dB and the latents' standard deviation.

        The loss is the patch means' error, plus the edges', plus the tether; decoded from latents
        with Gaussian noise added, so that nearby latents decode to nearby images, as a model of
        latents needs.
        """
        x = self._floats(images)
        z = self._latents(params, x)
        noisy = z + self.noise * rng.normal(keys, z) if self.noise else z
        made = self.unclipped(params, self.scale * noisy)
        parts = {
            "pixels": multi_scale(made - x),  # (3), e = u - x, not clipped: a gradient everywhere
            "edges": self.edges * differences(made - x),
            # Beyond the knee 3 tanh(z / 3) flattens and would pass no gradient back.
            "tether": self.tether * jnp.square(jax.nn.relu(jnp.abs(z) - KNEE)).mean(),
        }
        total = cast(Array, sum(parts.values()))
        quality = {"psnr": psnr(jnp.clip(made, -1, 1), x).mean(), "latent/std": jnp.std(z)}
        return total, {"loss": total} | {"loss/" + k: v for k, v in parts.items()} | quality

    def _latents(self, params: Params, x: Array) -> Array:
        return apply(self.encoder, params["encoder"], 0.5 * (x + 1))

    def _floats(self, image: AnyArray) -> Array:
        cells("image_tiny codec", image.shape[1:3], self.factor)
        image = jnp.asarray(image)
        if image.shape[-1] != CHANNELS or not (
            image.dtype == jnp.uint8 or jnp.issubdtype(image.dtype, jnp.floating)
        ):
            raise UserError(
                f"image_tiny codec: an image of {image.shape[-1]} channels and dtype {image.dtype} "
                "was given; it must have 3 channels and be uint8, or a float in [-1, 1]. Change "
                "the batch field that the codec is given."
            )
        return normalise(image) if image.dtype == jnp.uint8 else image.astype(jnp.float32)


def multi_scale(error: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """Mean absolute patch means, summed over the patch sides that divide the image's."""
    # A_n for n in AVERAGES: means of whole patches, [b, h / n, w / n, c], show shifts of colour
    # that single pixels hide.
    sides = [n for n in AVERAGES if not (error.shape[1] % n or error.shape[2] % n)]
    means = [reduce(error, "b (h y) (w x) c -> b h w c", "mean", y=n, x=n) for n in sides]
    return cast(Array, sum(jnp.abs(m).mean() for m in means))


def differences(error: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """Mean absolute difference of vertical, plus of horizontal, neighbours."""
    along = (jnp.abs(jnp.diff(error, axis=axis)) for axis in (1, 2))
    # An image of one row has no vertical neighbours, and the mean of nothing is NaN.
    return cast(Array, sum(d.mean() for d in along if d.size))


def psnr(made: Float[Array, "b h w c"], wanted: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """Peak signal to noise ratio in dB of images in [-1, 1]; at most 100."""
    error = jnp.square(made - wanted).mean((1, 2, 3))  # [b]
    # 10 log10(peak^2 / mean square), the peak of [-1, 1] being 2
    return -10 * jnp.log10(jnp.maximum(error / 4, 1e-10))

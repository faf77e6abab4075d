"""Images through a small convolutional autoencoder: a few latent channels, one cell per patch.

1. input: (x + 1) / 2 for x in [-1, 1]; network: ``image_net``; factor = 2^(len(widths) - 1).
2. encode: scale * z. decode: u = 2 decoder(3 tanh(z / 3)) - 1, clipped to [-1, 1].
3. loss, of u not clipped, with e = u - x and A_n the mean over n x n pixels:
   sum over n in (1, 2, 4) of mean |A_n e|  (details, and colours of whole patches)
   + ``edges`` mean |e's differences of neighbouring pixels|
   + ``tether`` mean max(|z| - 2, 0)^2  (3 tanh(z / 3) is nearly z up to there and flat beyond)
   and z has Gaussian noise of standard deviation ``noise`` added before it is decoded, so that
   nearby latents decode to nearby images, as a model of latents needs.
4. psnr = 10 log10(4 / mean square of clip(u) - x), per image, in dB.

The defaults are the published network. ``scaled`` puts latents of [-3, 3] into [0, 1] for 8-bit
storage, ``unscaled`` takes them back.

Source: TAESD (github.com/madebyollin/taesd), as diffusers' ``AutoencoderTiny``; the loss is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Float, Key, Num

from jointseg_jax.codecs.batched_map import map_rows
from jointseg_jax.codecs.image_net import ACTIVATIONS, Activation, ImageDecoder, ImageEncoder
from jointseg_jax.codecs.pixels import cells, normalise
from jointseg_jax.types import Array, Params, UserError

AnyArray = Array | np.ndarray

CHANNELS = 3

MAGNITUDE = 3.0
"""Latents that leave +-MAGNITUDE have no say any more."""

KNEE = 2.0
"""Where the loss begins to hold latents back."""

AVERAGES = (1, 2, 4)
"""Sides in pixels of the patches whose means the loss compares."""


def scaled(latents: Float[AnyArray, "..."]) -> Float[AnyArray, "..."]:
    """Unscaled latents of [-3, 3] as numbers in [0, 1], clipped; numpy stays numpy."""
    return (latents / (2 * MAGNITUDE) + 0.5).clip(0, 1)


def unscaled(values: Float[AnyArray, "..."]) -> Float[AnyArray, "..."]:
    """The latents of such numbers; numpy stays numpy."""
    return (values - 0.5) * (2 * MAGNITUDE)


@dataclass(frozen=True, kw_only=True)
class ImageTiny:
    """The image autoencoder as a codec; the module docstring says what each field does.

    ``widths`` and ``blocks`` are the encoder's, level by level from the pixels to the latents,
    ``up_widths`` and ``up_blocks`` the decoder's on the way back. ``scale`` multiplies the latents
    that leave (1 / their standard deviation fits a model of latents). ``dtype`` is that of the
    activations; parameters, latents and images are float32.
    """

    widths: Sequence[int] = (64, 64, 64, 64)
    blocks: Sequence[int] = (1, 3, 3, 3)
    up_widths: Sequence[int] = (64, 64, 64, 64)
    up_blocks: Sequence[int] = (3, 3, 3, 1)
    latent_channels: int = 4
    activation: Activation = "relu"
    scale: float = 1.0
    noise: float = 0.0
    edges: float = 1.0
    tether: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"
    kind: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        levels = len(self.widths)
        for name in ("widths", "blocks", "up_widths", "up_blocks"):
            given = tuple(getattr(self, name))
            object.__setattr__(self, name, given)
            least = 1 if name.endswith("widths") else 0
            good = len(given) == levels > 0 and min(given) >= least
            _valid(name, given, good, f"{levels or 'one or more'} numbers of at least {least}")
        _valid("latent_channels", self.latent_channels, self.latent_channels >= 1, "at least 1")
        known = self.activation in ACTIVATIONS
        _valid("activation", repr(self.activation), known, f"one of {', '.join(ACTIVATIONS)}")
        _valid("scale", self.scale, self.scale > 0, "positive")
        for name in ("noise", "edges", "tether"):
            _valid(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        known = self.dtype in ("float32", "bfloat16")
        _valid("dtype", repr(self.dtype), known, "float32 or bfloat16")

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def encoder(self) -> ImageEncoder:
        """The Linen module of params["encoder"]."""
        return ImageEncoder(
            self.widths, self.blocks, self.latent_channels, self.activation, jnp.dtype(self.dtype)
        )

    @property
    def decoder(self) -> ImageDecoder:
        """The Linen module of params["decoder"]."""
        return ImageDecoder(
            self.up_widths, self.up_blocks, CHANNELS, self.activation, jnp.dtype(self.dtype)
        )

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
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

    def encode(
        self,
        params: Params,
        image: Num[AnyArray, "batch height width channels"],
        *,
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch rows columns c"]:
        """Scaled latents of uint8 images, or of floats in [-1, 1]; nothing here is random."""
        return self.scale * self._latents(params, self._floats(image))

    def decode(
        self, params: Params, latents: Float[AnyArray, "batch rows columns c"]
    ) -> Float[Array, "batch height width 3"]:
        """Images in [-1, 1], some at a time."""
        widest = latents.shape[1] * latents.shape[2] * self.factor**2 * self.up_widths[-1]

        def images(rows: Array) -> Array:
            return jnp.clip(self.unclipped(params, rows), -1, 1)

        return map_rows(images, jnp.asarray(latents, jnp.float32), values_per_row=widest)

    def unclipped(
        self, params: Params, latents: Float[AnyArray, "batch rows columns c"]
    ) -> Float[Array, "batch height width 3"]:
        """Images as the network gives them, which may leave [-1, 1]."""
        z = jnp.asarray(latents, jnp.float32) / self.scale
        z = MAGNITUDE * jnp.tanh(z / MAGNITUDE)
        return 2 * self.decoder.apply({"params": params["decoder"]}, z) - 1

    def loss(
        self,
        params: Params,
        images: Num[AnyArray, "batch height width channels"],
        keys: Key[Array, " batch"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss of the module docstring; beside it its parts, PSNR and the latents' spread."""
        x = self._floats(images)
        z = self._latents(params, x)
        seen = z + self.noise * _normal(keys, z.shape[1:]) if self.noise else z
        made = self.unclipped(params, self.scale * seen)
        parts = {
            "pixels": multi_scale(made - x),
            "edges": self.edges * differences(made - x),
            "tether": self.tether * jnp.square(jax.nn.relu(jnp.abs(z) - KNEE)).mean(),
        }
        total = sum(parts.values())
        beside = {"psnr": psnr(jnp.clip(made, -1, 1), x).mean(), "latent/std": jnp.std(z)}
        return total, {"loss": total} | {"loss/" + k: v for k, v in parts.items()} | beside

    def _latents(self, params: Params, x: Array) -> Array:
        return self.encoder.apply({"params": params["encoder"]}, 0.5 * (x + 1))

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
    sides = [n for n in AVERAGES if not (error.shape[1] % n or error.shape[2] % n)]
    means = [reduce(error, "b (h y) (w x) c -> b h w c", "mean", y=n, x=n) for n in sides]
    return sum(jnp.abs(m).mean() for m in means)


def differences(error: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """Mean absolute difference of vertical, plus of horizontal, neighbours."""
    along = (jnp.abs(jnp.diff(error, axis=axis)) for axis in (1, 2))
    return sum(d.mean() for d in along if d.size)


def psnr(made: Float[Array, "b h w c"], wanted: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """Peak signal to noise ratio in dB of images in [-1, 1]; at most 100."""
    error = jnp.square(made - wanted).mean((1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(error / 4, 1e-10))


def _normal(keys: Key[Array, " batch"], shape: tuple[int, ...]) -> Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _valid(name: str, given: Any, good: bool, what: str) -> None:
    if not good:
        raise ValueError(
            f"image_tiny codec: {name} = {given}; it must be {what}. Change the codec config."
        )

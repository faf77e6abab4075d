"""Images as they are, and latents that were encoded beforehand.

1. ``normalise``: u in {0 .. 255} -> u / 127.5 - 1 in [-1, 1].
2. ``quantise``: x -> round(127.5 (clip(x, -1, 1) + 1)), the exact inverse on all 256 values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num, UInt8

from jointseg_jax.codecs.codec import AnyLatents, Fixed, Keys, Kind, LatentMaps
from jointseg_jax.types import AnyArray, Array, ArrayT, Params, UserError, require

Images = Num[AnyArray, "batch rows columns c"]
AnyRows = Float[AnyArray, " batch *shape"]
Rows = Float[Array, " batch *shape"]


def normalise(image: UInt8[ArrayT, "..."]) -> Float[ArrayT, "..."]:
    """Float32 in [-1, 1] from 8-bit values; numpy stays numpy."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def quantise(image: Float[ArrayT, "..."]) -> UInt8[ArrayT, "..."]:
    """The nearest 8-bit values, after clipping to [-1, 1]; numpy stays numpy."""
    return ((image.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Pixels(Fixed):
    """The identity codec of images: a latent cell is a pixel in [-1, 1]."""

    channels: int = 3
    kind: ClassVar[Kind] = "image"

    def __post_init__(self) -> None:
        _positive("pixels codec", channels=self.channels)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The image's own shape."""
        return (*size, self.channels)

    def encode(self, params: Params, image: Images, *, keys: Keys | None = None) -> LatentMaps:
        """Float32 in [-1, 1] from uint8, or from floats that are already in [-1, 1]."""
        _same_channels("pixels codec", image.shape[-1], self.channels)
        image = jnp.asarray(image)
        if image.dtype == jnp.uint8:
            return normalise(image)
        # Integers of another type are refused: their range says nothing about grey levels.
        if not jnp.issubdtype(image.dtype, jnp.floating):
            raise UserError(
                f"pixels codec: the image has dtype {image.dtype}; it must be uint8 in [0, 255] or "
                "a float in [-1, 1]. Convert it where the data source reads it."
            )
        return image.astype(jnp.float32)

    def decode(self, params: Params, latents: AnyLatents) -> LatentMaps:
        """The latents clipped to [-1, 1]."""
        return jnp.clip(jnp.asarray(latents, jnp.float32), -1, 1)


@dataclass(frozen=True, kw_only=True)
class Latents(Fixed):
    """The identity codec of a batch field that already holds (scaled) latents."""

    channels: int = 4  # of a map of latents
    factor: int = 8  # pixels per cell of the map, along each side
    shape: Sequence[int] | None = None  # fixed, of what is no map (a token list, a vector)
    kind: ClassVar[Kind] = "latents"

    def __post_init__(self) -> None:
        _positive("latents codec", channels=self.channels, factor=self.factor)
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))
            _positive("latents codec", **{f"shape[{i}]": n for i, n in enumerate(self.shape)})

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The shape of the stored latents of an image of this size."""
        if self.shape is not None:
            return tuple(self.shape)
        return (*cells("latents codec", size, self.factor), self.channels)

    def encode(self, params: Params, latents: AnyRows, *, keys: Keys | None = None) -> Rows:
        """The latents in float32."""
        if self.shape is None:
            _same_channels("latents codec", latents.shape[-1], self.channels)
        elif latents.shape[1:] != self.shape:
            raise UserError(
                f"latents codec: rows of shape {latents.shape[1:]} were given; the codec was built "
                f"for {self.shape}. Change the codec's `shape` or the batch field it is given."
            )
        return jnp.asarray(latents, jnp.float32)

    def decode(self, params: Params, latents: AnyRows) -> Rows:
        """The latents in float32."""
        return jnp.asarray(latents, jnp.float32)


def cells(where: str, size: tuple[int, ...], factor: int) -> tuple[int, int]:
    """Height and width in latent cells of ``factor`` pixels a side.

    Raises:
      UserError: a side is not a multiple of ``factor``.
    """
    height, width = size
    if height % factor or width % factor or min(size) < 1:
        raise UserError(
            f"{where}: a map of {height} x {width} pixels was given; both sides must be positive "
            f"multiples of {factor}. Change the image size in the data config, or the codec."
        )
    return height // factor, width // factor


def _positive(where: str, **values: int) -> None:
    for name, value in values.items():
        require(f"{where}: {name}", value, value >= 1, "at least 1", "Fix the config.")


def _same_channels(where: str, got: int, channels: int) -> None:
    if got != channels:
        raise UserError(
            f"{where}: the array has {got} channels; the codec was built for {channels}. "
            "Change the codec's `channels` or the batch field it is given."
        )

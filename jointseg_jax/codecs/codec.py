"""What a codec is: the way of one stream between pixels and latents.

1. ``decode(params, encode(params, x)) == x`` for every ``x`` the codec can represent.
2. Parameters are an argument, never part of the object; ``{}`` where there are none.
3. Randomness comes in as one typed key per row, so a row depends on its own key only.

Image codecs take uint8 or float [-1, 1] and return float32 [-1, 1]; annotation codecs take
integer label maps in which ``VOID`` may stand, and return int32 label maps.
"""

from typing import ClassVar, Literal, Protocol, runtime_checkable

import jax
from jaxtyping import Float, Int, Int32, Key

from jointseg_jax.types import AnyArray, Array, Params

Keys = Key[Array, " batch"]
LabelMaps = Int[AnyArray, "batch height width"]
Labels = Int32[Array, "batch height width"]
Confidence = Float[Array, "batch height width"]
Reading = tuple[Labels, Confidence]
AnyLatents = Float[AnyArray, "batch rows columns c"]
LatentMaps = Float[Array, "batch rows columns c"]
LossAndMetrics = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]

Kind = Literal["image", "labels", "panoptic", "latents"]

CHANGE = "Change the codec config."
"""How an error about a codec's field ends."""


@runtime_checkable
class Codec(Protocol):
    """Maps a batch of one stream to latents and back."""

    kind: ClassVar[Kind]
    """What the pixels of the stream are."""

    def init(self, key: Array) -> Params:
        """Fresh parameters, ``{}`` if there are none."""
        ...

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Rows, columns and channels of the latent of a map of (height, width) pixels."""
        ...

    def encode(self, params: Params, x: AnyArray, /, *, keys: Array | None = None) -> Array:
        """Float32 latents ``[batch, *latent_shape]``; without keys nothing is random."""
        ...

    def decode(self, params: Params, latents: AnyArray, /) -> Array:
        """The stream in pixels."""
        ...


@runtime_checkable
class AnnotationCodec(Codec, Protocol):
    """A codec of label maps, which also says how sure its reading is."""

    def decode_with_confidence(self, params: Params, latents: AnyArray, /) -> tuple[Array, Array]:
        """int32 labels and float32 confidences in [0, 1], both ``[batch, height, width]``."""
        ...


@runtime_checkable
class PanopticCodec(Codec, Protocol):
    """A codec of ``[batch, height, width, 2]`` maps of labels and instance numbers (0: none)."""

    def read(self, params: Params, latents: AnyArray, /) -> tuple[Array, Array, Array]:
        """int32 labels, int32 numbers and float32 confidences, all ``[batch, height, width]``."""
        ...


@runtime_checkable
class TrainableCodec(Codec, Protocol):
    """A codec with parameters to be learned from its own stream."""

    def loss(self, params: Params, x: AnyArray, keys: Array, /) -> tuple[Array, dict[str, Array]]:
        """The scalar to minimise, and what to log with it."""
        ...


class Fixed:
    """A codec without parameters."""

    def init(self, key: Key[Array, ""]) -> Params:
        """No parameters."""
        return {}


def two_keys(keys: Array) -> tuple[Array, Array]:
    """Each row's key split into two, for two independent uses; both are ``[batch]``."""
    pairs = jax.vmap(jax.random.split)(keys)  # [batch, 2]
    return pairs[:, 0], pairs[:, 1]

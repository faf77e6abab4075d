"""What a codec is: the way of one stream between pixels and latents.

1. ``decode(params, encode(params, x)) == x`` for every ``x`` the codec can represent.
2. Parameters are an argument, never part of the object; ``{}`` where there are none.
3. Randomness comes in as one typed key per row, so a row depends on its own key only.

Image codecs take uint8 or float [-1, 1] and return float32 [-1, 1]; annotation codecs take
integer label maps in which ``VOID`` may stand, and return int32 label maps.
"""

from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from jointseg_jax.types import Array, Params


@runtime_checkable
class Codec(Protocol):
    """Maps a batch of one stream to latents and back; ``kind`` is what the pixels are."""

    kind: ClassVar[Literal["image", "labels", "panoptic", "latents"]]

    def init(self, key: Array) -> Params:
        """Fresh parameters, ``{}`` if there are none."""
        ...

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Rows, columns and channels of the latent of a map of (height, width) pixels."""
        ...

    def encode(self, params: Params, x: Any, *, keys: Array | None = None) -> Array:
        """Float32 latents."""
        ...

    def decode(self, params: Params, latents: Array) -> Array:
        """The stream in pixels."""
        ...


@runtime_checkable
class AnnotationCodec(Codec, Protocol):
    """A codec of label maps, which also says how sure its reading is."""

    def decode_with_confidence(self, params: Params, latents: Array) -> tuple[Array, Array]:
        """int32 labels and float32 confidences in [0, 1], both ``[batch, height, width]``."""
        ...


@runtime_checkable
class PanopticCodec(Codec, Protocol):
    """A codec of ``[batch, height, width, 2]`` maps of labels and instance numbers (0: none)."""

    def read(self, params: Params, latents: Array) -> tuple[Array, Array, Array]:
        """int32 labels, int32 numbers and float32 confidences, all ``[batch, height, width]``."""
        ...


@runtime_checkable
class TrainableCodec(Codec, Protocol):
    """A codec with parameters to be learned from its own stream."""

    def loss(self, params: Params, x: Any, keys: Array) -> tuple[Array, dict[str, Array]]:
        """The scalar to minimise and what to log beside it."""
        ...

"""Two codecs one after the other: labels become an image, the image becomes latents.

1. encode(labels) = second.encode(first.encode(labels)),
   decode(latents) = first.decode(second.decode(latents)).
2. The parameters are the second's; the first has none.

With ``Pixels`` as the second, latents are the first's own.

Source: SemFlow (2405.20282), section 3.2 (pseudo masks through the image autoencoder).
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import jax
from jaxtyping import Key

from jointseg_jax.codecs.codec import (
    AnnotationCodec,
    AnyLatents,
    Codec,
    Keys,
    Kind,
    LabelMaps,
    Labels,
    LatentMaps,
    Reading,
    two_keys,
)
from jointseg_jax.types import Array, Params


@dataclass(frozen=True, kw_only=True)
class Chain:
    """An annotation codec without parameters whose latents an image codec takes as an image."""

    first: Codec  # of labels, to an image; without parameters, such as ``Palette``
    second: Codec  # of images
    kind: ClassVar[Kind] = "labels"

    def __post_init__(self) -> None:
        for name, kind in (("first", "labels"), ("second", "image")):
            own = getattr(self, name).kind
            if own != kind:
                raise ValueError(
                    f"chain codec: `{name}` is a codec of {own}; it must be one of {kind}. "
                    f"Change `{name}` in the codec config."
                )
        # Shapes alone: parameters of a large codec must not be drawn to find that there are some.
        if jax.eval_shape(lambda: self.first.init(jax.random.key(0))):
            raise ValueError(
                f"chain codec: `first` is {type(self.first).__name__}, which has parameters; it "
                "must have none, such as palette. Change `first` in the codec config."
            )

    @property
    def _reader(self) -> AnnotationCodec:
        # A codec of labels, as the constructor makes sure: there the mistake is named.
        return cast(AnnotationCodec, self.first)

    def init(self, key: Key[Array, ""]) -> Params:
        """The parameters of the second."""
        return self.second.init(key)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """That of the second, for an image of the size of the first's latents."""
        height, width, _ = self.first.latent_shape(size)
        return self.second.latent_shape((height, width))

    def encode(self, params: Params, labels: LabelMaps, *, keys: Keys | None = None) -> LatentMaps:
        """The second's latents of the first's."""
        # One key perturbs colours, the other samples latents.
        first_keys, second_keys = (None, None) if keys is None else two_keys(keys)
        image = self.first.encode({}, labels, keys=first_keys)
        return self.second.encode(params, image, keys=second_keys)

    def decode(self, params: Params, latents: AnyLatents) -> Labels:
        """What the first reads in the image that the second gives."""
        return self._reader.decode({}, self.second.decode(params, latents))

    def decode_with_confidence(self, params: Params, latents: AnyLatents) -> Reading:
        """The labels of ``decode``, and how sure the first codec is of its reading."""
        return self._reader.decode_with_confidence({}, self.second.decode(params, latents))

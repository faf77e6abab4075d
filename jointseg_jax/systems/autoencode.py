"""One codec trained to give back what it was given.

1. ``loss`` is the codec's own: of label maps the cross-entropy of its logits, without a KL term, of
   images a distance between pixels.
2. An image codec that a ``chain`` is to take for annotations must know their colours. With a
   ``palette``, each row codes the coloured labels in place of its image with probability
   ``painted``. Which rows do follows from each row's own key.

Source: JoDiffusion eq. 1 (label autoencoder).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jointseg_jax.codecs.pixels import normalise, quantise
from jointseg_jax.rng import fold
from jointseg_jax.systems.system import Batch, Pairs
from jointseg_jax.types import Array, Params


@dataclass(frozen=True, kw_only=True)
class Autoencode:
    """A trainable codec and the batch field it codes.

    Attributes:
      codec: has ``init``, ``loss(params, values, keys)``, ``encode`` and ``decode``.
      field: the batch field.
      size: ``(height, width)`` of the training crops in pixels.
      palette: an annotation codec whose latents are images, for an image codec to learn too.
      painted: the part of the rows that learn the palette's images.
    """

    codec: Any
    size: tuple[int, int]
    field: str = "labels"
    palette: Any = None
    painted: float = 0.5

    def __post_init__(self) -> None:
        if self.palette is not None and (self.codec.kind, self.palette.kind) != ("image", "labels"):
            raise ValueError(
                f"a codec of {self.codec.kind} and a palette of {self.palette.kind} were given; "
                "they must be of image and labels. Change system.codec or system.palette."
            )
        if not 0 <= self.painted <= 1:
            raise ValueError(
                f"painted = {self.painted} was given; it must be in [0, 1]. Change system.painted."
            )

    def init(self, key: Array) -> Params:
        """Fresh parameters of the codec."""
        return self.codec.init(key)

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The codec's own loss and metrics."""
        del frozen
        return self.codec.loss(params, self._values(batch, keys), keys)

    def _values(self, batch: Batch, keys: Array) -> Array:
        if self.palette is None:
            return batch[self.field]
        colours = self.palette.encode({}, batch["labels"], keys=fold(keys, "colours"))
        painted = jax.vmap(lambda key: jax.random.bernoulli(key, self.painted))
        chosen = painted(fold(keys, "painted")).reshape(-1, 1, 1, 1)
        return jnp.where(chosen, colours, normalise(batch[self.field]))

    def preview(self, params: Params, frozen: Params, batch: Batch, keys: Array) -> Pairs:
        """The batch's pairs, the coded half of each after encode and decode."""
        del frozen
        latents = self.codec.encode(params, batch[self.field], keys=keys)
        return SHOWN[self.codec.kind](self.codec, params, latents, batch)


def _labels(codec: Any, params: Params, latents: Array, batch: Batch) -> Pairs:
    labels, confidence = codec.decode_with_confidence(params, latents)
    return {"image": batch["image"], "labels": labels, "confidence": confidence}


def _image(codec: Any, params: Params, latents: Array, batch: Batch) -> Pairs:
    labels = batch["labels"].astype(jnp.int32)
    image = quantise(codec.decode(params, latents))
    return {"image": image, "labels": labels, "confidence": jnp.ones(labels.shape)}


SHOWN = {"labels": _labels, "image": _image}
"""What a preview shows, by the kind of the codec."""

"""One codec trained to give back what it was given.

The loss is the codec's own: of label maps the cross-entropy of its logits, without a KL term, of
images a distance between pixels. An image codec that a ``chain`` is to take for annotations must
know their colours: with a ``palette``, each row codes the coloured labels instead of its image with
probability ``painted``.

Source: JoDiffusion eq. 1 (label autoencoder).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp

from jointseg_jax.codecs.codec import AnnotationCodec, Codec, TrainableCodec
from jointseg_jax.codecs.pixels import normalise
from jointseg_jax.rng import fold
from jointseg_jax.systems.system import READERS, Batch, Pairs
from jointseg_jax.types import Array, Params


@dataclass(frozen=True, kw_only=True)
class Autoencode:
    """A trainable codec and the batch field it codes."""

    codec: Codec  # trainable; to be measured alone, any
    size: tuple[int, int]  # (height, width) of the training crops in pixels
    field: str = "labels"  # of the batch
    palette: AnnotationCodec | None = None  # its latents are images, for an image codec to learn
    painted: float = 0.5  # the part of the rows that learn the palette's images

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
        codec = cast(TrainableCodec, self.codec)
        return codec.loss(params, self._values(batch, keys), keys)

    def _values(self, batch: Batch, keys: Array) -> Array:
        """What the codec is to give back: the batch's field, or in some rows its colours."""
        if self.palette is None:
            return batch[self.field]
        colours = self.palette.encode({}, batch["labels"], keys=fold(keys, "colours"))
        # which rows are painted follows from each row's own key, whatever the batch around it
        draw = jax.vmap(lambda key: jax.random.bernoulli(key, self.painted))
        painted = draw(fold(keys, "painted")).reshape(-1, 1, 1, 1)  # [b, 1, 1, 1]
        return jnp.where(painted, colours, normalise(batch[self.field]))  # [b, h, w, 3]

    def preview(self, params: Params, frozen: Params, batch: Batch, keys: Array) -> Pairs:
        """The batch's pairs, the coded half of each after encode and decode."""
        del frozen
        latents = self.codec.encode(params, batch[self.field], keys=keys)
        labels = batch["labels"].astype(jnp.int32)
        pairs = {"image": batch["image"], "labels": labels, "confidence": jnp.ones(labels.shape)}
        kind = self.codec.kind  # also the field of what it reads
        return pairs | READERS[kind](self.codec, kind, params, latents)

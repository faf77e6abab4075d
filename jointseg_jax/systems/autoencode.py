"""One annotation codec trained to give back what it was given.

``loss = codec.loss(codec.logits(encode(labels)), labels)``; there is no KL term.

Source: JoDiffusion eq. 1 (label autoencoder).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jointseg_jax.systems.system import Batch, Pairs
from jointseg_jax.types import Array, Params


@dataclass(frozen=True, kw_only=True)
class Autoencode:
    """A trainable codec and the batch field it codes.

    Attributes:
      codec: has ``init``, ``loss(params, values, keys)``, ``encode`` and ``decode``.
      field: the batch field.
      size: ``(height, width)`` of the training crops in pixels.
    """

    codec: Any
    size: tuple[int, int]
    field: str = "labels"

    def init(self, key: Array) -> Params:
        """Fresh parameters of the codec."""
        return self.codec.init(key)

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The codec's own loss and metrics."""
        del frozen
        return self.codec.loss(params, batch[self.field], keys)

    def preview(self, params: Params, frozen: Params, batch: Batch, keys: Array) -> Pairs:
        """The batch's images beside their annotations after encode and decode."""
        del frozen
        latents = self.codec.encode(params, batch[self.field], keys=keys)
        labels, confidence = self.codec.decode_with_confidence(params, latents)
        return {"image": batch["image"], "labels": labels, "confidence": confidence}

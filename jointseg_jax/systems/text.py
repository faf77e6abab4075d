"""Where text features come from.

Both kinds turn the batch field ``text`` into features ``[batch, words, width]`` and know the
features of the empty prompt, which stand for "no text" in training (text drop) and in
classifier-free guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jointseg_jax.models.text import WordEmbedding
from jointseg_jax.types import Array, Params


@dataclass(frozen=True, kw_only=True)
class Words:
    """Word embeddings over a fixed vocabulary; the empty prompt is all padding.

    Attributes:
      trainable: learn the table with the denoiser. A text *stream* (text that is itself diffused)
        needs a table that stays: with ``False`` it is drawn once, unit variance, from ``seed``.
    """

    vocabulary_size: int
    width: int
    length: int
    trainable: bool = True
    seed: int = 0

    @property
    def module(self) -> WordEmbedding:
        return WordEmbedding(
            vocabulary_size=self.vocabulary_size, width=self.width, length=self.length
        )

    def init(self, key: Array) -> Params:
        """Parameters of the table, or ``{}`` when it is fixed."""
        if not self.trainable:
            return {}
        return self.module.init(key, jnp.zeros((1, self.length), jnp.int32))["params"]

    def features(self, params: Params, text: Array) -> Array:
        """Features of token ids ``[batch, words]``."""
        if self.trainable:
            return self.module.apply({"params": params}, text)
        table = jax.random.normal(
            jax.random.key(self.seed), (self.vocabulary_size, self.width), jnp.float32
        )
        # jnp.take answers NaN for an id outside the table: loud, where clamping would be silent
        return jnp.take(table, text, axis=0)

    def empty(self, batch: int) -> Array:
        """Token ids of the empty prompt."""
        return jnp.zeros((batch, self.length), jnp.int32)


@dataclass(frozen=True, kw_only=True)
class Features:
    """Precomputed features that come with the record; the empty prompt is all zeros."""

    width: int
    length: int

    def init(self, key: Array) -> Params:
        """Nothing to learn."""
        del key
        return {}

    def features(self, params: Params, text: Array) -> Array:
        """The features themselves."""
        del params
        return text.astype(jnp.float32)

    def empty(self, batch: int) -> Array:
        """Features of the empty prompt."""
        return jnp.zeros((batch, self.length, self.width), jnp.float32)


TEXTS = {"words": Words, "features": Features}

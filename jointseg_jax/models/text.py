"""Where text features come from: words that become rows of a table, or features of the record.

Both kinds turn the batch field ``text`` into features ``[batch, words, width]`` and know the
features of the empty prompt, which stand for "no text" in training (text drop) and in
classifier-free guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jointseg_jax.models.blocks import normal
from jointseg_jax.types import Params, require_seed, require_values

PADDING = 0
"""Id of the padding word; a prompt of nothing else is the empty prompt."""


class WordEmbedding(nn.Module):
    """A trained table of words: ``features[i] = table[id_i] + position_i``.

    Initial values: table normal(1), so that features have the unit scale of a pretrained
    encoder's; positions normal(0.02).
    """

    vocabulary_size: int  # number of ids, the padding word included
    width: int  # of a feature
    length: int  # words of every prompt, after padding

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("vocabulary_size", "width", "length")}
        require_values("WordEmbedding", min(sizes.values()) >= 1, "all are at least 1.", **sizes)
        super().__post_init__()

    @nn.compact
    def __call__(self, ids: Int[Array, "batch words"]) -> Float[Array, "batch words width"]:
        if ids.shape[1] != self.length:
            raise ValueError(
                f"WordEmbedding: prompts have {ids.shape[1]} words, want {self.length}; "
                "change `length` or the tokenizer's."
            )
        shape = (self.vocabulary_size, self.width)
        table = self.param("embedding", nn.initializers.normal(1.0), shape)
        position = self.param("position", normal, (self.length, self.width))
        # jnp.take gives NaN for an id outside the table: loud, where clamping would be silent
        return jnp.take(table, ids, axis=0) + position[None]  # [b, l, d] + [1, l, d]

    @nn.nowrap
    def empty(self) -> Int[np.ndarray, " words"]:
        """Returns the ids of the empty prompt."""
        return np.full((self.length,), PADDING, np.int32)


@dataclass(frozen=True, kw_only=True)
class Words:
    """Word embeddings over a fixed vocabulary; the empty prompt is all padding.

    A text *stream* (text that is itself diffused) needs ``trainable=False``: a target that stays.
    """

    vocabulary_size: int  # number of ids, the padding word included
    width: int  # of a feature
    length: int  # words of every prompt, after padding
    trainable: bool = True  # learned with the denoiser; False: drawn once, unit variance
    seed: int = 0  # of the table that is not trainable

    def __post_init__(self) -> None:
        require_seed("words: seed", self.seed)

    @property
    def module(self) -> WordEmbedding:
        return WordEmbedding(self.vocabulary_size, self.width, self.length)

    def init(self, key: Key[Array, ""]) -> Params:
        """Returns the parameters of the table, or ``{}`` when it is fixed."""
        if not self.trainable:
            return {}
        return self.module.init(key, jnp.zeros((1, self.length), jnp.int32))["params"]

    def features(
        self, params: Params, text: Int[Array, "batch words"]
    ) -> Float[Array, "batch words width"]:
        """Returns the features of token ids; NaN where an id lies outside the table."""
        if self.trainable:
            # its empty prompt is trained like any other: text drop shows it often
            return jnp.asarray(self.module.apply({"params": params}, text))
        # drawn again from the seed wherever it is read: a fixed table is in no checkpoint
        shape = (self.vocabulary_size, self.width)
        table = jax.random.normal(jax.random.key(self.seed), shape, jnp.float32)
        return jnp.take(table, text, axis=0)  # no position: every word alone is one vector

    def empty(self, batch: int) -> Int[Array, "batch words"]:
        """Returns token ids of the empty prompt."""
        return jnp.zeros((batch, self.length), jnp.int32)


@dataclass(frozen=True, kw_only=True)
class Features:
    """Precomputed features that come with the record; the empty prompt is all zeros."""

    width: int  # of a feature
    length: int  # features of every record, after padding

    def init(self, key: Key[Array, ""]) -> Params:
        """Returns ``{}``: nothing is learned."""
        del key
        return {}

    def features(
        self, params: Params, text: Float[Array, "batch words width"]
    ) -> Float[Array, "batch words width"]:
        """Returns the features themselves, in float32."""
        del params
        return text.astype(jnp.float32)

    def empty(self, batch: int) -> Float[Array, "batch words width"]:
        """Returns features of the empty prompt."""
        return jnp.zeros((batch, self.length, self.width), jnp.float32)


TEXTS = {"words": Words, "features": Features}
"""``kind`` of text in configs -> class."""

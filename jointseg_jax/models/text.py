"""A trained table of words, for text without a pretrained encoder.

1. ``features[i] = table[id_i] + position_i``, id 0 being the padding word.
2. The empty prompt is padding throughout; its features are trained like any other's.

Initial values: table normal(1), so that features have the unit scale of a pretrained encoder's;
positions normal(0.02).
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jointseg_jax.models.blocks import normal

PADDING = 0


class WordEmbedding(nn.Module):
    """Word ids to features.

    Args:
      vocabulary_size: number of ids, the padding word included.
      width: size of a feature.
      length: words of every prompt, after padding.
    """

    vocabulary_size: int
    width: int
    length: int

    def __post_init__(self):
        if min(self.vocabulary_size, self.width, self.length) < 1:
            raise ValueError(
                f"WordEmbedding: vocabulary_size={self.vocabulary_size}, width={self.width}, "
                f"length={self.length}; all are at least 1."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, ids: Int[Array, "batch words"]) -> Float[Array, "batch words width"]:
        if ids.shape[1] != self.length:
            raise ValueError(
                f"WordEmbedding: prompts have {ids.shape[1]} words, want {self.length}; "
                "change `length` or the tokenizer's."
            )
        table = self.param(
            "embedding", nn.initializers.normal(1.0), (self.vocabulary_size, self.width)
        )
        position = self.param("position", normal, (self.length, self.width))
        # jnp.take answers NaN for an id outside the table: loud, where clamping would be silent
        return jnp.take(table, ids, axis=0) + position[None]

    @nn.nowrap
    def empty(self) -> Int[np.ndarray, words]:
        """Ids of the empty prompt."""
        return np.full((self.length,), PADDING, np.int32)

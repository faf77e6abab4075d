"""Word embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.models.text import WordEmbedding


def test_features_are_table_rows_plus_positions():
    module = WordEmbedding(vocabulary_size=5, width=4, length=3)
    ids = jnp.array([[1, 4, 0], [2, 2, 2]])
    got, variables = module.init_with_output(jax.random.key(0), ids)
    table, position = (np.asarray(variables["params"][k]) for k in ("embedding", "position"))
    np.testing.assert_array_equal(got, table[np.asarray(ids)] + position[None])


def test_the_empty_prompt_is_padding():
    module = WordEmbedding(vocabulary_size=5, width=4, length=3)
    np.testing.assert_array_equal(module.empty(), [0, 0, 0])


def test_a_word_outside_the_vocabulary_is_loud():
    module = WordEmbedding(vocabulary_size=5, width=4, length=2)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert np.isnan(module.apply(variables, jnp.array([[5, 0]]))).any()


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="width=0"):
        WordEmbedding(vocabulary_size=5, width=0, length=2)
    module = WordEmbedding(vocabulary_size=5, width=4, length=2)
    with pytest.raises(ValueError, match="prompts have 3 words, want 2"):
        module.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))

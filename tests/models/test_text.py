"""Text features: the empty prompt, tables that learn and tables that stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.models.text import Features, WordEmbedding, Words

SIZES = {"vocabulary_size": 50, "width": 16, "length": 4}
IDS = jnp.asarray([[1, 2, 3, 0], [49, 7, 0, 0]], jnp.int32)


@pytest.mark.parametrize("trainable", [True, False])
def test_words_become_rows_of_a_table(trainable):
    words = Words(**SIZES, trainable=trainable)
    params = words.init(jax.random.key(0))
    features = words.features(params, IDS)
    assert features.shape == (2, 4, 16) and features.dtype == jnp.float32
    same = words.features(params, jnp.full((1, 4), 7, jnp.int32))
    # the word alone makes a fixed feature; a learned one also carries its position
    assert np.array_equal(features[1, 1], same[0, 1])
    assert np.array_equal(same[0, 0], same[0, 1]) == (not trainable)


def test_a_fixed_table_has_no_parameters_and_follows_its_seed():
    words = Words(**SIZES, trainable=False)
    assert words.init(jax.random.key(0)) == {}
    first, again, other = (
        Words(**SIZES, trainable=False, seed=seed).features({}, IDS) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    table = words.features({}, jnp.arange(50)[:, None].repeat(4, axis=1))[:, 0]
    assert abs(np.std(table) - 1) < 0.1  # 800 draws: the sd of their std is 0.025


@pytest.mark.parametrize("trainable", [True, False])
def test_a_word_outside_the_table_is_not_taken_for_another(trainable):
    words = Words(**SIZES, trainable=trainable)
    outside = IDS.at[0, 0].set(50)
    features = words.features(words.init(jax.random.key(0)), outside)
    assert np.isnan(features[0, 0]).all() and np.isfinite(features[1]).all()


def test_the_empty_prompt_of_words_is_padding():
    words = Words(**SIZES)
    empty = words.empty(3)
    assert empty.dtype == jnp.int32
    np.testing.assert_array_equal(empty, np.zeros((3, 4)))
    np.testing.assert_array_equal(empty[0], words.module.empty())


def test_features_pass_through_and_their_empty_prompt_is_zero():
    features = Features(width=16, length=4)
    given = jax.random.normal(jax.random.key(0), (2, 4, 16)).astype(jnp.float16)
    assert features.init(jax.random.key(0)) == {}
    out = features.features({}, given)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, given.astype(jnp.float32))
    np.testing.assert_array_equal(features.empty(2), np.zeros((2, 4, 16), np.float32))


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

"""Keys: a row's randomness is its own, whoever computes it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax import rng
from jointseg_jax.chips import Target
from jointseg_jax.rng import flat, fold, normal, row_keys, sample_keys, uniform


def numbers(keys):
    return np.asarray(jax.random.key_data(keys))


def different(*several):
    rows = np.concatenate([numbers(keys) for keys in several])
    return len(np.unique(rows, axis=0)) == len(rows)


def test_a_row_has_the_same_key_on_any_host():
    everywhere = row_keys(3, 7, jnp.arange(8))
    parts = [row_keys(3, 7, jnp.arange(a, a + 2)) for a in (0, 2, 4, 6)]
    np.testing.assert_array_equal(numbers(everywhere), np.concatenate([numbers(p) for p in parts]))


def test_a_step_that_is_traced_makes_the_same_keys():
    traced = jax.jit(lambda step: row_keys(3, step, jnp.arange(4, dtype=jnp.uint32)))
    np.testing.assert_array_equal(numbers(traced(7)), numbers(row_keys(3, 7, jnp.arange(4))))


def test_seeds_steps_rows_and_uses_never_share_a_key():
    rows = jnp.arange(4)
    first = row_keys(0, 0, rows)
    assert different(first, row_keys(0, 1, rows), row_keys(1, 0, rows), sample_keys(0, rows))
    uses = [fold(first, use) for use in ("noise/image", "noise/mask", "time", "drop")]
    steps = [fold(first, jnp.int32(step)) for step in (0, 1)]
    assert different(first, *uses, *steps)


@pytest.mark.parametrize("seed", [2**32, 2**32 + 5, 2**64, -1, True])
def test_a_seed_that_would_be_another_is_refused(seed):
    rows = jnp.arange(2)
    for keys in (lambda: row_keys(seed, 0, rows), lambda: sample_keys(seed, rows)):
        with pytest.raises(ValueError, match=r"seed = .*0 to 4294967295 \(32 bits\)"):
            keys()


def test_all_32_bits_of_a_seed_count():
    seeds = (0, 5, 2**31, 2**31 + 5, 2**32 - 1)
    assert different(*(row_keys(seed, 0, jnp.arange(2)) for seed in seeds))
    last = jax.jit(sample_keys)(jnp.uint32(2**32 - 1), jnp.arange(2))
    np.testing.assert_array_equal(numbers(last), numbers(sample_keys(2**32 - 1, jnp.arange(2))))


def test_a_samples_key_depends_on_seed_and_index_alone():
    index = jnp.asarray([5, 2**31 + 1], jnp.uint32)
    np.testing.assert_array_equal(
        numbers(sample_keys(9, index))[:1], numbers(sample_keys(9, index[:1]))
    )
    traced = jax.jit(sample_keys)(jnp.uint32(9), index)
    np.testing.assert_array_equal(numbers(traced), numbers(sample_keys(9, index)))
    assert different(sample_keys(9, index), sample_keys(10, index))


def test_a_use_folds_each_row_by_itself():
    keys = row_keys(0, 0, jnp.arange(4))
    whole, last = fold(keys, "time"), fold(keys[3:], "time")
    np.testing.assert_array_equal(numbers(whole)[3:], numbers(last))


# ------------------------------------------------------------------------------- draws

SHAPES = [(), (5,), (4, 3), (3, 5, 2), (2, 3, 2, 3)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def bits(x):
    return np.asarray(x).tobytes()


@pytest.mark.thorough_but(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=np.dtype)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_drawn_flat_with_the_bits_of_a_draw_of_their_shape(shape, dtype):
    got = normal(row_keys(0, 0, jnp.arange(3)), jnp.zeros((3, *shape), dtype))
    # the keys are made again: none is used twice
    keys = row_keys(0, 0, jnp.arange(3))
    want = jnp.stack([jax.random.normal(key, shape, dtype) for key in keys])
    assert (got.shape, got.dtype) == (want.shape, dtype) and bits(got) == bits(want)


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("shape", SHAPES[::-1], ids=str)
def test_uniform_rows_are_drawn_flat_too(shape):
    got, keys = uniform(row_keys(0, 0, jnp.arange(3)), shape), row_keys(0, 0, jnp.arange(3))
    assert bits(got) == bits(jnp.stack([jax.random.uniform(key, shape) for key in keys]))


def test_the_hash_of_a_draw_is_coded_once_whatever_the_axes():
    keys = row_keys(0, 0, jnp.arange(3))
    lengths = [
        len(jax.jit(normal).lower(keys, jnp.zeros((3, *shape))).as_text())
        for shape in ((60,), (2, 3, 2, 5))
    ]
    assert lengths[1] < 1.05 * lengths[0]  # 1.17 when drawn in four axes


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_initial_values_are_drawn_flat_on_a_cpu_with_the_same_bits(platform, monkeypatch):
    monkeypatch.setattr(rng, "target", lambda: Target(platform, "any"))
    drawn, initialise = [], nn.initializers.normal(0.02)

    def noted(key, shape, dtype):
        drawn.append(shape)
        return initialise(key, shape, dtype)

    got = flat(noted)(jax.random.key(1), (3, 2, 2, 5))
    assert bits(got) == bits(initialise(jax.random.key(1), (3, 2, 2, 5)))
    assert drawn == [(60,) if platform == "cpu" else (3, 2, 2, 5)] and got.shape == (3, 2, 2, 5)

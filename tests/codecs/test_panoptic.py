"""Labels come back as from Bits, every instance number beside them; pooling keeps them together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.codecs.bits import Bits, PanopticBits, analog, pooled
from jointseg_jax.types import VOID, UserError

FIELDS = [
    {},
    {"order": "msb", "bits": 8, "decoding": "snap"},
    {"void": "zero", "scale": 0.3},
    {"background": "zero", "instance_bits": 3},
]


def every_pair(codec):
    """One row of all labels (VOID too) by all segments."""
    labels = np.arange(VOID, codec.classes)
    segments = np.arange(codec.instances + 1)
    pairs = np.stack(np.meshgrid(labels, segments, indexing="ij"), -1)
    return pairs.reshape(1, len(labels), len(segments), 2).astype(np.int16)


def noise(seed, shape, size):
    return size * np.random.default_rng(seed).choice([-1, 1], shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def coded(codec, values, noise):
    latents = codec.encode({}, values)
    return latents, codec.decode({}, latents + noise), codec.read({}, latents + noise)


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize("fields", FIELDS)
def test_every_pair_of_ids_returns_exactly(fields):
    codec = PanopticBits(classes=11, **fields)
    values = every_pair(codec)
    shape = (1, *codec.latent_shape(values.shape[1:3]))
    latents, decoded, (labels, segments, confidence) = coded(codec, values, 0.0)
    assert latents.shape == shape and latents.dtype == jnp.float32
    assert decoded.dtype == labels.dtype == segments.dtype == jnp.int32
    np.testing.assert_array_equal(decoded, values)
    np.testing.assert_array_equal(jnp.stack([labels, segments], -1), values)
    # Bits says > 0.5 of an exact codeword; an instance bit is sure to 1 / (1 + exp(-8)), 8 of them
    assert float(confidence.min()) > 0.5 * 0.997 and float(confidence.max()) <= 1 + 1e-6


def test_the_label_half_is_that_of_bits():
    fields = {"classes": 133, "bits": 8, "order": "msb", "pool": 2, "pooling": "mode"}
    codec, bits = PanopticBits(**fields), Bits(**fields)
    rng = np.random.default_rng(0)
    values = np.stack([rng.integers(-1, 133, (2, 8, 8)), rng.integers(0, 256, (2, 8, 8))], -1)
    latents = jax.jit(codec.encode)({}, values)
    np.testing.assert_array_equal(latents[..., :8], jax.jit(bits.encode)({}, values[..., 0]))
    assert codec.channels == 16 and codec.latent_shape((8, 6)) == (4, 3, 16)
    labels, confidence = jax.jit(bits.decode_with_confidence)({}, latents[..., :8])
    read = jax.jit(codec.read)({}, latents)
    np.testing.assert_array_equal(read[0], labels)
    assert (read[2] < confidence).all()  # that the number is right, too, is less likely


def test_noise_below_the_threshold_changes_nothing():
    codec = PanopticBits(classes=11, scale=2.0)
    values = every_pair(codec)
    shape = (1, *codec.latent_shape(values.shape[1:3]))
    _, decoded, _ = coded(codec, values, noise(0, shape, 1.999))
    np.testing.assert_array_equal(decoded, values)


def test_confidence_is_the_probability_of_both_readings():
    codec = PanopticBits(classes=4, void="forbid", instance_bits=2, noise=0.7, scale=0.5)
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    codes = 0.5 * (2 * ((np.arange(16)[:, None] >> np.arange(4)) & 1) - 1)
    distances = np.square(x[..., None, :] - codes).sum(-1)
    likelihood = np.exp(-distances / (2 * (0.7 * 0.5) ** 2))
    labels, segments, confidence = jax.jit(codec.read)({}, x)
    np.testing.assert_array_equal(labels + 4 * segments, distances.argmin(-1))
    # float32 exponents of up to about 50, whose units in the last place are 4e-6
    np.testing.assert_allclose(confidence, likelihood.max(-1) / likelihood.sum(-1), rtol=1e-4)


def naive_pooling(values, pool, pooling):
    """Window by window: the label that Bits takes, then a segment of the pixels that have it."""
    labels = np.asarray(pooled(jnp.asarray(values[..., 0], jnp.int32), pool, pooling))
    segments = np.zeros_like(labels)
    for b, y, x in np.ndindex(labels.shape):
        window = values[b, y * pool : (y + 1) * pool, x * pool : (x + 1) * pool].reshape(-1, 2)
        found = [s for label, s in window if label == labels[b, y, x] and s > 0]
        if found and pooling == "mode":
            segments[b, y, x] = max(sorted(set(found)), key=found.count)
        elif found:
            segments[b, y, x] = min(found)
    return np.stack([labels, segments], -1)


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize("pooling", ["min", "mode", "parity_min"])
@pytest.mark.parametrize("pool", [2, 4])
def test_pooling_takes_label_and_segment_from_one_pixel(pool, pooling):
    codec = PanopticBits(classes=3, pool=pool, pooling=pooling, instance_bits=3)
    rng = np.random.default_rng(0)
    values = np.stack([rng.integers(-1, 3, (2, 16, 24)), rng.integers(0, 8, (2, 16, 24))], -1)
    there_and_back = jax.jit(lambda x: codec.decode({}, codec.encode({}, x)))
    once = np.asarray(there_and_back(values))
    want = naive_pooling(values, pool, pooling)
    np.testing.assert_array_equal(once[:, ::pool, ::pool], want)
    assert once.shape == values.shape
    np.testing.assert_array_equal(there_and_back(once), once)
    for row, cells in zip(values, want):
        present = {*map(tuple, row.reshape(-1, 2).tolist())}
        assert {(c, s) for c, s in cells.reshape(-1, 2).tolist() if s} <= present


def test_a_number_that_has_no_code_is_no_instance():
    codec = PanopticBits(classes=2, instance_bits=2)
    values = np.array([[[[1, 3], [1, 4], [1, -7]]]])
    np.testing.assert_array_equal(codec.decode({}, codec.encode({}, values))[0, 0, :, 1], [3, 0, 0])


def test_instance_bits_follow_the_labels_in_the_same_order():
    codec = PanopticBits(classes=3, order="msb", scale=0.5, instance_bits=4)
    (((word,),),) = codec.encode({}, np.array([[[[1, 6]]]]))
    np.testing.assert_array_equal(word[:2], analog(np.array(2), 2, "msb", 0.5))  # 1 + the VOID code
    np.testing.assert_array_equal(word[2:], [-0.5, 0.5, 0.5, -0.5])


def test_wrong_fields_and_values_are_refused():
    with pytest.raises(ValueError, match="instance_bits = 0; it must be 1 to 15"):
        PanopticBits(classes=3, instance_bits=0)
    with pytest.raises(ValueError, match="bits codec: bits = 1; it must be large enough for 4 cod"):
        PanopticBits(classes=3, bits=1)
    with pytest.raises(UserError, match="multiples of 4"):
        PanopticBits(classes=3, pool=4).encode({}, np.zeros((1, 6, 8, 2), int))

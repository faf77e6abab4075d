"""Every id returns, small noise changes nothing, pooling and snapping keep their rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.codecs import batched_map
from jointseg_jax.codecs.bits import Bits, analog, bits_for, integers, pooled
from jointseg_jax.types import VOID, UserError

SPECIALS = [("code", "code"), ("zero", "code"), ("forbid", "code"), ("code", "zero")]
SPECIALS += [("forbid", "zero")]


READINGS = [("lsb", "threshold"), ("msb", "threshold"), ("msb", "snap")]


def codecs(special, sizes, **fields):
    void, background = special
    return [
        Bits(classes=n, void=void, background=background, order=o, decoding=d, **fields)
        for n in sizes
        for o, d in READINGS
    ]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def every_id(codec):
    ids = np.arange(-1 if codec.void != "forbid" else 0, codec.classes)
    return np.kron(ids.reshape(1, 1, -1), np.ones((1, codec.pool, codec.pool), int))


@functools.partial(jax.jit, static_argnums=0)
def coded(codecs, maps, noises):
    """All in one program: compiling is what takes the time."""
    encoded = [c.encode(c.init(jax.random.key(0)), x) for c, x in zip(codecs, maps)]
    noisy = [x + n for x, n in zip(encoded, noises)]
    return encoded, [c.decode_with_confidence({}, x) for c, x in zip(codecs, noisy)]


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize("special", SPECIALS)
def test_every_id_returns_exactly(special):
    made = codecs(special, (2, 16, 17, 133), scale=0.3)
    maps = [every_id(c) for c in made]
    encoded, decoded = coded(tuple(made), maps, [0.0] * len(made))
    for codec, ids, latents, (labels, confidence) in zip(made, maps, encoded, decoded):
        np.testing.assert_array_equal(labels, ids, err_msg=str(codec))
        assert latents.dtype == jnp.float32 and labels.dtype == jnp.int32
        # the nearest other codeword is one bit away (exp(-8) at noise 1/2), the origin at most
        # half the bits (exp(-2 bits)): an exact codeword is always the likely one
        assert float(confidence.min()) > 0.5 and float(confidence.max()) <= 1 + 1e-6


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("special", SPECIALS)
def test_noise_below_the_threshold_changes_nothing(special):
    made = [c for pool in (1, 2) for c in codecs(special, (21,), pool=pool, scale=2.0)]
    maps = [np.repeat(every_id(c), 8, axis=0) for c in made]
    shapes = [(8, *c.latent_shape(x.shape[1:])) for c, x in zip(made, maps)]
    reach = 0.999 * (1.0 if "zero" in special else 2.0)  # half where the origin is a codeword
    signs = np.random.default_rng(0)
    noises = [np.float32(reach) * signs.choice([-1, 1], s).astype(np.float32) for s in shapes]
    encoded, decoded = coded(tuple(made), maps, noises)
    for codec, ids, shape, latents, (labels, _) in zip(made, maps, shapes, encoded, decoded):
        assert latents.shape == shape
        np.testing.assert_array_equal(labels, ids, err_msg=str(codec))


def test_the_table_of_specials():
    ids = np.array([[[VOID, 0, 1, 3]]])
    words = {s: Bits(classes=4, void=s[0], background=s[1]).encode({}, ids)[0, 0] for s in SPECIALS}
    np.testing.assert_array_equal(
        words["code", "code"], [[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]
    )
    np.testing.assert_array_equal(words["zero", "code"], [[0, 0], [-1, -1], [1, -1], [1, 1]])
    np.testing.assert_array_equal(words["forbid", "code"][1:], [[-1, -1], [1, -1], [1, 1]])
    np.testing.assert_array_equal(words["code", "zero"], [[-1, -1], [0, 0], [1, -1], [1, 1]])
    np.testing.assert_array_equal(words["forbid", "zero"][1:], [[0, 0], [1, -1], [1, 1]])
    assert np.isnan(words["forbid", "code"][0]).all()


def test_bits_are_ordered_as_said():
    six = np.array([6])
    np.testing.assert_array_equal(analog(six, 8, "msb")[0] > 0, [0, 0, 0, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(analog(six, 8, "lsb")[0] > 0, [0, 1, 1, 0, 0, 0, 0, 0])
    assert integers(analog(six, 8, "msb"), "msb") == 6
    assert [bits_for(n) for n in (1, 2, 3, 4, 5, 256, 257)] == [1, 1, 2, 2, 3, 8, 9]


def test_bits_that_spell_nothing_become_void_with_no_confidence():
    codec = Bits(classes=11)
    beyond = analog(np.arange(12, 16).reshape(1, 1, 4), 4)
    labels, confidence = codec.decode_with_confidence({}, beyond)
    assert (labels == VOID).all() and (confidence == 0).all()


def test_snap_is_the_nearest_valid_codeword():
    codec = Bits(classes=133, decoding="snap", bits=8)
    x = normal(0, 2, 9, 7, 8)
    ids = np.append(np.arange(133), VOID)
    words = np.asarray(codec.encode({}, ids.reshape(1, 1, -1)))[0, 0]
    distances = np.square(np.asarray(x)[..., None, :] - words).sum(-1)
    labels, confidence = jax.jit(codec.decode_with_confidence)({}, x)
    np.testing.assert_array_equal(labels, ids[distances.argmin(-1)])
    likelihood = np.exp(-distances / (2 * 0.25))
    # float32 sums of 8 products through exp: a few units of 1e-7, times the exponent's size
    np.testing.assert_allclose(confidence, likelihood.max(-1) / likelihood.sum(-1), rtol=1e-4)


@pytest.mark.parametrize("void", ["forbid", "zero"])
def test_threshold_confidence_is_that_of_snap_when_all_codes_are_used(void):
    x = np.float32(1.3) * normal(1, 2, 8, 8, 4)
    threshold = jax.jit(Bits(classes=16, void=void).decode_with_confidence)({}, x)
    snapping = Bits(classes=16, void=void, decoding="snap")
    snap = jax.jit(snapping.decode_with_confidence)({}, x)
    np.testing.assert_array_equal(threshold[0], snap[0])
    # two float32 ways to one number; exponents reach about 16
    np.testing.assert_allclose(threshold[1], snap[1], rtol=1e-5)


def test_pooling_rules():
    v = VOID
    windows = np.array([[[v, v, v, 3, 5, 5, 9, 1], [v, v, 7, 7, 5, 2, 1, 9]]], np.int32)
    expected = {"min": [v, 3, 2, 1], "mode": [v, 7, 5, 1], "parity_min": [v, v, 2, 1]}
    for rule, want in expected.items():
        np.testing.assert_array_equal(pooled(jnp.asarray(windows), 2, rule)[0, 0], want)


@pytest.mark.parametrize("pooling", ["min", "mode", "parity_min"])
@pytest.mark.parametrize("pool", [2, 4])
def test_pooled_maps_are_fixed_points(pool, pooling):
    codec = Bits(classes=9, pool=pool, pooling=pooling)
    raw = np.random.default_rng(0).integers(-1, 9, (2, 16, 24))
    there_and_back = jax.jit(lambda x: codec.decode({}, codec.encode({}, x)))
    once = np.asarray(there_and_back(raw))
    assert once.shape == raw.shape
    np.testing.assert_array_equal(there_and_back(once), once)
    np.testing.assert_array_equal(once[:, ::pool, ::pool], once[:, pool - 1 :: pool, ::pool])


def test_snapping_in_parts_changes_nothing(monkeypatch):
    codec = Bits(classes=20, decoding="snap")
    x = normal(2, 16, 4, 4, 5)
    whole = jax.jit(codec.decode_with_confidence)({}, x)
    monkeypatch.setattr(batched_map, "LIVE_VALUES", 4 * 4 * 21)
    parts = jax.jit(lambda x: codec.decode_with_confidence({}, x))(x)
    np.testing.assert_array_equal(whole[0], parts[0])
    # the same sums in another blocking, through an exponential of about 10
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-5)


def test_wrong_fields_are_refused():
    with pytest.raises(ValueError, match="could not be told apart"):
        Bits(classes=4, void="zero", background="zero")
    with pytest.raises(ValueError, match="large enough for 12 codes"):
        Bits(classes=11, bits=3)
    with pytest.raises(ValueError, match="classes = 0"):
        Bits(classes=0)
    with pytest.raises(ValueError, match="scale = -1"):
        Bits(classes=4, scale=-1.0)
    with pytest.raises(UserError, match="multiples of 4"):
        Bits(classes=4, pool=4).encode({}, np.zeros((1, 8, 6), int))

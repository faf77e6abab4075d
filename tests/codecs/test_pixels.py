"""Images survive quantisation, latents pass unchanged, wrong arrays are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.codecs.pixels import Latents, Pixels, normalise, quantise
from jointseg_jax.types import UserError

VALUES = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_all_8_bit_values_return(array):
    x = normalise(array(VALUES))
    assert isinstance(x, type(array(VALUES))) and x.dtype == np.float32
    assert float(x.min()) == -1 and float(x.max()) == 1
    np.testing.assert_array_equal(quantise(x), VALUES)
    # half a grey level is 1/255: anything nearer keeps the value
    np.testing.assert_array_equal(quantise(x + 0.99 / 255), VALUES)
    np.testing.assert_array_equal(quantise(x - 0.99 / 255), VALUES)


def test_quantise_clips():
    np.testing.assert_array_equal(quantise(np.array([-9.0, 9.0])), [0, 255])


def test_pixels_take_bytes_or_floats():
    codec = Pixels(channels=1)
    encoded = codec.encode(codec.init(jax.random.key(0)), VALUES)
    np.testing.assert_array_equal(encoded, codec.encode({}, normalise(jnp.asarray(VALUES))))
    np.testing.assert_array_equal(codec.decode({}, encoded), encoded)
    assert codec.decode({}, 3 * encoded).max() == 1
    assert codec.latent_shape((16, 16)) == encoded.shape[1:]
    assert codec.kind == "image"


def test_latents_pass_unchanged():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 8)).astype(np.float32)
    codec = Latents(channels=8, factor=16)
    assert codec.latent_shape((64, 96)) == (4, 6, 8)
    np.testing.assert_array_equal(
        codec.decode({}, codec.encode(codec.init(jax.random.key(0)), x)), x
    )
    vector = Latents(shape=[1, 48])
    assert vector.latent_shape((64, 96)) == (1, 48)
    np.testing.assert_array_equal(vector.encode({}, x.reshape(8, 1, 48)), x.reshape(8, 1, 48))


def test_wrong_arrays_are_refused():
    with pytest.raises(UserError, match="dtype int32"):
        Pixels(channels=1).encode({}, VALUES.astype(np.int32))
    with pytest.raises(UserError, match="1 channels; the codec was built for 3"):
        Pixels().encode({}, VALUES)
    with pytest.raises(UserError, match="was built for 4"):
        Latents().encode({}, np.zeros((1, 2, 2, 3), np.float32))
    with pytest.raises(UserError, match=r"built for \(1, 48\)"):
        Latents(shape=(1, 48)).encode({}, np.zeros((1, 2, 48), np.float32))
    with pytest.raises(UserError, match="multiples of 8"):
        Latents().latent_shape((64, 60))
    with pytest.raises(ValueError, match="factor = 0"):
        Latents(factor=0)

"""Two codecs as one: with pixels in the second place the first is all there is."""

import functools

import jax
import numpy as np
import pytest

from jointseg_jax import build
from jointseg_jax.codecs.bits import Bits
from jointseg_jax.codecs.chain import Chain
from jointseg_jax.codecs.image_tiny import ImageTiny
from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.codecs.palette import Palette
from jointseg_jax.codecs.pixels import Pixels
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.types import UserError

PALETTE = Palette(classes=19, perturbation=60.0)
PIXELS = Chain(first=PALETTE, second=Pixels())
TINY = Chain(
    first=PALETTE,
    second=ImageTiny(
        widths=(4, 4), blocks=(1, 0), up_widths=(4, 4), up_blocks=(0, 1), latent_channels=5
    ),
)


def labels(rows=3):
    return np.random.default_rng(0).integers(0, 19, (rows, 8, 12))


def keys(rows=3):
    return jax.random.split(jax.random.key(0), rows)


@functools.partial(jax.jit, static_argnums=0)
def encode(codec, params, labels, keys=None):
    return codec.encode(params, labels, keys=keys)


@functools.partial(jax.jit, static_argnums=0)
def read(codec, params, latents):
    return codec.decode(params, latents), *codec.decode_with_confidence(params, latents)


def test_with_pixels_the_latents_are_the_colours():
    assert PIXELS.kind == "labels" and PIXELS.latent_shape((8, 12)) == (8, 12, 3)
    assert PIXELS.init(jax.random.key(0)) == {}
    colours = encode(PALETTE, {}, labels())
    np.testing.assert_array_equal(encode(PIXELS, {}, labels()), colours)
    perturbed = encode(PIXELS, {}, labels(), keys())
    levels = 127.5 * np.abs(np.asarray(perturbed - colours))
    assert 50 < levels.max() <= 60 + 1e-3  # 864 uniform draws up to 60; float32
    # the decoder clips to [-1, 1], where all colours are: nothing moves away from its own
    np.testing.assert_array_equal(read(PIXELS, {}, perturbed)[0], labels())


@pytest.mark.thorough
def test_it_is_the_first_then_the_second_and_back():
    params = jax.jit(TINY.init)(jax.random.key(1))
    latents = encode(TINY, params, labels())
    assert latents.shape == (3, *TINY.latent_shape((8, 12))) == (3, 4, 6, 5)
    colours = encode(PALETTE, {}, labels())
    np.testing.assert_array_equal(latents, encode(TINY.second, params, colours))
    images = jax.jit(TINY.second.decode)(params, latents)
    want = read(PALETTE, {}, images)
    got = read(TINY, params, latents)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    # one program or two: sums of the convolutions may be blocked differently
    np.testing.assert_allclose(got[2], want[2], atol=1e-5)
    assert got[1].dtype == np.int32 and got[2].dtype == np.float32


def test_a_rows_perturbation_is_its_own_and_both_parts_have_keys_of_their_own():
    together = encode(PIXELS, {}, labels(), keys())
    np.testing.assert_array_equal(together[1:], encode(PIXELS, {}, labels()[1:], keys()[1:]))

    class Recording(Pixels):
        def encode(self, params, image, *, keys=None):
            seen.append(keys)
            return super().encode(params, image, keys=keys)

    seen = []

    def keys_of_the_second(labels, keys=None):
        Chain(first=Palette(classes=19), second=Recording()).encode({}, labels, keys=keys)
        return seen.pop()

    halves = jax.vmap(jax.random.split)(keys())
    second = jax.jit(keys_of_the_second)(labels(), keys())
    np.testing.assert_array_equal(jax.random.key_data(second), jax.random.key_data(halves[:, 1]))
    assert jax.eval_shape(keys_of_the_second, labels()) is None
    first = encode(PALETTE, {}, labels(), halves[:, 0])
    np.testing.assert_array_equal(together, first)


def test_a_config_names_the_parts():
    known = DatasetInfo(Classes(names=("a", "b", "c")), (), ())
    spec = {
        "name": "chain",
        "first": {"name": "palette", "void": "masked"},
        "second": {"name": "image_tiny", "latent_channels": 8},
    }
    want = Chain(first=Palette(classes=3, void="masked"), second=ImageTiny(latent_channels=8))
    assert build.codec(spec, known, "system.codec") == want
    with pytest.raises(UserError, match=r"config\.system\.codec\.first: palette: .*less than 127"):
        wrong = spec | {"first": {"name": "palette", "perturbation": 200.0}}
        build.codec(wrong, known, "system.codec")


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="`first` is a codec of image; it must be one of labels"):
        Chain(first=Pixels(), second=Pixels())
    with pytest.raises(ValueError, match="`second` is a codec of labels; it must be one of image"):
        Chain(first=PALETTE, second=Bits(classes=3))
    small = LabelAE(classes=3, widths=(4,), up_widths=(), middle_width=4, groups=2)
    with pytest.raises(ValueError, match="`first` is LabelAE, which has parameters"):
        Chain(first=small, second=Pixels())

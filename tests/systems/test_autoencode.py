"""A codec as a system of its own: its loss, rows and preview, of labels and of images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.codecs.image_tiny import ImageTiny
from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.codecs.palette import Palette
from jointseg_jax.codecs.pixels import normalise, quantise
from jointseg_jax.rng import sample_keys
from jointseg_jax.systems.autoencode import Autoencode
from jointseg_jax.types import VOID

CODEC = LabelAE(
    classes=5,
    widths=(8, 16),
    up_widths=(16,),
    middle_width=16,
    groups=4,
    latent_channels=3,
    latent="sample",
)
SYSTEM = Autoencode(codec=CODEC, size=(8, 8))

TINY = ImageTiny(widths=(4, 4), blocks=(1, 0), up_widths=(4, 4), up_blocks=(0, 1))
PALETTE = Palette(classes=5, perturbation=6.0)
IMAGES = Autoencode(codec=TINY, size=(8, 8), field="image")


@functools.cache
def params():
    """Drawn by numpy, which compiles nothing."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(SYSTEM.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.2, s.shape), s.dtype), shapes)


def batch(rows=4):
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8)),
        "labels": jnp.asarray(rng.integers(0, 5, (rows, 8, 8), dtype=np.int16)),
    }


def keys(rows=4):
    return sample_keys(0, jnp.arange(rows))


def test_the_loss_is_the_codecs_and_a_row_uses_its_own_key_only():
    loss = jax.jit(SYSTEM.loss)
    together, metrics = loss(params(), {}, batch(), keys())
    np.testing.assert_array_equal(metrics["loss"], together)
    own, _ = jax.jit(CODEC.loss)(params(), batch()["labels"], keys())
    np.testing.assert_array_equal(together, own)
    alone = []
    for i in range(4):
        row = jnp.full(4, i)  # a mean over one row four times is that row's
        alone.append(loss(params(), {}, {k: v[row] for k, v in batch().items()}, keys()[row])[0])
    # no VOID, so every row has as many pixels; float32 sums in another order
    np.testing.assert_allclose(together, np.mean(alone), rtol=1e-5)
    other, _ = loss(params(), {}, batch(), sample_keys(1, jnp.arange(4)))
    assert abs(other - together) > 1e-4 * abs(together)  # the latents are sampled


@pytest.mark.thorough
def test_the_gradient_reaches_every_parameter():
    gradient = jax.jit(jax.grad(lambda p: SYSTEM.loss(p, {}, batch(), keys())[0]))(params())
    still = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradient)
        if not (np.isfinite(g).all() and np.any(g))
    ]
    assert not still


@pytest.mark.thorough
def test_the_preview_shows_images_beside_what_the_codec_gives_back():
    shown = jax.jit(SYSTEM.preview)(params(), {}, batch(), keys())
    np.testing.assert_array_equal(shown["image"], batch()["image"])
    labels, confidence = shown["labels"], shown["confidence"]
    assert labels.shape == confidence.shape == (4, 8, 8)
    assert labels.dtype == jnp.int32 and confidence.dtype == jnp.float32
    assert set(np.unique(labels)) <= {VOID, *range(5)}
    assert (confidence > 0).all() and (confidence <= 1).all()


@functools.cache
def image_params():
    return jax.jit(IMAGES.init)(jax.random.key(0))


@pytest.mark.thorough
def test_the_preview_of_an_image_codec_shows_what_it_gives_back_beside_the_labels():
    shown = jax.jit(IMAGES.preview)(image_params(), {}, batch(), keys())
    latents = TINY.encode(image_params(), batch()["image"])
    want = quantise(np.asarray(TINY.decode(image_params(), latents)))
    assert shown["image"].dtype == jnp.uint8
    # one program or several: a value half way between two levels may round either way
    assert np.abs(np.asarray(shown["image"], int) - want).max() <= 1
    np.testing.assert_array_equal(shown["labels"], batch()["labels"])
    assert shown["labels"].dtype == jnp.int32 and (shown["confidence"] == 1).all()


@pytest.mark.thorough
def test_a_palette_takes_the_place_of_some_images():
    def values(painted, seed=0, rows=slice(None)):
        system = Autoencode(
            codec=TINY, size=(8, 8), field="image", palette=PALETTE, painted=painted
        )
        one = {k: v[rows] for k, v in batch(64).items()}
        return np.asarray(system._values(one, sample_keys(seed, jnp.arange(64))[rows]))

    image = values(0.0)
    # dividing by 127.5 or multiplying by its inverse: the last bit of float32
    np.testing.assert_allclose(image, normalise(np.asarray(batch(64)["image"])), atol=2e-7)
    read = PALETTE.decode({}, values(1.0))
    np.testing.assert_array_equal(read, batch(64)["labels"])
    mixed = values(0.5)
    painted = (mixed != image).any((1, 2, 3))
    assert 16 < painted.sum() < 48  # 64 fair coins: 32 +- 4 deviations of 4
    np.testing.assert_array_equal(mixed[painted], values(1.0)[painted])  # the same perturbation
    np.testing.assert_array_equal(values(0.5, rows=slice(5, 9)), mixed[5:9])
    assert (values(0.5, seed=1) != mixed).any()


@pytest.mark.thorough
def test_the_loss_of_painted_rows_is_that_of_their_colours():
    system = dataclasses.replace(IMAGES, palette=PALETTE, painted=1.0)
    got = jax.jit(system.loss)(image_params(), {}, batch(), keys())[0]
    colours = system._values(batch(), keys())
    want = jax.jit(TINY.loss)(image_params(), colours, keys())[0]
    np.testing.assert_allclose(got, want, rtol=1e-5)  # float32, one program and two
    plain = jax.jit(IMAGES.loss)(image_params(), {}, batch(), keys())[0]
    assert abs(float(plain - got)) > 1e-3


def test_a_palette_is_for_image_codecs():
    with pytest.raises(ValueError, match="a codec of labels and a palette of labels were given"):
        Autoencode(codec=CODEC, size=(8, 8), palette=PALETTE)
    with pytest.raises(ValueError, match=r"painted = 1\.5 was given; it must be in \[0, 1\]"):
        dataclasses.replace(IMAGES, palette=PALETTE, painted=1.5)

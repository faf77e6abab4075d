"""A codec as a system of its own: its loss, rows and preview."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.systems.autoencode import Autoencode
from jointseg_jax.systems.keys import sample_keys
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


@functools.cache
def params():
    return jax.jit(SYSTEM.init)(jax.random.key(0))


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
    alone = [
        loss(params(), {}, {k: v[i : i + 1] for k, v in batch().items()}, keys()[i : i + 1])[0]
        for i in range(4)
    ]
    # no VOID, so every row has as many pixels; float32 sums in another order
    np.testing.assert_allclose(together, np.mean(alone), rtol=1e-5)
    other, _ = loss(params(), {}, batch(), sample_keys(1, jnp.arange(4)))
    assert abs(other - together) > 1e-4 * abs(together)  # the latents are sampled


def test_the_gradient_reaches_every_parameter():
    gradient = jax.jit(jax.grad(lambda p: SYSTEM.loss(p, {}, batch(), keys())[0]))(params())
    still = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradient)
        if not (np.isfinite(g).all() and np.any(g))
    ]
    assert not still


def test_the_preview_shows_images_beside_what_the_codec_gives_back():
    shown = jax.jit(SYSTEM.preview)(params(), {}, batch(), keys())
    np.testing.assert_array_equal(shown["image"], batch()["image"])
    labels, confidence = shown["labels"], shown["confidence"]
    assert labels.shape == confidence.shape == (4, 8, 8)
    assert labels.dtype == jnp.int32 and confidence.dtype == jnp.float32
    assert set(np.unique(labels)) <= {VOID, *range(5)}
    assert (confidence > 0).all() and (confidence <= 1).all()

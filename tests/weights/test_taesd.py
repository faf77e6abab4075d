"""Reference weights of the image autoencoder: its keys, and configs that are not its own."""

import functools
import re

import jax
import numpy as np
import pytest

from jointseg_jax.codecs.image_tiny import ImageTiny
from jointseg_jax.types import UserError
from jointseg_jax.weights.convert import to_ours, to_theirs
from jointseg_jax.weights.taesd import fields, table

SMALL = ImageTiny(widths=(4, 4), blocks=(1, 2), up_widths=(4, 4), up_blocks=(2, 0))


@functools.lru_cache
def fresh():
    draws = np.random.default_rng(0)
    shapes = jax.eval_shape(SMALL.init, jax.random.key(0))
    return jax.tree.map(lambda s: draws.normal(size=s.shape).astype(np.float32), shapes)


def test_both_directions_are_exact_and_complete():
    reference = to_theirs(fresh(), table(SMALL))
    assert len(reference) == len(jax.tree.leaves(fresh()))
    back = to_ours(reference, table(SMALL))
    assert jax.tree.structure(back) == jax.tree.structure(fresh())
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(fresh()))
    )


def test_published_keys():
    keys = table(ImageTiny()).reference_shapes()
    layers = {re.match(r"(\w+)\.layers\.(\d+)", key).groups() for key in keys}
    encoder = {("encoder", str(i)) for i in range(15)}
    # of the decoder's 19 layers an activation and three resizes have no tensors
    decoder = {("decoder", str(i)) for i in range(19) if i not in (1, 5, 10, 15)}
    assert layers == encoder | decoder
    assert {k for k in keys if "decoder.layers.6." in k} == {"decoder.layers.6.weight"}


def test_a_reference_config_gives_the_fields():
    given = {
        "_class_name": "AutoencoderTiny",
        "act_fn": "relu",
        "block_out_channels": [64, 64, 64, 64],
        "decoder_block_out_channels": [64, 64, 64, 64],
        "encoder_block_out_channels": [64, 64, 64, 64],
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": 4,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "num_decoder_blocks": [3, 3, 3, 1],
        "num_encoder_blocks": [1, 3, 3, 3],
        "out_channels": 3,
        "scaling_factor": 1.0,
        "upsampling_scaling_factor": 2,
    }
    assert ImageTiny(**fields(given)) == ImageTiny()
    with pytest.raises(UserError, match="in_channels = 1 is not supported; only 3 is"):
        fields(given | {"in_channels": 1})
    with pytest.raises(UserError, match="blocks_per_layer is unknown"):
        fields(given | {"blocks_per_layer": 2})


def test_networks_that_the_reference_cannot_be():
    uneven = ImageTiny(widths=(4, 8), blocks=(1, 2), up_widths=(4, 4), up_blocks=(2, 0))
    with pytest.raises(UserError, match=r"widths = \(4, 8\); the reference network has one width"):
        table(uneven)
    with pytest.raises(UserError, match=r"1 missing \(encoder.layers.0.bias"):
        weights = to_theirs(fresh(), table(SMALL))
        to_ours({k: v for k, v in weights.items() if k != "encoder.layers.0.bias"}, table(SMALL))

"""The image autoencoder against the reference numbers, of any configuration."""

import jax
import numpy as np
import pytest

from jointseg_jax.codecs.image_tiny import ImageTiny, scaled, unscaled
from jointseg_jax.weights.convert import to_ours, to_theirs
from jointseg_jax.weights.taesd import fields, table


def channels_last(x):
    return np.moveaxis(x, 1, -1)


@pytest.mark.cases("autoencoder_tiny*")
def test_encoder_and_decoder(case):
    codec, inputs, outputs = ImageTiny(**fields(case.config["model"])), case.inputs, case.outputs
    params = to_ours(case.weights, table(codec))
    image, z = channels_last(inputs["image"]), codec.scale * channels_last(inputs["z"])

    @jax.jit
    def forward(params, image, z):
        return codec.encode(params, image), codec.unclipped(params, z), codec.decode(params, z)

    with jax.default_matmul_precision("highest"):
        latents, raw, decoded = forward(params, image, z)
    want = channels_last(outputs["decoded"])
    case.check("latents", latents / codec.scale, want=channels_last(outputs["latents"]))
    case.check("decoded", raw, want=want)
    case.check("decoded, clipped", decoded, want=np.clip(want, -1, 1))
    case.check("scaled", scaled(inputs["z"]))
    case.check("unscaled", unscaled(scaled(inputs["z"])))


@pytest.mark.cases("autoencoder_tiny*")
def test_weights_return_unchanged(case):
    codec, weights = ImageTiny(**fields(case.config["model"])), case.weights
    back = to_theirs(to_ours(weights, table(codec)), table(codec))
    assert sorted(back) == sorted(weights)
    assert all(np.array_equal(back[k], weights[k]) for k in weights)
    assert sum(w.size for w in weights.values()) == case.meta["num_parameters"]

"""Images that follow a clean map: what such a run learns of, and what it makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax import rules
from jointseg_jax.codecs.bits import Bits
from jointseg_jax.codecs.pixels import Pixels
from jointseg_jax.models.embed import Patches
from jointseg_jax.models.two_stream import TwoStream
from jointseg_jax.models.uvit import UViT
from jointseg_jax.rng import sample_keys
from jointseg_jax.systems.joint import Joint
from jointseg_jax.systems.system import Stream
from jointseg_jax.transport.dpm import DPMSolverPP
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import ScaledLinear
from jointseg_jax.transport.times import Shared

SIDE, CLASSES, ROWS = 8, 3, 4
NETWORKS = {"one": UViT, "two": TwoStream}


@functools.cache
def system(network):
    schedule, bits = ScaledLinear(), Bits(classes=CLASSES)
    denoiser = NETWORKS[network](
        streams={
            "image": Patches(grid=(SIDE, SIDE), channels=3, patch=4),
            "mask": Patches(grid=(SIDE, SIDE), channels=bits.channels, patch=4, tanh=True),
        },
        time_tokens=("image",),
        width=16,
        depth=2,
        heads=2,
        add_features=(("mask", "image"),),
    )
    return Joint(
        streams={
            "image": Stream(field="image", codec=Pixels(), process=Process(schedule=schedule)),
            "mask": Stream(
                field="labels",
                codec=bits,
                process=Process(schedule=schedule, predicts="data", scale=2.0, clip=1.0),
            ),
        },
        denoiser=denoiser,
        times=Shared(),
        solver=DPMSolverPP(steps=2, order=1, method="singlestep", final="evaluate"),
        size=(SIDE, SIDE),
        known=("mask",),
    )


@functools.cache
def params(network):
    """Away from the initial values, so that nothing is multiplied by zero."""
    shapes = jax.eval_shape(system(network).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)


def batch(labels=0):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (ROWS, SIDE, SIDE, 3), dtype=np.uint8)
    maps = np.random.default_rng(labels).integers(0, CLASSES, (ROWS, SIDE, SIDE)).astype(np.int16)
    return {"image": jnp.asarray(image), "labels": jnp.asarray(maps)}


def keys():
    return sample_keys(0, jnp.arange(ROWS))


@pytest.mark.thorough
@pytest.mark.parametrize("network", NETWORKS)
def test_the_loss_is_the_images_and_everything_but_the_maps_head_learns(network):
    loss = jax.value_and_grad(system(network).loss, has_aux=True)
    loss = jax.jit(loss)
    (total, metrics), gradients = loss(params(network), {}, batch(), keys())
    assert set(metrics) == {"loss", "loss/image"} and total == metrics["loss/image"]
    silent = {p for p, g in rules.by_path(gradients).items() if np.abs(g).max() == 0}
    assert silent == {p for p in rules.paths(gradients) if "/mask_out/" in p}


@pytest.mark.thorough
@pytest.mark.parametrize("network", NETWORKS)
def test_made_images_depend_on_the_given_maps_which_come_back(network):
    def generate(given):
        return system(network).generate(params(network), {}, None, keys(), condition=given)

    run = jax.jit(generate)
    first, second = (run({"labels": batch(seed)["labels"]}) for seed in (0, 1))
    for seed, made in enumerate((first, second)):
        np.testing.assert_array_equal(made["labels"], batch(seed)["labels"])
        assert made["confidence"].min() > 0.9  # clean bits, read with the noise of 0.5 assumed
    assert (first["image"] != second["image"]).mean() > 0.1
    with pytest.raises(ValueError, match="trained to see labels, and given has nothing"):
        generate({})

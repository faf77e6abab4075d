"""Streams that share tokens: fewer tokens, the same interface, one place for both."""

import jax
import jax.numpy as jnp
import pytest

from jointseg_jax.models.uvit import UViT, forward_flops


def module(**changes):
    fields = dict(
        streams={
            "image": {"kind": "patches", "grid": (8, 8), "channels": 3, "patch": 2},
            "mask": {"kind": "patches", "grid": (4, 4), "channels": 4, "patch": 1},
        },
        time_tokens=("image",),
        width=16,
        depth=2,
        heads=2,
    )
    return UViT(**(fields | changes))


def inputs(key):
    first, second = jax.random.split(key)
    latents = {"image": jax.random.normal(first, (2, 8, 8, 3))}
    latents["mask"] = jax.random.normal(second, (2, 4, 4, 4))
    return latents, {"image": jnp.array([3.0, 700.0]), "mask": jnp.array([3.0, 700.0])}


def test_shared_streams_take_half_the_tokens_and_keep_their_shapes():
    apart, shared = module(), module(share=("image", "mask"))
    assert apart.spans()["mask"].stop == 33
    assert shared.spans()["mask"] == shared.spans()["image"] == slice(1, 17)
    latents, times = jax.eval_shape(inputs, jax.random.key(0))
    out, _ = jax.eval_shape(shared.init_with_output, jax.random.key(1), latents, times)[0]
    assert {k: v.shape for k, v in out.items()} == {k: v.shape for k, v in latents.items()}
    assert forward_flops(shared) < 0.6 * forward_flops(apart)


@pytest.mark.thorough
def test_each_prediction_sees_both_streams():
    shared = module(share=("image", "mask"))
    latents, times = inputs(jax.random.key(0))
    params = shared.init(jax.random.key(1), latents, times)

    def total(latents, name):
        return shared.apply(params, latents, times)[0][name].sum()

    for name in latents:
        gradient = jax.grad(total)(latents, name)
        assert all(float(jnp.abs(g).max()) > 0 for g in gradient.values())


@pytest.mark.parametrize("share", [("image",), ("mask", "image"), ("image", "text")])
def test_what_cannot_share_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        module(share=share)


def test_grids_that_differ_cannot_share():
    wide = {"kind": "patches", "grid": (4, 8), "channels": 4, "patch": 1}
    with pytest.raises(ValueError, match="same rows and columns"):
        module(streams=dict(module().streams) | {"mask": wide}, share=("image", "mask"))

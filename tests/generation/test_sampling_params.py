"""Parameters rounded once for sampling: the same pairs from half the memory."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax import rules
from jointseg_jax.generation.sampler import sampling_params
from jointseg_jax.models.two_stream import TwoStream

STREAMS = {
    "image": {"kind": "patches", "grid": (4, 4), "channels": 2, "patch": 2},
    "mask": {"kind": "patches", "grid": (4, 4), "channels": 1, "patch": 2},
}


def system(dtype, **fields):
    """Two streams have all kinds of parameters."""
    shared = {"streams": STREAMS, "time_tokens": ("image",), "width": 8, "depth": 2, "heads": 1}
    denoiser = TwoStream(**shared, qkv_bias=True, exchange_bias=True, dtype=dtype, **fields)
    return types.SimpleNamespace(denoiser=denoiser)


def drawn(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), **module.input_shapes())
    draw = np.random.default_rng(3).normal
    return {
        "denoiser": jax.tree.map(
            lambda s: jnp.asarray(draw(size=s.shape), s.dtype), shapes["params"]
        )
    }


@pytest.mark.thorough
def test_a_bfloat16_network_says_the_same_bit_for_bit():
    made = system("bfloat16")
    params = drawn(made.denoiser)
    rounded = sampling_params(made, params)
    inputs = jax.tree.map(lambda s: jnp.full(s.shape, 0.3, s.dtype), made.denoiser.input_shapes())
    predict = jax.jit(lambda params: made.denoiser.apply({"params": params["denoiser"]}, **inputs))
    jax.tree.map(np.testing.assert_array_equal, predict(params), predict(rounded))


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("scan", [False, True])
def test_kernels_of_blocks_are_rounded_and_norms_and_edges_are_not(scan):
    made = system("bfloat16", scan=scan)
    rounded = rules.by_path(
        jax.eval_shape(lambda p: sampling_params(made, p), drawn(made.denoiser))
    )
    half = {path for path, leaf in rounded.items() if leaf.dtype == jnp.bfloat16}
    blocks = {path for path in rounded if "_block" in path}
    assert half == {path for path in blocks if "norm" not in path}
    assert half and blocks - half and set(rounded) - blocks


def test_a_float32_network_keeps_its_parameters():
    made = system("float32")
    params = drawn(made.denoiser)
    assert sampling_params(made, params) is params

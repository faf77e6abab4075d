"""Blocks against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from jointseg_jax.models.attention import attend_cudnn, attend_xla
from jointseg_jax.models.blocks import Attention, Block, gelu

# float32 results of a few dozen operations on numbers of order 1: some 2^-24 each
FLOAT32 = 2e-6


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def parameters(module, *inputs):
    """Standard normal parameters, drawn by numpy: no compilation."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, *inputs):
    return module.apply({"params": params}, *inputs)


def test_gelu_is_exact():
    x = np.linspace(-5, 5, 101)
    want = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    # the tanh approximation differs by 5e-4, so this tells them apart
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), want, atol=FLOAT32)


def test_attention_is_softmax_of_scaled_products():
    module = Attention(heads=2, qkv_bias=True, dtype=jnp.float32, attention="xla")
    x = normal(0, 2, 5, 8)
    params = parameters(module, x)
    got = apply(module, params, x)

    p = jax.tree.map(np.asarray, params)
    qkv = np.einsum("bnd,dchk->cbnhk", x, p["qkv"]["kernel"])
    q, k, v = qkv + p["qkv"]["bias"][:, None, None]
    weights = softmax(np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(4), axis=-1)
    y = np.einsum("bhnm,bmhk->bnhk", weights, v)
    want = np.einsum("bnhk,hkd->bnd", y, p["out"]["kernel"]) + p["out"]["bias"]
    # numbers of order 10 after two products with kernels of order 1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_does_not_see_the_order_of_tokens(norm):
    module = Block(heads=2, norm=norm)
    x = normal(0, 1, 6, 8)
    params = parameters(module, x)
    order = np.array([3, 1, 5, 0, 2, 4])
    got, want = apply(module, params, x[:, order]), apply(module, params, x)[:, order]
    # sums over tokens in another order, then products that reach some tens
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_post_norm_ends_in_a_norm():
    module, x = Block(heads=2, norm="post"), 10 + 3 * normal(0, 2, 4, 16)
    params = parameters(module, x)
    params["mlp_norm"] = {"scale": jnp.ones(16), "bias": jnp.zeros(16)}
    y = apply(module, params, x)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(-1), 1, atol=1e-3)  # epsilon 1e-5 against a variance > 0.1


def test_pre_norm_keeps_the_residual_as_it_is():
    module, x = Block(heads=2, norm="pre"), normal(0, 2, 4, 16)
    params = parameters(module, x)
    for name in ("attn", "mlp"):
        params[name] = jax.tree.map(jnp.zeros_like, params[name])
    np.testing.assert_array_equal(apply(module, params, x), x)


@pytest.mark.parametrize("join_norm", [False, True])
def test_join_is_one_linear_of_the_concatenation(join_norm):
    module = Block(heads=2, join_norm=join_norm)
    x, skip = normal(0, 1, 3, 8), normal(1, 1, 3, 8)
    params = parameters(module, x, skip)
    kernel = np.concatenate([params["join"]["kernel"], params["join_skip"]["kernel"]])
    joined = np.concatenate([x, skip], -1) @ kernel + np.asarray(params["join"]["bias"])
    if join_norm:
        params["join_norm"] = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
        joined = (joined - joined.mean(-1, keepdims=True)) / joined.std(-1, keepdims=True)
    rest = {k: v for k, v in params.items() if not k.startswith("join")}
    want = apply(Block(heads=2), rest, jnp.asarray(joined))
    # the closed form leaves out the norm's epsilon of 1e-5; results are of order 10
    np.testing.assert_allclose(apply(module, params, x, skip), want, atol=1e-3)


def test_norms_count_in_float32_when_the_products_are_bfloat16():
    module = Block(heads=2, norm="post", dtype=jnp.bfloat16)
    x = 300 + normal(0, 1, 4, 64)
    params = parameters(module, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for name in ("attn", "mlp"):
        params[name] = jax.tree.map(jnp.zeros_like, params[name])
    for name in ("attn_norm", "mlp_norm"):
        params[name] = {"scale": jnp.ones(64), "bias": jnp.zeros(64)}
    y = apply(module, params, x)
    assert y.dtype == jnp.bfloat16
    want = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    # rounding of the results (up to 4); in bfloat16 the mean alone would be wrong by up to 1
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=2**-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN attention needs an NVIDIA GPU")
def test_cudnn_attention_equals_the_plain_one():
    q, k, v = (normal(i, 2, 256, 4, 64).astype(jnp.bfloat16) for i in range(3))
    got, want = attend_cudnn(q, k, v), attend_xla(q, k, v)
    # both round the weights and the result to 8 bits
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=2**-6)

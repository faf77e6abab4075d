"""Blocks against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from jointseg_jax.models.layers import Attention, Block, attend_cudnn, attend_xla, gelu

# float32 results of a few dozen operations on numbers of order 1: some 2^-24 each
FLOAT32 = 2e-6


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_gelu_is_exact():
    x = np.linspace(-5, 5, 101)
    want = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    # the tanh approximation differs by 5e-4, so this tells them apart
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), want, atol=FLOAT32)


def test_attention_is_softmax_of_scaled_products():
    module = Attention(heads=2, qkv_bias=True, dtype=jnp.float32, attention="xla")
    x = normal(0, 2, 5, 8)
    params = module.init(jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda p: p + normal(p.size, *p.shape), params)
    got = module.apply({"params": params}, x)

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
    variables = module.init(jax.random.key(1), x)
    order = np.array([3, 1, 5, 0, 2, 4])
    # the sums over tokens are taken in another order
    np.testing.assert_allclose(
        module.apply(variables, x[:, order]), module.apply(variables, x)[:, order], atol=FLOAT32
    )


def test_post_norm_ends_in_a_norm_and_pre_norm_keeps_the_residual():
    x = 10 + 3 * normal(0, 2, 4, 16)
    post = Block(heads=2, norm="post")
    y, _ = post.init_with_output(jax.random.key(1), x)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(-1), 1, atol=1e-4)  # epsilon 1e-5 against variance 9
    pre = Block(heads=2, norm="pre")
    params = pre.init(jax.random.key(1), x)["params"]
    for name in ("attn", "mlp"):
        params[name] = jax.tree.map(jnp.zeros_like, params[name])
    np.testing.assert_array_equal(pre.apply({"params": params}, x), x)


@pytest.mark.parametrize("join_norm", [False, True])
def test_join_is_one_linear_of_the_concatenation(join_norm):
    module = Block(heads=2, join_norm=join_norm)
    x, skip = normal(0, 1, 3, 8), normal(1, 1, 3, 8)
    params = module.init(jax.random.key(2), x, skip)["params"]
    params["join"]["bias"] = normal(3, 8)
    kernel = np.concatenate([params["join"]["kernel"], params["join_skip"]["kernel"]])
    joined = np.concatenate([x, skip], -1) @ kernel + np.asarray(params["join"]["bias"])
    if join_norm:
        joined = (joined - joined.mean(-1, keepdims=True)) / joined.std(-1, keepdims=True)
    plain = Block(heads=2)
    rest = {k: v for k, v in params.items() if not k.startswith("join")}
    want = plain.apply({"params": rest}, jnp.asarray(joined))
    # the norm's epsilon of 1e-5 is left out of the closed form
    np.testing.assert_allclose(module.apply({"params": params}, x, skip), want, atol=2e-5)


def test_norms_count_in_float32_when_the_products_are_bfloat16():
    module = Block(heads=2, norm="post", dtype=jnp.bfloat16)
    x = (300 + normal(0, 1, 4, 64)).astype(jnp.float32)
    y, variables = module.init_with_output(jax.random.key(1), x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    # bfloat16 statistics could not tell 300 from 301; 2^-8 is the rounding of the result itself
    np.testing.assert_allclose(y.astype(jnp.float32).mean(-1), 0, atol=2**-6)
    np.testing.assert_allclose(y.astype(jnp.float32).std(-1), 1, atol=2**-6)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN attention needs an NVIDIA GPU")
def test_cudnn_attention_equals_the_plain_one():
    q, k, v = (normal(i, 2, 256, 4, 64).astype(jnp.bfloat16) for i in range(3))
    got, want = attend_cudnn(q, k, v), attend_xla(q, k, v)
    # both round the weights and the result to 8 bits
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=2**-6)

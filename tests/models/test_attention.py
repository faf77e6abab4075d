"""Attention backends against the plain one, and who is chosen where."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jointseg_jax import chips, sharding
from jointseg_jax.models import attention, packed_attention
from jointseg_jax.models.attention import chosen
from jointseg_jax.models.uvit import UViT

# float32 sums of up to 200 products of numbers of order 1, in another order than the other's
FLOAT32 = 2e-5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def plain(q, k, v, count):
    """Over the real keys, in the layout of ``splash``."""
    scores = jnp.einsum("bhnd,bhmd->bhnm", q, k[:, :, :count])
    return jnp.einsum("bhnm,bhmd->bhnd", jax.nn.softmax(scores), v[:, :, :count])


def side_by_side(q, k, v, count):
    """``packed`` in the layout of ``splash``."""
    batch, heads, tokens, size = q.shape
    flat = (x.swapaxes(1, 2).reshape(batch, tokens, heads * size) for x in (q, k, v))
    y = packed_attention.attend_packed(*flat, heads=heads, count=count)
    return y.reshape(batch, tokens, heads, size).swapaxes(1, 2)


KERNELS = {"splash": attention.attend_splash, "packed": side_by_side}


@functools.cache
def both(kernel, tokens, count, heads=2, size=16, batch=1):
    """(result, gradients of q k v) of the kernel and of plain products; real rows count."""
    qkv = [normal(i, batch, heads, tokens, size) * s for i, s in enumerate((size**-0.5, 1, 1))]
    weights = normal(3, batch, heads, count, size)

    def value(attend):
        def total(qkv):
            out = attend(*qkv)[:, :, :count]
            return jnp.sum(out * weights), out

        (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(qkv)
        return [
            out,
            *(grad[:, :, :count] for grad in grads),
            *(grad[:, :, count:] for grad in grads),
        ]

    attend = functools.partial(KERNELS[kernel], count=count)
    return value(attend), value(functools.partial(plain, count=count))


@pytest.mark.thorough
@pytest.mark.parametrize(("tokens", "count"), [(256, 200), (130, 130)], ids=["before", "inside"])
def test_splash_equals_plain_products_forward_and_backward(tokens, count):
    """Padded before the call, or by it; the gradient is 0 where padding is."""
    same("splash", tokens, count)


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize(
    "sizes",
    [(256, 200, 8, 16), (33, 33, 2, 64), (1296, 1290, 1, 128)],
    ids=["padded before, eight heads in a group", "padded inside", "three blocks, a head a group"],
)
def test_packed_equals_plain_products_forward_and_backward(sizes):
    assert sizes[0] < 1000 or sizes[0] // packed_attention.block(sizes[0]) == 3
    same("packed", *sizes)


def same(*case):
    got, want = both(*case)
    names = ("y", "dq", "dk", "dv", "dq padding", "dk padding", "dv padding")
    for name, a, b in zip(names, got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=FLOAT32, err_msg=name)


@pytest.mark.thorough
@pytest.mark.parametrize(("backend", "width"), [("splash", 32), ("packed", 128)])
def test_a_network_says_the_same_with_every_backend(backend, width):
    """The parameters are those of the plain backend; 249 tokens become 256, a token of time too."""
    fields = {"width": width, "heads": width // 32, "depth": 1, "qkv_bias": True, "remat": "dots"}
    streams = {"x": {"kind": "tokens", "count": 248, "width": 3}}
    make = functools.partial(UViT, streams=streams, time_tokens=("x",), **fields)
    x, t = {"x": normal(0, 1, 248, 3)}, {"x": jnp.ones((1,))}
    shapes = jax.eval_shape(make(attention="splash").init, jax.random.key(0), x, t)
    draw = np.random.default_rng(7).normal
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * draw(size=s.shape), s.dtype), shapes)

    def error(params, backend):
        predictions, taps = make(attention=backend).apply(params, x, t, taps=("mid_block",))
        return jnp.mean(predictions["x"] ** 2), (predictions["x"], taps)

    gradient = jax.jit(jax.value_and_grad(error, has_aux=True), static_argnums=1)
    # float32 sums in another order, in a block; gradients reach some tens
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, gradient(params, backend), gradient(params, "xla"))


def test_blocks_divide_the_length_and_stay_below_the_limit():
    for generation, (most_keys, scores) in attention.SPLASH_SCORES.items():
        for tokens in range(128, 4225, 128):
            queries, keys = attention.splash_blocks(tokens, generation)
            assert tokens % queries == 0 and tokens % keys == 0
            assert queries % 128 == 0 and keys % 128 == 0
            assert keys <= most_keys and queries * keys <= scores
    assert attention.splash_blocks(2176, "v5e")[1] == 2176


def test_packed_blocks_divide_the_length():
    for tokens in range(1, packed_attention.LONGEST // 2, 97):
        length = packed_attention.room(tokens)
        queries = packed_attention.block(length)
        assert length % queries == 0 and queries % packed_attention.ROWS == 0
        assert (
            tokens
            <= length
            <= max(tokens + packed_attention.ROWS - 1, (1 + packed_attention.WASTE) * tokens)
        )
        assert queries <= packed_attention.QUERIES and queries * length <= packed_attention.SCORES
    assert (packed_attention.room(2129), packed_attention.block(2160)) == (
        2160,
        720,
    )  # JoDiffusion: 1.5 %
    assert (packed_attention.room(593), packed_attention.block(608)) == (608, 608)  # PDM: 2.5 %


def test_packed_tells_what_it_takes():
    x = normal(0, 1, 32, 96)
    with pytest.raises(ValueError, match=r"there are 2 of 48 and 32 tokens\. Use auto\."):
        packed_attention.attend_packed(x, x, x, heads=2)
    x = normal(0, 1, 32, 128)
    with pytest.raises(ValueError, match="queries = 24: give a multiple of 16 that divides the 32"):
        packed_attention.attend_packed(x, x, x, heads=2, queries=24)


def test_padding_in_every_layer_stays_small():
    assert attention.splash_room(2129) == 2176  # JoDiffusion: 2 %
    assert attention.splash_room(590) == 590  # PDM: it would be 8 %
    assert attention.splash_room(640) == 640


def mesh_of(kind, platform):
    """A mesh whose devices are of another kind than this machine's."""
    axes = {"axis_names": ("data", "fsdp", "model"), "axis_types": (AxisType.Auto,) * 3}
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return jax.sharding.AbstractMesh((1, 1, 1), **axes, abstract_device=device)


@pytest.mark.parametrize(
    ("kind", "platform", "backend"),
    [
        ("TPU v5 lite", "tpu", "packed"),
        ("TPU v5", "tpu", "packed"),
        ("NVIDIA H200", "gpu", "cudnn"),
        ("AMD Instinct MI300X", "gpu", "xla"),
        ("cpu", "cpu", "xla"),
    ],
)
def test_auto_goes_by_the_devices_that_the_program_is_for(kind, platform, backend):
    half = functools.partial(chosen, "auto", dtype=jnp.bfloat16, heads=24)
    with jax.sharding.use_abstract_mesh(mesh_of(kind, platform)):
        assert half(size=64, tokens=2129) == backend
        assert chosen("auto", dtype=jnp.float32, heads=24, size=64, tokens=2129) == "xla"
        assert chosen("cudnn", dtype=jnp.bfloat16, heads=24, size=64, tokens=2129) == "cudnn"
        assert half(size=12, tokens=2129) == "xla"
        assert half(size=192, tokens=2129) == ("splash" if platform == "tpu" else "xla")
        assert half(size=64, tokens=39) == ("cudnn" if backend == "cudnn" else "xla")
    assert half(size=64, tokens=2129) == "xla"  # without a mesh: this machine's CPU


def test_generations_by_their_devices_names():
    kinds = ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v4")
    assert [*map(chips.generation, kinds)] == ["v5e", "v5e", "v5p", "v5p", "v6e", None]


@functools.cache
def mesh_of_eight():
    return sharding.make_mesh((2, 2, 2))


@pytest.mark.parametrize(("kernel", "heads"), [("splash", None), ("packed", "model")])
def test_a_mesh_gives_each_device_its_own_rows_and_heads(kernel, heads):
    qkv = [normal(i, 4, 4, 128, 64) for i in range(3)]

    def place(rows, heads):
        attend = functools.partial(KERNELS[kernel], count=128)
        with jax.set_mesh(mesh_of_eight()):
            text = jax.jit(attend).lower(*(x[:rows, :heads] for x in qkv)).as_text()
        return re.search(r"sdy.manual_computation.*out_shardings=(.*?) manual_axes", text).group(1)

    assert '{"data", "fsdp"}' in place(4, 4)
    assert ('{"model"}' in place(4, 4)) == (heads == "model")
    assert "data" not in place(3, 4)  # three rows cannot be shared evenly: each computes all
    assert "model" not in place(4, 2)  # nor can one group of heads

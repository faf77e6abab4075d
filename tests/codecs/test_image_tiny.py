"""The image autoencoder: published sizes, shapes, what its loss is made of, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jointseg_jax.codecs import batched_map
from jointseg_jax.codecs.image_tiny import (
    ImageTiny,
    differences,
    multi_scale,
    psnr,
    scaled,
    unscaled,
)
from jointseg_jax.codecs.pixels import normalise
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.types import UserError

SMALL = dict(widths=(8, 16), blocks=(1, 1), up_widths=(16, 8), up_blocks=(1, 1))


def small(**fields):
    return ImageTiny(**(SMALL | fields))


@functools.lru_cache
def started(codec):
    """Parameters drawn by numpy, as ``init`` would."""
    draws = np.random.default_rng(0)

    def fill(leaf):
        bound = np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(draws.uniform(-bound, bound, leaf.shape), jnp.float32)

    return jax.tree.map(fill, jax.eval_shape(codec.init, jax.random.key(0)))


def images(rows=2, size=16):
    source = Scenes(size=size, split="train")
    return np.stack([source[i]["image"] for i in range(rows)])


def keys(rows=2, seed=1):
    return jax.random.split(jax.random.key(seed), rows)


@functools.partial(jax.jit, static_argnums=0)
def encode(codec, params, image, keys=None):
    return codec.encode(params, image, keys=keys)


@functools.partial(jax.jit, static_argnums=0)
def decode(codec, params, latents):
    return codec.decode(params, latents), codec.unclipped(params, latents)


@functools.partial(jax.jit, static_argnums=0)
def loss(codec, params, image, keys):
    return codec.loss(params, image, keys)


def test_the_published_size():
    codec = ImageTiny()
    shapes = jax.eval_shape(codec.init, jax.random.key(0))
    sizes = {k: sum(leaf.size for leaf in jax.tree.leaves(v)) for k, v in shapes.items()}
    # TAESD's safetensors files hold as many numbers
    assert sizes == {"encoder": 1_222_532, "decoder": 1_222_531}
    assert codec.factor == 8 and codec.latent_shape((512, 384)) == (64, 48, 4)


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("fields", [{}, {"widths": (8,), "blocks": (2,), "up_widths": (8,),
                                         "up_blocks": (0,)}, {"latent_channels": 7}])  # fmt: skip
def test_shapes_scale_and_types(fields):
    codec, larger, image = small(**fields), small(**fields, scale=5.0), images()
    params = started(codec)
    latents, more = encode(codec, params, image), encode(larger, params, image)
    assert latents.shape == (2, *codec.latent_shape((16, 16))) and latents.dtype == jnp.float32
    np.testing.assert_allclose(more, 5 * latents, rtol=1e-6)
    back, raw = decode(codec, params, latents)
    assert back.shape == image.shape and back.dtype == jnp.float32
    np.testing.assert_array_equal(back, np.clip(raw, -1, 1))
    # rounding of the scale, through the network
    np.testing.assert_allclose(decode(larger, params, more)[1], raw, atol=1e-5)
    # floats in [-1, 1] are the same image, rounded by another program; nothing is random
    same = encode(codec, params, normalise(image), keys())
    np.testing.assert_allclose(same, latents, atol=2e-6)
    np.testing.assert_array_equal(encode(codec, params, normalise(image), keys(seed=2)), same)


def test_latents_beyond_three_have_no_say():
    codec = small()
    far = np.full((1, 2, 2, 4), 40.0, np.float32)
    raw = [decode(codec, started(codec), x)[1] for x in (far, 2 * far)]
    np.testing.assert_allclose(*raw, rtol=1e-5)  # arrays that lie otherwise are summed otherwise
    z = np.linspace(-3, 3, 7, dtype=np.float32)
    np.testing.assert_allclose(unscaled(scaled(z)), z, atol=1e-6)
    np.testing.assert_array_equal(scaled(np.float32([-9, 0, 9])), [0, 0.5, 1])


def test_decoding_in_parts_changes_nothing(monkeypatch):
    codec = small()
    latents = np.random.default_rng(0).normal(size=(16, 4, 4, 4)).astype(np.float32)
    whole = decode(codec, started(codec), latents)[0]
    monkeypatch.setattr(batched_map, "LIVE_VALUES", 1)
    parts = jax.jit(lambda x: codec.decode(started(codec), x))(latents)
    np.testing.assert_allclose(parts, whole, atol=1e-6)  # sums blocked otherwise


@pytest.mark.thorough
def test_the_parts_of_the_loss():
    error = jnp.zeros((1, 4, 6, 1)).at[0, :, :3].set(1.0)
    # |e|: half the pixels; 2 x 2 means: 1, 1/2, 0 in a row; 4 does not divide 6
    assert float(multi_scale(error)) == pytest.approx(0.5 + 0.5)
    # one of five horizontal differences, no vertical one
    assert float(differences(error)) == pytest.approx(1 / 5)
    np.testing.assert_allclose(psnr(error, 0 * error), 10 * np.log10(4 / 0.5), rtol=1e-6)
    np.testing.assert_allclose(psnr(error, error), 100, rtol=1e-6)

    codec, image = small(edges=0.5, tether=2.0), images()
    params = started(codec)
    total, metrics = loss(codec, params, image, keys())
    x, z = jnp.asarray(normalise(image)), encode(codec, params, image)
    made = decode(codec, params, z)[1]
    wanted = {
        "loss/pixels": multi_scale(made - x),
        "loss/edges": 0.5 * differences(made - x),
        "loss/tether": 2.0 * np.square(np.maximum(np.abs(z) - 2, 0)).mean(),
        "psnr": psnr(jnp.clip(made, -1, 1), x).mean(),
        "latent/std": np.std(z),
    }
    assert set(metrics) == {"loss", *wanted}
    for name, value in wanted.items():  # float32 means, in one program and in several
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    parts = [v for k, v in wanted.items() if k.startswith("loss/")]
    np.testing.assert_allclose(total, sum(parts), rtol=1e-5)


@pytest.mark.thorough
def test_the_tether_pulls_latents_back_only_beyond_two():
    codec, image = small(tether=1.0), images()
    params = started(codec)
    assert float(loss(codec, params, image, keys())[1]["loss/tether"]) == 0.0
    last = params["encoder"]["conv_out"]
    far = {"kernel": 0 * last["kernel"], "bias": last["bias"] * 0 + jnp.float32(5)}
    params = params | {"encoder": params["encoder"] | {"conv_out": far}}
    assert float(loss(codec, params, image, keys())[1]["loss/tether"]) == pytest.approx(9.0)


@pytest.mark.thorough
def test_noise_reaches_the_decoder_from_a_rows_own_key():
    codec, image = small(noise=0.3), images()
    params = started(codec)
    calm = loss(small(), params, image, keys())[0]
    both = loss(codec, params, image, keys())[0]
    assert float(loss(small(), params, image, keys(seed=2))[0]) == float(calm)
    assert float(loss(codec, params, image, keys(seed=2))[0]) != float(both) != float(calm)
    alone = [loss(codec, params, image[i : i + 1], keys()[i : i + 1])[0] for i in (0, 1)]
    np.testing.assert_allclose(both, np.mean(alone), rtol=1e-5)  # means of means in float32


@pytest.mark.thorough
@pytest.mark.usefixtures("optimized")
def test_it_learns_scenes():
    codec, rows = small(noise=0.02), 8
    image, params = images(rows), started(codec)
    optimizer = optax.adam(4e-3)
    grad = jax.value_and_grad(codec.loss, has_aux=True)

    def step(carry, key):
        params, state = carry
        (_, metrics), gradients = grad(params, image, jax.random.split(key, rows))
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), metrics

    @jax.jit
    def train(params, keys):
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)

    _, metrics = train(params, jax.random.split(jax.random.key(1), 60))
    # it starts at black images, whose mean square error is that of the scenes themselves
    assert float(metrics["loss"][-1]) < 0.5 * float(metrics["loss"][0])
    assert float(metrics["psnr"][-1]) > float(metrics["psnr"][0]) + 5


@pytest.mark.thorough
def test_every_parameter_gets_a_gradient():
    codec = small()
    grad = jax.jit(jax.grad(lambda p: codec.loss(p, images(), keys())[0]))
    gradients = grad(started(codec))
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients))


@pytest.mark.thorough
def test_bfloat16_activations_keep_float32_ends():
    codec, image = small(dtype="bfloat16"), images()
    params = started(codec)
    latents = encode(codec, params, image)
    raw = decode(codec, params, latents)[1]
    assert latents.dtype == raw.dtype == jnp.float32
    exact = encode(small(), params, image)
    # 8 bits in every one of eight convolutions
    assert float(jnp.abs(latents - exact).max()) < 0.05 * float(jnp.abs(exact).max())


def test_wrong_fields_and_images_are_refused():
    for fields, text in (
        ({"blocks": (1, 1, 1)}, r"blocks = \(1, 1, 1\); it must be 2 numbers of at least 0"),
        ({"widths": ()}, "one or more numbers"),
        ({"up_widths": (0, 8)}, "2 numbers of at least 1"),
        ({"scale": 0.0}, "scale = 0.0; it must be positive"),
        ({"noise": -0.1}, "noise = -0.1; it must be at least 0"),
        ({"latent_channels": 0}, "latent_channels = 0"),
    ):
        with pytest.raises(ValueError, match=text):
            small(**fields)
    codec = ImageTiny(**SMALL)
    with pytest.raises(UserError, match="multiples of 2"):
        encode(codec, started(codec), images()[:, :15])
    with pytest.raises(UserError, match="of 4 channels and dtype uint8"):
        encode(codec, started(codec), images()[..., [0, 1, 2, 0]])
    with pytest.raises(UserError, match="of 3 channels and dtype int16"):
        encode(codec, started(codec), images().astype(np.int16))

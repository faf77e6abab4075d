"""The label autoencoder: published sizes, exact shapes, masked loss, and that it learns."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jointseg_jax.codecs import batched_map
from jointseg_jax.codecs.label_ae import LabelAE, cross_entropy, unit_scale
from jointseg_jax.codecs.label_net import Decoder, Double
from jointseg_jax.types import VOID, UserError

SMALL = dict(widths=(8, 16), up_widths=(16,), middle_width=16, groups=4, latent_channels=3)


def small(**fields):
    return LabelAE(**({"classes": 5} | SMALL | fields))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.lru_cache
def started(codec):
    """Parameters drawn by numpy, as ``init`` would: forty random draws take XLA long to compile."""
    draws = np.random.default_rng(0)

    def fill(path, leaf):
        if any("norm" in part.key for part in path):
            return jnp.full(leaf.shape, float(path[-1].key == "scale"))
        bound = np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(draws.uniform(-bound, bound, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(codec.init, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def encode(codec, params, labels, keys=None):
    return codec.encode(params, labels, keys=keys)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(codec, params, latents):
    return codec.logits(params, latents)


def maps(batch=2, size=8, classes=5, seed=0):
    coarse = np.random.default_rng(seed).integers(0, classes, (batch, size // 4, size // 4))
    return jnp.asarray(np.kron(coarse, np.ones((1, 4, 4), int)))


@pytest.mark.parametrize(
    ("classes", "parameters"), [(21, 14_815_517), (81, 15_094_361), (151, 15_418_143)]
)
def test_published_parameter_counts(classes, parameters):
    for background in ("code", "zero"):
        codec = LabelAE(classes=classes, background=background)
        shapes = jax.eval_shape(codec.init, jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    assert codec.latent_shape((512, 384)) == (64, 48, 4)
    latents = jax.ShapeDtypeStruct((1, 64, 48, 4), jnp.float32)
    assert jax.eval_shape(codec.logits, shapes, latents).shape == (1, 512, 384, classes)


@pytest.mark.thorough
def test_doubling_is_a_transposed_convolution():
    module = Double(5)
    x = normal(0, 2, 3, 4, 7)
    params = module.init(jax.random.key(1), x)["params"]
    want = nn.ConvTranspose(5, (2, 2), strides=(2, 2), padding="VALID").apply(
        {"params": {"kernel": params["kernel"][::-1, ::-1], "bias": params["bias"]}}, x
    )
    # 7 products of order 1 in float32
    np.testing.assert_allclose(module.apply({"params": params}, x), want, atol=1e-5)


@pytest.mark.thorough
def test_initial_weights_fill_their_interval():
    x = jnp.zeros((1, 1, 1, 64))
    decoder = Decoder(up_widths=(), middle_width=64, middle_blocks=0, outputs=48, groups=4)
    layers = decoder.init(jax.random.key(0), x)["params"]
    doubling = Double(32).init(jax.random.key(1), x)["params"]
    for layer, fan_in in ((layers["conv_in"], 9 * 64), (doubling, 4 * 32)):
        bound = fan_in**-0.5
        for leaf in (layer["kernel"], layer["bias"]):
            # the largest of n uniform draws is within 10/n of the bound (probability 1 - e^-5)
            size = float(jnp.abs(leaf).max()) / bound
            assert 1 - 10 / leaf.size < size <= 1 + 1e-6
            # standard error of the spread of n draws: 0.45 / sqrt(n), 3 of them at n = 32
            assert float(np.std(leaf)) == pytest.approx(bound / 3**0.5, rel=0.24)


def test_what_the_encoder_sees():
    labels = jnp.array([[[VOID, 0, 1, 4]]])
    ours = small().analog(labels)[0, 0]
    np.testing.assert_array_equal(ours, [[0, 0, 0], [-1, -1, -1], [1, -1, -1], [-1, -1, 1]])
    original = small(background="zero", void="low_bits").analog(labels)[0, 0]
    # 4 foreground classes in 2 bits: 4 is code 0, and 255 is its two low bits
    np.testing.assert_array_equal(original, [[1, 1], [0, 0], [1, -1], [-1, -1]])


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("fields", [{}, {"patch": 2}, {"middle_blocks": 1}, {"up_widths": ()}])
def test_shapes_and_scale(fields):
    codec, larger, labels = small(**fields), small(**fields, scale=3.0), maps()

    @jax.jit
    def coded(params):
        return [
            (c.encode(params, labels), c.logits(params, c.encode(params, labels)))
            for c in (codec, larger)
        ]

    (latents, logits), (more, same) = coded(started(codec))
    assert latents.shape[1:] == codec.latent_shape(labels.shape[1:])
    assert logits.shape == (*labels.shape, 5)
    np.testing.assert_allclose(more, 15 * latents, rtol=1e-6)  # 3 / 0.2, two roundings
    np.testing.assert_allclose(same, logits, atol=1e-4)  # rounding through the network


def test_unit_scale_gives_unit_spread():
    latents = normal(0, 4, 8, 8, 3) * 7 + 2
    assert float(jnp.std(unit_scale(latents) * latents)) == pytest.approx(1, rel=1e-5)


@pytest.mark.thorough
def test_samples_follow_their_own_keys():
    codec, labels = small(latent="sample"), maps()
    params = started(codec)

    def keys():
        return jax.random.split(jax.random.key(1), 2)

    sample, mode = encode(codec, params, labels, keys()), encode(codec, params, labels)
    assert float(jnp.abs(sample - mode).max()) > 0.01
    alone = encode(codec, params, labels[1:], keys()[1:])
    # another batch size may block the convolution's sums differently
    np.testing.assert_allclose(sample[1:], alone, atol=1e-6)
    np.testing.assert_array_equal(encode(small(), params, labels, keys()), mode)


def test_void_pixels_neither_cost_nor_teach():
    logits = normal(0, 1, 4, 4, 5)
    labels = jnp.arange(16).reshape(1, 4, 4) % 5
    half = labels.at[:, 2:].set(VOID)
    x = np.asarray(logits)[0, :2].reshape(8, 5)
    want = np.log(np.exp(x).sum(1)) - x[np.arange(8), np.asarray(labels)[0, :2].ravel()]
    cost = jax.jit(jax.value_and_grad(cross_entropy))
    value, gradient = cost(logits, half)
    assert float(value) == pytest.approx(float(want.mean()), rel=1e-6)
    assert bool((gradient[:, 2:] == 0).all()) and bool((gradient[:, :2] != 0).all())
    assert float(cost(logits, jnp.full_like(labels, VOID))[0]) == 0


def test_low_probabilities_fall_back():
    logits = jnp.log(jnp.array([[[[0.1, 0.6, 0.3], [0.3, 0.4, 0.3]]]]))
    for fields, want in (
        ({}, [1, 1]),
        ({"prob_threshold": 0.5}, [1, 0]),
        ({"prob_threshold": 0.5, "threshold_to": "void"}, [1, VOID]),
    ):
        labels, confidence = small(classes=3, **fields).read(logits)
        np.testing.assert_array_equal(labels[0, 0], want)
        np.testing.assert_allclose(confidence[0, 0], [0.6, 0.4], rtol=1e-6)


def test_decoding_in_parts_changes_nothing(monkeypatch):
    codec, labels = small(), maps(batch=16)
    params = started(codec)
    latents = encode(codec, params, labels)
    whole = jax.jit(codec.decode_with_confidence)(params, latents)
    monkeypatch.setattr(batched_map, "LIVE_VALUES", 1)
    parts = jax.jit(lambda x: codec.decode_with_confidence(params, x))(latents)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-5)  # the same sums, blocked otherwise


@pytest.mark.thorough
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    "fields", [{"latent": "sample", "patch": 2}, {"point_loss": {"points": 32}}]
)
def test_it_learns_to_return_its_input(fields):
    codec, labels = small(**fields), maps(size=16).at[0, :2].set(VOID)
    params = started(codec)
    optimizer = optax.adam(3e-3)
    grad = jax.value_and_grad(codec.loss, has_aux=True)

    def step(carry, key):
        params, state = carry
        (loss, _), gradients = grad(params, labels, jax.random.split(key, len(labels)))
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def train(params, keys):
        carry = (params, optimizer.init(params))
        (params, _), losses = jax.lax.scan(step, carry, keys)
        return losses, codec.decode(params, codec.encode(params, labels))

    losses, back = train(params, jax.random.split(jax.random.key(1), 200))
    seen = np.asarray(labels != VOID)
    # five blocks' worth of labels by a network of 20 thousand weights: chance is 1 in 5
    assert np.mean(np.asarray(back == labels)[seen]) > 0.95
    assert float(losses[-5:].mean()) < 0.5 * float(losses[:5].mean())


@pytest.mark.thorough
def test_every_parameter_gets_a_gradient():
    codec, labels = small(latent="sample", middle_blocks=1), maps()
    params = started(codec)
    keys = jax.random.split(jax.random.key(1), 2)
    grad = jax.jit(jax.value_and_grad(codec.loss, has_aux=True))
    (_, metrics), gradients = grad(params, labels, keys)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients))
    assert set(metrics) == {"loss", "loss/cross_entropy", "latent/std", "latent/noise"}


@pytest.mark.thorough
def test_bfloat16_activations_keep_float32_ends():
    codec, labels = small(dtype="bfloat16"), maps()
    params = started(codec)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    latents = encode(codec, params, labels)
    logits = logits_of(codec, params, latents)
    assert latents.dtype == logits.dtype == jnp.float32
    exact = logits_of(small(), params, encode(small(), params, labels))
    # bfloat16 keeps 8 bits: about 1 percent after a dozen layers
    assert float(jnp.abs(logits - exact).max()) < 0.05 * float(jnp.abs(exact).max())


def test_wrong_fields_are_refused():
    for fields, text in (
        ({"groups": 5}, "divisor of the normalised widths"),
        ({"up_widths": (16, 16)}, "shorter than widths"),
        ({"classes": 9, "bits": 3}, "enough for 9 codes"),
        ({"prob_threshold": 1.0}, r"in \[0, 1\)"),
        ({"scale": 0.0}, "positive"),
    ):
        with pytest.raises(ValueError, match=text):
            small(**fields)
    codec = small(patch=2)
    with pytest.raises(UserError, match="multiples of 4"):
        encode(codec, started(codec), maps()[:, :6])


def row_errors(codec, params, labels, latents):
    """Cross-entropy of each row."""
    logits = logits_of(codec, params, latents)
    return jax.vmap(cross_entropy)(logits[:, None], labels[:, None])


@pytest.mark.thorough
def test_refinement_brings_every_row_nearer_to_its_labels():
    plain, refined = small(), small(refine=5)
    params, labels = started(plain), maps(3)
    before = row_errors(plain, params, labels, encode(plain, params, labels))
    after = row_errors(plain, params, labels, encode(refined, params, labels))
    assert (after < before).all()
    more = row_errors(plain, params, labels, encode(small(refine=15), params, labels))
    assert more.mean() < after.mean()


@pytest.mark.thorough
def test_refinement_treats_every_row_alone():
    codec, labels = small(refine=3), maps(3).at[0, :2].set(VOID)
    params = started(codec)
    whole = encode(codec, params, labels)
    for row in range(3):
        alone = encode(codec, params, labels[row : row + 1])
        # float32, another batch size: the sums of convolutions may run in another order, and Adam
        # divides by small numbers
        np.testing.assert_allclose(whole[row : row + 1], alone, atol=1e-3)


@pytest.mark.thorough
def test_refinement_steps_are_as_long_as_the_docstring_says():
    codec = small(refine=1, refine_rate=0.25)
    params, labels = started(codec), maps(2)
    start = encode(small(), params, labels)
    moved = jnp.abs(encode(codec, params, labels) - start)
    unit = 0.25 * jnp.std(start, axis=(1, 2, 3), keepdims=True)
    # the first Adam step has the length of the rate wherever there is a gradient at all
    np.testing.assert_allclose(moved, jnp.broadcast_to(unit, moved.shape), rtol=1e-3)

"""Laws of the bridge between images and label maps, on a coupling whose velocity is known.

With images that are half as far from grey as their map's colours, ``z_0 = z_1 / 2``, the state is
``x = z_1 (1 + t) / 2`` and its velocity ``z_1 / 2 = x / (1 + t)``.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jointseg_jax.codecs.chain import Chain
from jointseg_jax.codecs.palette import Palette
from jointseg_jax.codecs.pixels import Pixels
from jointseg_jax.models.uvit import UViT
from jointseg_jax.rng import fold, sample_keys
from jointseg_jax.systems.bridge import STATE, Bridge
from jointseg_jax.systems.system import Generator, Objective
from jointseg_jax.transport.adaptive import Dopri5
from jointseg_jax.transport.loss_weight import InverseSigma
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import Linear, ScaledLinear
from jointseg_jax.transport.solvers import Euler, Heun
from jointseg_jax.transport.times import LogitNormal, Shared
from jointseg_jax.types import VOID

CLASSES, SIZE = 7, (8, 8)


class Known(nn.Module):
    """The velocity of the coupling, times a parameter that starts at 1."""

    estimated: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, latents, times, text=None):
        factor = self.param("factor", nn.initializers.ones, ())
        t = (times[STATE] / 1000).reshape(-1, 1, 1, 1)
        return {STATE: factor * latents[STATE] / (1 + t)}, {}


def bridge(denoiser=None, *, void="white", perturbation=0.0, **changes):
    palette = Palette(classes=CLASSES, void=void, perturbation=perturbation)
    fields = {
        "mask": Chain(first=palette, second=Pixels()),
        "denoiser": denoiser or Known(),
        "process": Process(schedule=Linear(), predicts="velocity"),
        "times": Shared(),
        "solver": Euler(steps=8),
        "size": SIZE,
    }
    return Bridge(**fields | changes)


def uvit():
    spec = {"kind": "patches", "grid": SIZE, "channels": 3, "patch": 4}
    return UViT(streams={STATE: spec}, time_tokens=(STATE,), width=16, depth=2, heads=2)


def maps(count=3, void=False):
    labels = np.random.default_rng(0).integers(0, CLASSES, (count, *SIZE)).astype(np.int32)
    if void:
        labels[:, :2, :3] = VOID
    return jnp.asarray(labels)


def coupled(labels, system):
    """The float image of the coupling."""
    return 0.5 * jax.jit(system.encode_mask)({}, labels)


def keys(count=3, seed=0):
    return sample_keys(seed, jnp.arange(count, dtype=jnp.uint32))


TRUE = {"denoiser": {"factor": jnp.float32(1)}}
"""The parameters of ``Known``."""


def loss_of(system, params, batch):
    return jax.jit(system.loss)(params, {}, batch, keys())[0]


def generator(system):
    """``system.generate`` with these parameters, compiled once for all calls of one direction."""
    run = jax.jit(system.generate)
    return lambda keys, **given: run(TRUE, {}, None, keys, condition=given)


def test_protocols():
    assert isinstance(bridge(), Objective)
    assert isinstance(bridge(), Generator)


@pytest.mark.parametrize("void", ["white", "masked"])
def test_the_known_velocity_has_no_loss(void):
    system, labels = bridge(void=void), maps(void=True)
    params = jax.jit(system.init)(jax.random.key(0))
    assert params == TRUE
    batch = {"image": coupled(labels, system), "labels": labels}
    loss, metrics = jax.jit(system.loss)(params, {}, batch, keys())
    assert loss == metrics["loss"]
    assert loss < 1e-12  # float32 rounding of a velocity of order 1


def test_a_process_weighs_each_row_by_its_time():
    """Twice the true velocity is off by ``z_1 / 2`` at every time."""
    weight = InverseSigma(cap=2.0)
    process = Process(schedule=Linear(), predicts="velocity", weight=weight)
    system, labels = bridge(process=process), maps()
    batch = {"image": coupled(labels, system), "labels": labels}
    loss = loss_of(system, {"denoiser": {"factor": jnp.float32(2)}}, batch)
    t = system.times.draw(fold(keys(), "time"), (STATE,))[STATE]  # sigma is t
    squares = np.square(system.encode_mask({}, labels) / 2).mean((1, 2, 3))
    weights = np.minimum(1 / t, 2)
    assert len(set(weights.tolist())) > 1
    np.testing.assert_allclose(loss, np.mean(weights * squares), rtol=1e-5)  # float32


def test_masked_void_pixels_do_not_count():
    labels = maps(void=True)
    losses = {}
    for void in ("white", "masked"):
        system = bridge(void=void)
        image = np.array(coupled(labels, system))
        image[:, :2, :3] = 1.0  # wrong only where nothing is annotated
        batch = {"image": jnp.asarray(image), "labels": labels}
        losses[void] = loss_of(system, TRUE, batch)
    assert losses["masked"] < 1e-12 < 1e-3 < losses["white"]


def test_a_cell_counts_if_none_of_its_pixels_is_void():
    labels = np.zeros((1, 8, 8), np.int32)
    labels[0, 3, 5] = VOID
    counted = bridge(void="masked").valid_cells(jnp.asarray(labels), (2, 2))
    np.testing.assert_array_equal(counted[0], [[True, False], [True, True]])
    assert bridge().valid_cells(jnp.asarray(labels), (2, 2)).all()


# Euler on dx/dt = x / (1 + t) is exact: x is linear in t along the flow
@pytest.mark.thorough_but(1)
@pytest.mark.parametrize(
    "solver",
    [
        Euler(steps=1),
        Euler(steps=7),
        Heun(steps=3),
        Dopri5(),
    ],
)
def test_both_directions_are_read_off_one_network(solver):
    system, labels = bridge(solver=solver), maps()
    image, generate = coupled(labels, system), generator(system)
    read = generate(keys(), image=image)
    np.testing.assert_array_equal(read["labels"], labels)
    assert read["confidence"].min() > 0.99  # 1 at a colour, less float32 rounding
    made = generate(keys(), labels=labels)
    wanted = np.round(127.5 * (1 + np.asarray(image)))
    assert np.abs(made["image"].astype(int) - wanted).max() <= 1  # rounding to uint8
    np.testing.assert_array_equal(made["labels"], labels)


def test_segmentation_is_determined_and_synthesis_is_not():
    system, labels = bridge(perturbation=20.0), maps()
    image, generate = coupled(labels, system), generator(system)
    reads, mades = [], []
    for seed in (0, 1):
        reads.append(generate(keys(seed=seed), image=image)["labels"])
        mades.append(generate(keys(seed=seed), labels=labels)["image"])
    np.testing.assert_array_equal(*reads)
    assert (np.asarray(mades[0]) != np.asarray(mades[1])).mean() > 0.5


@pytest.mark.thorough
def test_a_row_does_not_depend_on_those_beside_it():
    for solver in (Euler(steps=3), Dopri5()):
        system, labels = bridge(perturbation=20.0, solver=solver), maps()
        generate = generator(system)
        whole = generate(keys(), labels=labels)["image"]
        alone = generate(keys()[1:2], labels=labels[1:2])
        np.testing.assert_array_equal(whole[1:2], alone["image"])


def test_pull_is_the_gradient_of_the_log_posterior():
    system = bridge(correction=1.0, temperature=0.3)
    labels, guess = jnp.asarray(maps()), jax.random.normal(jax.random.key(3), (3, *SIZE, 3))
    colours = jnp.asarray(system.mask.first.colours() / 127.5 - 1, jnp.float32)

    def log_posterior(z):
        far = jnp.square(z[..., None, :] - colours.reshape(1, 1, 1, -1, 3)).sum(-1)
        logs = jax.nn.log_softmax(-far / (2 * 0.3**2), axis=-1)
        return jnp.take_along_axis(logs, labels[..., None], -1).sum()

    wanted = jax.jit(jax.grad(log_posterior))(guess)
    got = jax.jit(system.class_correction)(guess, labels)
    # float32: terms of order |z|/temperature^2 = 30 cancel
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_correction_is_held_constant_and_vanishes_at_the_colours():
    labels = maps(void=True)
    plain, pulled = bridge(), bridge(correction=0.5, temperature=0.6)
    image = coupled(labels, plain)
    batch = {"image": image, "labels": labels}
    # classes lie at least 127 grey levels apart, 5 temperatures: the softmax has chosen
    assert loss_of(bridge(correction=0.5, temperature=0.2), TRUE, batch) < 1e-4
    off = jax.tree.map(lambda p: 0.7 * p, TRUE)
    loss = jax.jit(jax.value_and_grad(lambda p: pulled.loss(p, {}, batch, keys())[0]))
    with_pull, gradient = loss(off)
    assert with_pull != loss_of(plain, off, batch)

    def by_hand(p):
        """The squared error from the target that the guess of ``off`` gives."""
        t = pulled.times.draw(fold(keys(), "time"), (STATE,))[STATE]
        z1 = pulled.encode_mask({}, labels)
        x = pulled.process.interpolate(image, z1, t)
        guess = x + (1 - t).reshape(-1, 1, 1, 1) * pulled.velocity(off, x, t)
        pull = pulled.class_correction(guess, labels)
        target = z1 - image + 0.5 * pull
        return jnp.square(pulled.velocity(p, x, t) - target).mean(), pull

    by_hand, pull = jax.jit(jax.grad(by_hand, has_aux=True))(off)
    assert (pull[:, :2, :3] == 0).all() and (pull != 0).any()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), gradient, by_hand)


@pytest.mark.thorough
def test_training_reaches_both_directions():
    """A small network learns the coupling: the loss falls, in either kind of times."""
    system = bridge(uvit(), times=Shared(distribution=LogitNormal()), perturbation=6.0)
    labels = maps(8)
    batch = {"image": coupled(labels, system), "labels": labels}
    params = system.init(jax.random.key(0))
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, k):
        loss, gradient = jax.value_and_grad(lambda p: system.loss(p, {}, batch, k)[0])(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for step in range(60):
        params, state, loss = update(params, state, keys(8, seed=step))
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


class Drawn(Pixels):
    """An image codec whose latents are drawn where keys are given, as those of a KL autoencoder."""

    def encode(self, params, x, *, keys=None):
        latents = super().encode(params, x)
        if keys is None:
            return latents
        return latents + jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)


@pytest.mark.thorough
def test_image_latents_are_drawn_in_training_and_the_mode_otherwise():
    system = bridge(mask=Chain(first=Palette(classes=CLASSES), second=Drawn()))
    labels = maps()
    image = coupled(labels, system)
    batch = {"image": image, "labels": labels}
    params = system.init(jax.random.key(0))
    # the known velocity has no loss on the mode; drawn latents of unit variance have
    assert system.loss(params, {}, batch, keys())[0] > 0.1
    read = system.generate(params, {}, None, keys(), condition={"image": image})
    np.testing.assert_array_equal(read["labels"], labels)


def test_times_are_float32_whatever_the_network_computes_in():
    """The original draws t in the weights' bfloat16, which has about 1,700 values in [0, 1)."""
    times = Shared().draw(keys(4096), (STATE,))[STATE]
    assert times.dtype == jnp.float32
    assert len(np.unique(times)) > 4000


@pytest.mark.parametrize(
    ("given", "names"), [(None, r"\[\]"), ({"image": 0, "labels": 0}, "'image', 'labels'")]
)
def test_one_end_must_be_given(given, names):
    system = bridge()
    given = given and {k: jnp.zeros((1, *SIZE), jnp.int32) for k in given}
    with pytest.raises(ValueError, match=f"bridge: given has .*{names}.*exactly one of"):
        system.generate(TRUE, {}, None, keys(1), condition=given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process": Process(schedule=Linear(), predicts="data")}, "predicts data.*to velocity"),
        (
            {"process": Process(schedule=ScaledLinear(), predicts="velocity")},
            "does not reach its source end.*to linear",
        ),
        ({"correction": -1.0}, "correction=-1.0, temperature=0.1: must be at least 0"),
        ({"temperature": 0.0}, "must be at least 0 and positive"),
        ({"denoiser": Known(estimated=(STATE,))}, "self_condition"),
    ],
)
def test_what_cannot_be_a_bridge_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        bridge(**changes)

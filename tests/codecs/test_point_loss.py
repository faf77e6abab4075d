"""Point-sampled losses: closed forms, presence, void, and the same numbers under jit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.codecs.point_loss import Draws, PointLoss, _bilinear, mask_losses, objects
from jointseg_jax.types import VOID


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def keys(seed, count=1):
    return jax.random.split(jax.random.key(seed), count)


def draw(loss, seed, classes):
    """Uniform numbers from numpy, in the shapes of ``PointLoss.draw``."""
    numbers = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda k: loss.draw(k, classes), keys(seed))
    return jax.tree.map(lambda s: jnp.asarray(numbers.random(s.shape), jnp.float32), shapes)


def confident(labels, classes, size=20.0):
    return size * (2 * jax.nn.one_hot(labels, classes) - 1)


def halves(height=16, width=16):
    return jnp.zeros((1, height, width), jnp.int32).at[:, :, width // 2 :].set(2)


def test_bilinear_samples_reproduce_planes_inside_and_fade_outside():
    height, width = 5, 8
    plane = 2.0 * jnp.arange(width).reshape(1, -1) + 3.0 * jnp.arange(height).reshape(-1, 1)
    flat = plane.reshape(1, -1)

    @functools.partial(jax.jit, static_argnums=1)
    def sample(points, tap):
        return _bilinear(points, (height, width), tap)

    def tap(index):
        return jnp.take(flat[0], index)

    x = jnp.linspace(0.5 / width, 1 - 0.5 / width, 9)
    y = jnp.linspace(0.5 / height, 1 - 0.5 / height, 9)
    got = sample(jnp.stack([x, y], -1)[None], tap)
    want = 2 * (x * width - 0.5) + 3 * (y * height - 0.5)
    # float32 coordinates of size 8, weights of size 1
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-5)
    corner = sample(jnp.zeros((1, 1, 2)), lambda i: jnp.ones(i.shape))
    assert float(corner[0, 0]) == pytest.approx(0.25)  # three of four neighbours are outside


def test_objects_are_the_present_classes_in_order():
    labels = jnp.array([[[4, 4, VOID], [1, 4, 1]], [[VOID, VOID, VOID], [0, 0, 0]]])
    ids, present = objects(labels, classes=6, slots=3)
    np.testing.assert_array_equal(present, [[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(ids[0, :2], [1, 4])
    assert ids[1, 0] == 0


def test_a_confident_right_answer_costs_nothing_and_a_wrong_one_its_margin():
    labels = halves(16, 64)
    loss = PointLoss(points=512, importance=0.0)
    draws = draw(loss, 0, 3)
    cost = jax.jit(loss)
    right = cost(confident(labels, 3), labels, draws)
    # Away from the border between the halves the terms are exp(-20). At it, and within half a
    # pixel of the edge of the map (about 11 percent of the area), targets are fractions, where
    # dice = 1 - (2 p q + 1) / (p + q + 1) is above 0 even for p = q.
    assert float(right["class"]) < 0.01 and float(right["dice"]) < 0.11
    wrong = cost(confident(2 - labels, 3), labels, draws)
    assert float(wrong["class"]) > 30 and float(wrong["dice"]) > 0.89


def test_uncertain_points_are_found():
    labels = halves(32, 32)
    logits = confident(labels, 3)
    loss = PointLoss(points=32, oversample=4, importance=0.5)
    draws = draw(loss, 1, 3)
    points = jax.jit(loss.class_points)(logits, labels, draws)
    top = jax.lax.top_k(points.logits, 2)[0]
    gap = np.asarray(top[0, :, 0] - top[0, :, 1])
    assert (np.diff(gap[:16]) >= 0).all()  # least certain first
    assert gap[:16].max() <= np.median(gap[16:])


@pytest.mark.thorough
def test_void_points_do_not_count():
    labels = halves()
    void = labels.at[:, :, :4].set(VOID)
    loss = PointLoss(points=128, importance=0.5)
    draws = draw(loss, 2, 3)
    logits = 0.1 * normal(3, 1, 16, 16, 3)
    masks = jax.jit(loss.mask_points)(logits, void, draws)
    left = np.asarray(draws.mask_fresh[0, :2, :, 0]) < 4 / 16
    np.testing.assert_array_equal(~left, masks.counted[0, :2, loss.num_uncertain :])
    original = PointLoss(points=128, importance=0.5, void="negative")
    assert bool(jax.jit(original.mask_points)(logits, void, draws).counted.all())
    nothing = jnp.full_like(labels, VOID)
    total = jax.jit(jax.value_and_grad(lambda x: sum(loss(x, nothing, draws).values())))
    value, gradient = total(logits)
    assert float(value) == 0 and bool((gradient == 0).all())


@pytest.mark.thorough
def test_slots_beyond_the_present_classes_change_nothing():
    labels = halves()
    logits = normal(4, 1, 16, 16, 7)
    loss = PointLoss(points=16)
    wide = draw(loss, 5, 7)
    narrow = Draws(*wide[:2], *(d[:, :2] for d in wide[2:]))
    cost = jax.jit(lambda draws: mask_losses(loss.mask_points(logits, labels, draws)))
    np.testing.assert_allclose(
        cost(wide),
        cost(narrow),
        rtol=1e-6,  # sums over 7 and over 2 terms, five of them 0
    )
    bounded = draw(PointLoss(points=16, slots=2), 6, 7)
    assert bounded.mask_candidates.shape == (1, 2, 48, 2)


def test_a_row_depends_on_its_own_key_only():
    loss = PointLoss(points=8)
    every, last = loss.draw(keys(7, 3), 3), loss.draw(keys(7, 3)[2:], 3)
    for a, b in zip(every, last):
        np.testing.assert_array_equal(a[2:], b)


def test_wrong_fields_are_refused():
    with pytest.raises(ValueError, match="points = 0"):
        PointLoss(points=0)
    with pytest.raises(ValueError, match=r"importance = 1\.5"):
        PointLoss(importance=1.5)

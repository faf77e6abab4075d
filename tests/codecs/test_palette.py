"""Every class returns under the largest perturbation; the nearest colours are a full search's."""

import functools
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.codecs.palette import Palette
from jointseg_jax.types import VOID

FITTED = {2: (2, 254), 8: (2, 254), 9: (3, 127), 19: (3, 127), 21: (3, 127), 27: (3, 127)}
FITTED |= {28: (4, 84), 81: (5, 63), 125: (5, 63), 151: (6, 50), 171: (6, 50), 215: (6, 50)}
FITTED |= {216: (6, 50)}

PUBLISHED = {"k": 6, "s": 50}
KRONECKER = {"table": "kronecker"}
KINDS = {"fitted": {}, "published": PUBLISHED, "kronecker": KRONECKER}

ROUNDING = 1e-3
"""Grey levels: float32 resolves 1e-5 of one near +-1, and distances a few times that."""


def anchors(codec):
    """What may be read, float64 in [-1, 1]; VOID last if it may."""
    colours = codec.colours().astype(np.float64)
    if codec.decode_void:
        colours = np.concatenate([colours, np.full((1, 3), 255.0)])
    return colours / 127.5 - 1


def full_search(codec, x):
    """Labels and margins by the definition, in float64."""
    distances = np.square(np.asarray(x, np.float64)[..., None, :] - anchors(codec)).sum(-1)
    nearest = distances.argmin(-1)
    ordered = np.sort(distances, axis=-1)
    labels = np.where(nearest == codec.classes, VOID, nearest)
    return labels, ordered[..., 1] - ordered[..., 0]


def every_id(codec):
    return np.arange(VOID if codec.decode_void else 0, codec.classes).reshape(1, 1, -1)


CORNERS = np.array(list(itertools.product((0.0, 1.0), repeat=3)), np.float32).reshape(8, 1, 1, 3)


@functools.partial(jax.jit, static_argnums=0)
def encode(codec, labels, keys=None):
    return codec.encode({}, labels, keys=keys)


@functools.partial(jax.jit, static_argnums=0)
def read(codec, x):
    return *codec.decode_with_confidence({}, x), codec.margin(x)


@functools.partial(jax.jit, static_argnums=0)
def at_the_corners(codecs):
    """Each codec's ids, moved as far as its perturbation goes in all 8 directions, read back."""
    found = []
    for codec in codecs:
        exact = codec.encode({}, jnp.asarray(every_id(codec)))
        eight = jnp.repeat(exact, 8, axis=0)
        moved = codec.perturb(eight, jnp.broadcast_to(CORNERS, eight.shape))
        found.append((exact, codec.decode({}, moved), codec.decode_with_confidence({}, exact)))
    return found


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("void", ["masked", "read", "white"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_returns_exactly_under_the_largest_perturbation(kind, void):
    fields = KINDS[kind] | ({"decode_void": True} if void == "read" else {"void": void})
    made = []
    for classes in FITTED if void == "white" else (2, 19, 171, 216):
        farthest = Palette(classes=classes, **fields).reach - ROUNDING
        made.append(Palette(classes=classes, **fields, perturbation=farthest))
    for codec, (exact, labels, (again, confidence)) in zip(made, at_the_corners(tuple(made))):
        ids = every_id(codec)
        np.testing.assert_array_equal(labels, np.repeat(ids, 8, axis=0), err_msg=str(codec))
        np.testing.assert_array_equal(again, ids)
        assert exact.dtype == jnp.float32 and labels.dtype == jnp.int32
        assert exact.shape == (1, *codec.latent_shape((1, ids.size)))
        # the margin of an exact colour is at least the smallest squared distance
        np.testing.assert_allclose(confidence, 1, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_beyond_the_reach_some_class_is_lost(kind):
    codec = Palette(classes=19, **KINDS[kind])
    beyond = codec.reach + ROUNDING
    moved = anchors(codec).reshape(1, 1, -1, 3) + beyond / 127.5 * (2 * CORNERS - 1)
    labels = np.asarray(read(codec, moved.astype(np.float32))[0])
    assert (labels != np.arange(19).reshape(1, 1, -1)).any()


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("decode_void", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nearest_and_margin_are_those_of_a_full_search(kind, decode_void):
    for classes in (2, 19, 42, 171):  # 1, 2, 3 and 3 boxes of the published lattice
        codec = Palette(classes=classes, **KINDS[kind], decode_void=decode_void)
        # far beyond the cube on all sides
        x = np.random.default_rng(classes).uniform(-2, 2, (2, 20, 30, 3)).astype(np.float32)
        labels, _, margin = read(codec, x)
        want, exact = full_search(codec, x)
        # distances up to 27 in float32: 8 steps of 2e-6; margins come from differences instead
        clear = exact > 2e-5
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(np.asarray(labels)[clear], want[clear], err_msg=str(codec))
        np.testing.assert_allclose(margin, exact, atol=4e-6, rtol=1e-6, err_msg=str(codec))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reach_is_the_least_over_all_pairs_of_colours(kind):
    for classes, decode_void in itertools.product((2, 8, 19, 171, 216), (False, True)):
        codec = Palette(classes=classes, **KINDS[kind], decode_void=decode_void)
        a = 127.5 * (anchors(codec) + 1)
        d = (a[:, None] - a[None])[~np.eye(len(a), dtype=bool)]
        ratio = np.square(d).sum(-1) / (2 * np.abs(d).sum(-1))
        assert codec.reach == pytest.approx(ratio.min(), rel=1e-12)
        distance = np.sqrt(np.square(d).sum(-1).min())
        assert codec.gap == pytest.approx(distance / 127.5, rel=1e-12)
        assert codec.reach >= distance / (2 * 3**0.5) - 1e-9
        if kind != "kronecker" and not decode_void:
            assert codec.reach == codec.spacing / 2


def test_lattices_fitted_to_the_classes():
    for classes, (k, s) in FITTED.items():
        codec = Palette(classes=classes)
        assert (codec.levels, codec.spacing) == (k, s)
        assert len(np.unique(codec.colours(), axis=0)) == classes
        assert codec.colours().max() <= 254
    assert Palette(classes=5, k=4).spacing == 84 and Palette(classes=30, s=20).levels == 4


def test_the_published_colours():
    colours = Palette(classes=216, **PUBLISHED).colours()
    assert colours.dtype == np.uint8 and colours.shape == (216, 3)
    np.testing.assert_array_equal(colours[[0, 1, 6, 36, 215]], np.array(
        [[0, 0, 0], [0, 0, 50], [0, 50, 0], [50, 0, 0], [250, 250, 250]]
    ))  # fmt: skip


def test_kronecker_colours_are_distinct_and_use_every_channel():
    for classes in (2, 19, 171, 1000):
        colours = Palette(classes=classes, **KRONECKER).colours()
        assert len(np.unique(colours, axis=0)) == classes
        assert (colours.min(0) == 0).all() and (colours.max(0) == 254).all()
    # any two of 171 colours of the lattice are 50 apart or more; a random cube has some 5 apart
    assert Palette(classes=171, **KRONECKER).gap * 127.5 > 25


def test_one_class_has_no_rival():
    codec = Palette(classes=1, perturbation=100.0)
    labels, confidence, margin = read(codec, np.full((1, 2, 2, 3), 0.3, np.float32))
    assert (labels == 0).all() and (confidence == 1).all() and np.isinf(margin).all()


def test_what_void_becomes_and_reads_as():
    labels = np.array([[[VOID, 3]]])
    white = Palette(classes=19, **PUBLISHED)
    np.testing.assert_array_equal(encode(white, labels)[0, 0, 0], [1, 1, 1])
    # the class nearest to white has digits (0, 2, 5): 18 = (0, 3, 0) has less blue
    assert int(read(white, encode(white, labels))[0][0, 0, 0]) == 17
    both = Palette(classes=19, **PUBLISHED, decode_void=True)
    np.testing.assert_array_equal(read(both, encode(both, labels))[0], labels)
    for classes in (2, 216):
        masked = Palette(classes=classes, void="masked")
        np.testing.assert_array_equal(encode(masked, labels[:, :, :1]), np.zeros((1, 1, 1, 3)))
        x = np.random.default_rng(0).uniform(-2, 2, (1, 64, 64, 3)).astype(np.float32)
        assert int(read(masked, x)[0].min()) >= 0


def test_ids_that_are_no_class_show_as_nan():
    codec = Palette(classes=4)
    x = np.asarray(encode(codec, np.array([[[3, 4, 300, -2]]])))[0, 0]
    np.testing.assert_array_equal(np.isnan(x).all(-1), [False, True, True, True])
    labels, confidence, _ = read(codec, x[None, None])
    assert set(np.unique(labels)) <= set(range(4)) and (confidence[0, 0, 1:] == 0).all()


def test_perturbations_are_uniform_and_a_rows_own():
    codec, labels = Palette(classes=19, perturbation=6.0), np.zeros((3, 40, 50), int)

    def keys():
        return jax.random.split(jax.random.key(0), 3)

    x = np.asarray(encode(codec, labels, keys()))
    levels = 127.5 * (x - np.asarray(encode(codec, labels)))
    assert np.abs(levels).max() <= 6.0 + ROUNDING  # attained at u = 0
    # 18,000 draws: standard errors 0.026 of the mean, 0.02 of the deviation, times 4
    assert abs(levels.mean()) < 0.11 and abs(levels.std() - 6 / 3**0.5) < 0.08
    # per channel and pixel: no correlation beyond 4 / sqrt(6000)
    assert np.abs(np.corrcoef(levels.reshape(-1, 3).T) - np.eye(3)).max() < 0.052
    assert (x < -1).any()  # black goes below black: no clamping
    alone = encode(codec, labels[1:2], keys()[1:2])
    np.testing.assert_array_equal(x[1:2], alone)


def test_confidence_falls_from_a_colour_to_half_way():
    codec = Palette(classes=2)
    a, b = anchors(codec)
    share = np.linspace(0, 0.5, 11).reshape(1, 1, -1, 1)
    x = ((1 - share) * a + share * b).astype(np.float32)
    labels, confidence, _ = read(codec, x)
    assert (labels[0, 0, :-1] == 0).all()
    # margin on the line from a to b: D^2 (1 - 2 share)
    np.testing.assert_allclose(confidence[0, 0], 1 - 2 * share[0, 0, :, 0], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_that_of_the_pixels_whatever_the_classes(kind):
    x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)

    def largest(classes):
        codec = Palette(classes=classes, **KINDS[kind])
        traced = jax.make_jaxpr(lambda x: codec.decode_with_confidence({}, x))(x)
        return max(_sizes(traced.jaxpr))

    # values alive per pixel: the six candidates of three boxes, or one colour's difference
    assert largest(171) <= largest(19) + 171 * 3 and largest(171) <= 6 * 16 * 16


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _sizes(inner)


@pytest.mark.parametrize("beta", [25.0, 25.5, 100.0, -1.0])
def test_perturbations_beyond_the_reach_are_refused(beta):
    with pytest.raises(ValueError) as error:
        Palette(classes=19, **PUBLISHED, perturbation=beta)
    text = str(error.value)
    assert f"perturbation = {beta:g} grey levels was given" in text
    assert "less than 25 = s/2, half the spacing" in text and "codec config" in text


def test_white_as_a_neighbour_shortens_the_reach():
    # (250, 250, 250) is 5 from white in every channel: 75 / (2 * 15)
    assert Palette(classes=216, **PUBLISHED, decode_void=True).reach == 2.5
    with pytest.raises(ValueError, match=r"less than 2\.5 = the reach .*decode_void"):
        Palette(classes=216, **PUBLISHED, decode_void=True, perturbation=6.0)
    Palette(classes=216, **PUBLISHED, perturbation=6.0)


def test_wrong_fields_are_refused():
    for fields, text in (
        ({"classes": 0}, "classes = 0 was given; it must be at least 1"),
        ({"classes": 217, **PUBLISHED}, r"k = 6 .* k\^3 >= 217"),
        ({"classes": 19, "k": 6, "s": 51}, r"s = 51 .* s \(k - 1\) < 255, k = 6"),
        ({"classes": 19, "k": 0}, "k = 0"),
        ({"classes": 19, "table": "kronecker", "k": 6}, "left out with table"),
        ({"classes": 5000, "table": "kronecker"}, "at most 4096"),
        ({"classes": 19, "void": "masked", "decode_void": True}, "False with void"),
    ):
        with pytest.raises(ValueError, match=text):
            Palette(**fields)

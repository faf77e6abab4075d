"""Laws of training times: moments, what is shared, and independence of the other rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.transport.times import (
    Ends,
    Grouped,
    HighNoise,
    Independent,
    LogitNormal,
    Shared,
    Uniform,
)

ROWS = 20_000
STREAMS = ("image", "mask", "text")


def keys(rows=ROWS, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


@pytest.mark.parametrize(
    ("distribution", "mean", "variance"),
    [
        (Uniform(), 1 / 2, 1 / 12),
        (Uniform(low=0.2, high=0.5), 0.35, 0.09 / 12),
        (Uniform(steps=4), 5 / 8, 5 / 64),  # 1/4, 2/4, 3/4, 1
        (HighNoise(power=1.0), 2 / 3, 1 / 18),  # density 2 t
        (HighNoise(power=0.0), 1 / 2, 1 / 12),
        (LogitNormal(), 1 / 2, 0.0433),  # the variance by quadrature
        (Ends(clean=0.5, noise=0.1), 0.3, 0.1 + 0.4 / 3 - 0.3**2),
    ],
)
def test_moments(distribution, mean, variance):
    t = np.asarray(distribution(keys()), np.float64)
    assert t.min() >= 0 and t.max() <= 1
    # five standard errors of the mean; the variance's relative error is at most sqrt(2/N) = 1 %
    assert abs(t.mean() - mean) < 5 * np.sqrt(variance / ROWS)
    assert abs(t.var() / variance - 1) < 0.05


def test_stepped_times_are_the_knots():
    t = np.asarray(Uniform(steps=1000)(keys()))
    labels = np.round(t * 1000).astype(int)
    # XLA divides by a constant through its reciprocal: within one unit in the last place
    np.testing.assert_array_max_ulp(t, np.float32(labels / 1000), maxulp=1)
    assert labels.min() == 1 and labels.max() == 1000  # 20 draws per knot: all but surely reached


def test_logit_normal_moves_with_its_mean():
    low, high = (LogitNormal(mean=m)(keys()).mean() for m in (-1.0, 1.0))
    assert low < 0.35 and high > 0.65  # about 0.303 and 0.697


def test_ends_are_hit_exactly():
    t = np.asarray(Ends(clean=0.5, noise=0.1)(keys()))
    # five standard errors
    assert abs(np.mean(t == 0) - 0.5) < 5 * np.sqrt(0.25 / ROWS)
    assert abs(np.mean(t == 1) - 0.1) < 5 * np.sqrt(0.09 / ROWS)
    assert set(np.unique(Ends(clean=0.9, noise=0.1)(keys()))) == {0, 1}


def test_shared_gives_one_time():
    drawn = Shared().draw(keys(5), STREAMS)
    assert list(drawn) == list(STREAMS)
    for t in drawn.values():
        assert t.shape == (5,) and t.dtype == jnp.float32
        assert np.array_equal(t, drawn["image"])


def test_independent_times_are_uncorrelated():
    drawn = Independent().draw(keys(), STREAMS)
    correlations = np.corrcoef([np.asarray(t) for t in drawn.values()])
    off_diagonal = correlations[~np.eye(3, dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(ROWS)  # five standard errors


def test_groups_share_within_and_not_across():
    times = Grouped(groups=(("image", "mask"), ("text",)))
    drawn = times.draw(keys(), STREAMS)
    assert np.array_equal(drawn["image"], drawn["mask"])
    assert abs(np.corrcoef(drawn["image"], drawn["text"])[0, 1]) < 5 / np.sqrt(ROWS)
    assert list(times.draw(keys(3), ("text",))) == ["text"]
    own = Grouped(groups=times.groups, distributions={"text": Uniform(low=0.5)})
    mixed = own.draw(keys(), STREAMS)
    assert np.array_equal(mixed["image"], drawn["image"]) and mixed["text"].min() >= 0.5


@pytest.mark.parametrize(
    "times",
    [Shared(), Independent(), Grouped(groups=(("image",), ("mask", "text")))],
    ids=["shared", "independent", "grouped"],
)
def test_a_row_depends_on_its_own_key(times):
    many, few = times.draw(keys(6), STREAMS), times.draw(keys(6)[2:4], STREAMS)
    for name in STREAMS:
        assert np.array_equal(many[name][2:4], few[name])
        assert len(np.unique(many[name])) == 6


def test_an_independent_time_does_not_depend_on_the_other_streams():
    alone = Independent().draw(keys(4), ("mask",))
    assert np.array_equal(alone["mask"], Independent().draw(keys(4), STREAMS)["mask"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Uniform(low=0.5, high=0.2), "low=0.5, high=0.2"),
        (lambda: Uniform(steps=-1), "steps=-1"),
        (lambda: LogitNormal(std=0.0), "std=0.0"),
        (lambda: HighNoise(power=-2.0), "power=-2.0"),
        (lambda: Ends(clean=0.7, noise=0.4), "clean=0.7, noise=0.4"),
        (lambda: Grouped(groups=(("a",), ("a", "b"))), "twice: a"),
        (
            lambda: Grouped(groups=(("a", "b"),), distributions={"b": Uniform()}),
            "the first streams of groups are ['a']",
        ),
        (lambda: Grouped(groups=(("a",),)).draw(keys(1), ("a", "b")), "streams b are in none"),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError, match="`times") as refused:
        make()
    assert said in str(refused.value)

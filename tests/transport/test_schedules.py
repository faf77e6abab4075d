"""Laws of the schedules: identities between their methods, on the host and in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.transport.schedules import SCHEDULES, BetaLinear, Cosine, Linear, ScaledLinear

TIMES = np.linspace(0.003, 0.99, 57)  # inside every schedule's range and off its knots

schedules = pytest.mark.parametrize(
    "schedule",
    [*(c() for c in SCHEDULES.values()), Cosine(noise=3.0), Cosine(noise=0.5)],
    ids=[*SCHEDULES, "cosine-noise-3", "cosine-noise-half"],
)

# float64 identities: a few roundings of numbers of size 1, some amplified by 1/sigma(0.003) < 60
TIGHT = dict(rtol=1e-11, atol=1e-12)


@schedules
def test_weights_obey_their_identities(schedule):
    alpha, sigma = schedule.alpha(TIMES), schedule.sigma(TIMES)
    d_data, d_source = schedule.velocity_weights(TIMES)
    np.testing.assert_allclose(alpha * d_source - sigma * d_data, 1, **TIGHT)
    np.testing.assert_allclose(np.log(alpha), schedule.log_alpha(TIMES), **TIGHT)
    np.testing.assert_allclose(np.log(alpha / sigma), schedule.log_snr(TIMES), **TIGHT)
    assert np.all(np.diff(schedule.log_snr(TIMES)) < 0)


@schedules
def test_inverses(schedule):
    np.testing.assert_allclose(schedule.time_of(schedule.log_snr(TIMES)), TIMES, **TIGHT)
    np.testing.assert_allclose(schedule.time(schedule.label(TIMES)), TIMES, **TIGHT)


@schedules
def test_derivative_is_the_limit_of_differences(schedule):
    with jax.enable_x64(True):
        t = jnp.asarray(TIMES + 1.7e-5)  # off the knots, where the slope of scaled_linear jumps
        one = jnp.ones_like(t)
        want = [jax.jvp(f, (t,), (one,))[1] for f in (schedule.alpha, schedule.sigma)]
        for got, exact in zip(schedule.derivative(np.asarray(t)), want):
            np.testing.assert_allclose(got, exact, rtol=1e-9)  # autodiff, float64


@schedules
def test_jax_and_host_agree(schedule):
    t = jnp.asarray(TIMES, jnp.float32)
    for method in ("log_alpha", "alpha", "sigma", "log_snr", "label"):
        got, want = getattr(schedule, method)(t), getattr(schedule, method)(np.asarray(t))
        assert isinstance(got, jax.Array) and got.dtype == jnp.float32
        assert isinstance(want, np.ndarray) and want.dtype == np.float64
        # float32 rounding (6e-8) of t near knots, cancellation in sigma at the small times
        np.testing.assert_allclose(got, want, rtol=3e-4, atol=1e-6, err_msg=method)


@schedules
def test_ends(schedule):
    assert schedule.alpha(0.0) == 1
    assert schedule.sigma(0.0) == 0 and not np.signbit(schedule.sigma(0.0))
    assert schedule.log_snr(0.0) == np.inf
    assert np.isfinite(schedule.sigma(schedule.t_max))
    assert isinstance(schedule.alpha(0), np.float64)  # an int is a number too
    assert abs(schedule.time_of(np.inf)) < 1e-5  # scaled_linear reaches alpha = 1 at 5.5e-6


@schedules
def test_the_ends_are_finite_in_a_float32_program(schedule):
    # times that a jitted distribution gives: drawn, so that nothing is folded on the host
    ends = jnp.stack([jnp.zeros(3), jnp.ones(3)]).astype(jnp.float32)

    @jax.jit
    def weights(t):
        return schedule.alpha(t), schedule.sigma(t), schedule.velocity_weights(t)

    alpha, sigma, velocity = weights(ends)
    assert all(np.all(np.isfinite(y[1])) for y in (alpha, sigma, *velocity))
    assert np.all(np.abs(alpha[0] - 1) < 0.03) and np.all(sigma[0] < 0.03)
    assert np.all(alpha[1] < 0.1) and np.all(sigma[1] > 0.99)
    near = schedule.velocity_weights(np.array(0.9999))
    np.testing.assert_allclose([v[1, 0] for v in velocity], near, atol=0.01)


def test_noise_lowers_the_snr_of_the_cosine_alike_everywhere():
    plain, noisy = Cosine(), Cosine(noise=3.0)
    np.testing.assert_allclose(noisy.log_snr(TIMES), plain.log_snr(TIMES) - np.log(3.0), **TIGHT)


def test_scaled_linear_labels():
    uvit, diffusers = ScaledLinear(time_offset=1), ScaledLinear(time_offset=0)
    cumulative = np.cumprod(1 - uvit.betas)
    for label in (1, 500, 999):
        # the same alpha-bar has label n for U-ViT and n - 1 for diffusers
        t = uvit.time(label)
        assert diffusers.time(label - 1) == t
        assert uvit.label(t) == pytest.approx(label, abs=1e-9)
        assert diffusers.label(t) == pytest.approx(label - 1, abs=1e-9)
        assert uvit.alpha(t) ** 2 == pytest.approx(cumulative[label - 1], rel=1e-12)
    assert diffusers.label(0.0) == 0  # a clean stream: the smallest label, never -1
    assert uvit.label(0.0) == 0


def test_known_values_of_the_latent_diffusion_betas():
    schedule = ScaledLinear()
    # printed to five digits in our notes on the schedule
    assert schedule.alpha(1.0) == pytest.approx(0.06826, abs=5e-6)
    assert schedule.sigma(1.0) == pytest.approx(0.99767, abs=5e-6)
    assert schedule.log_snr(1.0) == pytest.approx(-2.682, abs=5e-4)
    assert schedule.log_snr(1e-3) == pytest.approx(3.535, abs=5e-4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ScaledLinear(beta_start=0.5, beta_end=0.1), "beta_start=0.5"),
        (lambda: ScaledLinear(steps=1), "steps=1"),
        (lambda: ScaledLinear(time_offset=2), "time_offset=2"),
        (lambda: BetaLinear(beta_min=3.0, beta_max=1.0), "beta_min=3.0"),
        (lambda: Cosine(t_max=1.0), "t_max=1.0"),
        (lambda: Cosine(noise=0.0), "noise=0.0"),
        (lambda: Linear(t_max=1.5), "t_max=1.5"),
    ],
)
def test_refusals_name_the_value_and_the_place(make, said):
    with pytest.raises(ValueError, match=r"change (it|them|steps|time_offset) in") as refused:
        make()
    assert said in str(refused.value)

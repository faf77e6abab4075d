"""Laws of processes: what is written can be read back, and velocity is the derivative of ``at``."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.transport.process import INVERSE, Process
from jointseg_jax.transport.schedules import SCHEDULES, Linear, ScaledLinear

SHAPE = (3, 2, 2, 4)
CASES = list(itertools.product(SCHEDULES, INVERSE, [1.0, 2.0]))


def make(schedule, predicts, scale=1.0):
    # noise predictions need some data at the start; see the refusal below
    knobs = {"t_max": 0.99} if (schedule, predicts) == ("linear", "noise") else {}
    return Process(schedule=SCHEDULES[schedule](**knobs), predicts=predicts, scale=scale)


def ends(process):
    keys = jax.random.split(jax.random.key(0), 6)
    data = jax.random.normal(keys[0], SHAPE, jnp.result_type(float))
    return data, process.source(keys[3:], data)


@pytest.mark.thorough_but(3)
@pytest.mark.parametrize(("schedule", "predicts", "scale"), CASES)
@pytest.mark.parametrize("t", [0.37, (0.02, 0.4, 0.97)], ids=["one time", "a time per row"])
def test_reading_a_target_gives_back_data_and_source(schedule, predicts, scale, t):
    with jax.enable_x64(True):
        process, t = make(schedule, predicts, scale), jnp.asarray(t)
        data, source = ends(process)
        x = process.interpolate(data, source, t)
        got = process.to_data_source(process.target(data, source, t), x, t)
        # float64 rounding, amplified by 1/alpha or 1/sigma, at most 200 here
        np.testing.assert_allclose(got[0], data, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(got[1], source, rtol=1e-10, atol=1e-12)
        assert np.array_equal(process.data(process.target(data, source, t), x, t), got[0])


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize(("schedule", "predicts", "scale"), CASES)
def test_velocity_is_the_time_derivative_of_at(schedule, predicts, scale):
    with jax.enable_x64(True):
        process, t = make(schedule, predicts, scale), jnp.asarray([0.0213, 0.4017, 0.9701])
        data, source = ends(process)
        x, want = jax.jvp(lambda t: process.interpolate(data, source, t), (t,), (jnp.ones_like(t),))
        got = process.velocity(process.target(data, source, t), x, t)
        # as above; beta_linear has derivatives of size 20
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_ends_of_at():
    process = Process(schedule=Linear(), predicts="velocity")
    data, source = ends(process)
    assert np.array_equal(process.interpolate(data, source, 0.0), data)
    assert np.array_equal(process.interpolate(data, source, 1.0), source)


def test_source_has_its_scale_and_rows_depend_on_their_own_key():
    process = Process(schedule=ScaledLinear(), scale=2.0)
    like = jnp.zeros((8, 64, 64))
    source = process.source(jax.random.split(jax.random.key(1), 8), like)
    # 32768 draws: the standard error of the deviation is 2 / sqrt(65536) = 0.008; 5 of them
    assert abs(float(source.std()) - 2) < 0.04
    assert abs(float(source.mean())) < 0.055  # 5 standard errors of 0.011
    some = jax.random.split(jax.random.key(1), 8)[3:5]
    assert np.array_equal(process.source(some, like[:2]), source[3:5])


def test_noise_target_has_unit_variance_whatever_the_scale():
    process = Process(schedule=ScaledLinear(), predicts="noise", scale=2.0)
    data, source = ends(process)
    assert np.array_equal(process.target(data, source, 0.5), source / 2)


def test_data_reading_is_finite_at_time_zero():
    for predicts in INVERSE:
        process = Process(schedule=ScaledLinear(), predicts=predicts)
        x = jnp.ones(SHAPE)
        want = 2 * x if predicts == "data" else x  # the state is the data; the network is not asked
        assert np.array_equal(process.data(2 * x, x, jnp.float32(0)), want)


def test_state_keeps_its_dtype_beside_a_narrow_output():
    process = Process(schedule=ScaledLinear())
    x = jnp.ones(SHAPE, jnp.float32)
    assert process.data(x.astype(jnp.bfloat16), x, 0.5).dtype == jnp.float32


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (dict(schedule=ScaledLinear(), predicts="eps"), "predicts='eps': must be one of noise"),
        (dict(schedule=ScaledLinear(), scale=0.0), "scale=0.0"),
        (dict(schedule=ScaledLinear(), scale=float("inf")), "scale=inf"),
        (dict(schedule=ScaledLinear(), clip=-1.0), "clip=-1.0"),
        (dict(schedule=Linear(), predicts="noise"), "says nothing about the data"),
    ],
)
def test_meaningless_processes_are_refused(knobs, said):
    with pytest.raises(ValueError, match="change `") as refused:
        Process(**knobs)
    assert said in str(refused.value)

"""Laws of loss weights: closed forms, and the loss of one prediction as that of another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.transport.loss_weight import (
    PREDICTIONS,
    UNIFORM,
    WEIGHTS,
    InverseSigma,
    LossOf,
    MinSNR,
)
from jointseg_jax.transport.process import INVERSE, Process
from jointseg_jax.transport.schedules import Cosine, Linear, ScaledLinear

SHAPE = (3, 2, 2, 4)
T = (0.02, 0.4, 0.9)
SCHEDULES = {"linear": Linear(t_max=0.99), "cosine": Cosine(), "scaled_linear": ScaledLinear()}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draws(process):
    """(data, source, an error), random."""
    keys = jax.random.split(jax.random.key(0), 9)
    data, error = (jax.random.normal(key, SHAPE, float) for key in keys[:2])
    return data, process.source(keys[2:5], data), error


def loss(process, output, target, t):
    """The mean square of each row, weighed."""
    return process.weigh(jnp.square(output - target).mean((1, 2, 3)), t)


def test_predictions_are_those_of_processes():
    assert set(PREDICTIONS) == set(INVERSE)


@pytest.mark.thorough_but(3)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("target", PREDICTIONS)
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_the_weighed_loss_is_that_of_a_network_that_predicts_the_target(
    name, predicts, target, scale
):
    """Two networks that see the same in a state: each one's error by its own prediction."""
    weight = LossOf(target=target, cap=1e9)
    process = Process(schedule=SCHEDULES[name], predicts=predicts, scale=scale, weight=weight)
    other = Process(schedule=SCHEDULES[name], predicts=target, scale=scale)
    (data, source, error), t = draws(process), jnp.asarray(T)
    truth = process.target(data, source, t)
    # what the erring network knows of data and source, said in the other prediction
    x = process.interpolate(data, source, t)
    believed = process.to_data_source(truth + error, x, t)
    got = loss(process, truth + error, truth, t)
    want = loss(other, other.target(*believed, t), other.target(data, source, t), t)
    np.testing.assert_allclose(got, want, rtol=1e-8)  # float64 rounding over sigma^2 = 4e-4


@pytest.mark.parametrize(
    ("predicts", "target", "ratio"),
    [
        ("data", "noise", lambda a, s, k: a / (s * k)),
        ("data", "velocity", lambda a, s, k: 1 / s),
        ("noise", "data", lambda a, s, k: s * k / a),
        ("noise", "velocity", lambda a, s, k: k / a),
        ("velocity", "data", lambda a, s, k: s),
        ("velocity", "noise", lambda a, s, k: a / k),
    ],
)
@pytest.mark.thorough_but(3)
@pytest.mark.parametrize("name", SCHEDULES)
def test_ratios_of_errors(name, predicts, target, ratio):
    process = Process(schedule=SCHEDULES[name], predicts=predicts, scale=2.0)
    t = jnp.asarray(T)
    want = ratio(process.schedule.alpha(t), process.schedule.sigma(t), 2.0)
    np.testing.assert_allclose(np.abs(process.error_ratio(target, t)), want, rtol=1e-10)


def test_inverse_sigma_is_the_inverse_of_the_noises_deviation_up_to_its_cap():
    def weights(scale):
        process = Process(schedule=Linear(), predicts="data", scale=scale)
        return InverseSigma(cap=5.0)(process, jnp.asarray([0.0, 0.05, 0.2, 0.25, 1.0]))

    # sigma = t: 1 / 0.2 is the cap
    np.testing.assert_allclose(weights(1.0), [5, 5, 5, 4, 1], rtol=1e-12)
    np.testing.assert_allclose(weights(2.0), [5, 5, 2.5, 2, 0.5], rtol=1e-12)


def test_min_snr_of_the_three_predictions():
    """min(SNR, gamma) over 1, SNR and SNR + 1 (variance preserving)."""
    t = jnp.asarray([0.05, 0.3, 0.6, 0.95])
    snr = (Cosine().alpha(t) / Cosine().sigma(t)) ** 2
    assert float(snr[0]) > 5 > float(snr[-1])
    for predicts, over in {"data": 1, "noise": snr, "velocity": snr + 1}.items():
        process = Process(schedule=Cosine(), predicts=predicts)
        want = np.minimum(snr, 5) / over
        np.testing.assert_allclose(MinSNR(gamma=5.0)(process, t), want, rtol=1e-10)


def test_weights_of_data_depend_on_the_noises_deviation_alone():
    """A straight line with scale 2 has the states of one whose sigma is twice as large."""

    class Wide(Linear):
        def sigma(self, t):
            return 2 * super().sigma(t)

    t = jnp.asarray(T)
    one = Process(schedule=Linear(), predicts="data", scale=2.0)
    other = Process(schedule=Wide(), predicts="data")
    for weight in (InverseSigma(), MinSNR(), LossOf(target="noise")):
        np.testing.assert_allclose(weight(one, t), weight(other, t), rtol=1e-12)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_weights_are_finite_at_the_clean_end(predicts):
    process = Process(schedule=SCHEDULES["linear"], predicts=predicts)
    others = [WEIGHTS[name]() for name in WEIGHTS if name != "loss_of"]
    for weight in (*others, *(LossOf(target=p) for p in PREDICTIONS)):
        assert np.all(np.isfinite(weight(process, jnp.float32([0.0, 1e-6, 0.99])))), weight


def test_uniform_leaves_the_program_as_it_is():
    process, squares, t = Process(schedule=Cosine()), jnp.ones(SHAPE), jnp.asarray(T)
    assert process.weight == UNIFORM
    assert process.weigh(squares, t) is squares


def test_rows_are_weighed_by_their_own_times():
    process = Process(schedule=Linear(), predicts="data", weight=InverseSigma(cap=4.0))
    squares = jnp.ones(SHAPE, jnp.float32)
    got = process.weigh(squares, jnp.asarray([0.1, 0.5, 1.0], jnp.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[:, 0, 0, 0], [4, 2, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: InverseSigma(cap=0.0), "inverse_sigma: cap=0.0"),
        (lambda: MinSNR(gamma=float("inf")), "min_snr: gamma=inf"),
        (lambda: LossOf(target="eps"), "target = 'eps'; it must be one of 'noise', 'data'"),
        (lambda: LossOf(target="noise", cap=-1.0), "loss_of: cap=-1.0"),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError, match=r"[Cc]hange it in the process's `weight`") as refused:
        make()
    assert said in str(refused.value)

"""Images and maps sampled together from a Gaussian whose joint flow is known.

1. Data: ``y = (image, map)`` with covariance ``C``, correlated; noise of standard deviations
   ``K = diag(1, kappa)``. State: ``y_t = alpha y + sigma K e``.
2. In ``u = K^-1 y`` the noise is the same in both, and ``C' = K^-1 C K^-1 = V diag(c) V^T``: each
   eigenvector flows alone, and keeps ``(V^T u)_i / sqrt(alpha^2 c_i + sigma^2)``.
3. Exact predictions: ``E[y | y_t] = alpha C (alpha^2 C + sigma^2 K^2)^-1 y_t``; the image is given
   as noise, the map as data. Both read the pair.

The published pseudo-code and released code of the joint solver add where the map's inner stages
must subtract (orders 2 and 3); ``flipped`` is that solver.

Source: PDM (arXiv 2412.02929) Alg. 2, eq. 5 and appendix A.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.transport.dpm import DPMSolverPP
from jointseg_jax.transport.integrator import integrate
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import ScaledLinear

SCHEDULE = ScaledLinear()
COVARIANCE = np.array([[1.0, 0.6], [0.6, 1.0]])

# What 50 calls from t = 1 to 1/1000 may leave of error in the matrix from noise to data, whose
# largest entry is about 1: twice what the discretisation leaves (order 1: 0.028; order 2: 0.003 at
# kappa 1 and 0.006 at 2; order 3: 0.005 and 0.008).
WITHIN = {1: 0.06, 2: 0.013, 3: 0.016}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def processes(kappa):
    return {
        "image": Process(schedule=SCHEDULE, predicts="noise"),
        "map": Process(schedule=SCHEDULE, predicts="data", scale=kappa),
    }


def exact_network(kappa):
    """What a perfect network answers."""
    noise = np.diag([1.0, kappa])
    streams = processes(kappa)

    def predict(x, t, step):
        y, t = jnp.stack([x["image"], x["map"]]), t["map"]
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        spread = jnp.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * noise**2)
        data = alpha * COVARIANCE @ spread @ y
        source = (y - alpha * data) / sigma
        return {
            name: process.target(data[i], source[i], t)
            for i, (name, process) in enumerate(streams.items())
        }

    return predict


def exact_flow(kappa, start, end):
    """The matrix that brings a state at ``start`` to ``end``."""
    scale = np.diag([1.0, kappa])
    values, vectors = np.linalg.eigh(np.linalg.inv(scale) @ COVARIANCE @ np.linalg.inv(scale))

    def spread(t):
        return np.sqrt(SCHEDULE.alpha(t) ** 2 * values + SCHEDULE.sigma(t) ** 2)

    shares = np.diag(spread(end) / spread(start))
    return scale @ vectors @ shares @ vectors.T @ np.linalg.inv(scale)


def flow_of(table, kappa):
    """The matrix that a solver applies: it is linear when the network is."""
    unit = {"image": jnp.array([1.0, 0.0]), "map": jnp.array([0.0, 1.0])}
    end = integrate(table, exact_network(kappa), processes(kappa), unit)
    return np.stack([end["image"], end["map"]])


def flipped(table):
    """The table with the sign of the map's inner updates turned; the image's are untouched."""
    inner = ~table.is_step_end & np.r_[True, table.is_step_end[:-1]]  # the first stage of each step
    columns = table.streams["map"]
    use = np.where(inner[:, None], -columns.coefs, columns.coefs)
    streams = table.streams | {"map": columns._replace(coefs=use)}
    return dataclasses.replace(table, streams=streams)


def error(flow, kappa):
    """The largest entry by which a solver's map from noise to data is off."""
    return float(np.abs(flow - exact_flow(kappa, 1.0, 1e-3)).max())


def table_of(kappa, order, **changes):
    method = {"method": "singlestep"} if order == 1 else {"method": "fast"}
    solver = DPMSolverPP(steps=50, order=order, **method | changes)
    return solver.table(processes(kappa))


@functools.cache
def flow_of_order(kappa, order):
    return flow_of(table_of(kappa, order), kappa)


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_the_closed_form_is_the_flow(kappa):
    """Four hundred steps of order 3 in the log-SNR end where the formula says."""
    solver = DPMSolverPP(steps=399, order=3, grid="log_snr")
    got = flow_of(solver.table(processes(kappa)), kappa)
    # the error falls with the third power of the steps: from 1e-4 at 50 to 2e-7
    np.testing.assert_allclose(got, exact_flow(kappa, 1.0, 1e-3), atol=1e-6)


@pytest.mark.parametrize("order", WITHIN)
@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_pairs_follow_the_joint_flow(kappa, order):
    assert error(flow_of_order(kappa, order), kappa) < WITHIN[order]


@pytest.mark.parametrize("order", WITHIN)
@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_samples_have_the_covariance_of_the_data(kappa, order):
    """From noise of the right deviations (1 and kappa) to the data's covariance."""
    flow = flow_of_order(kappa, order)
    got = flow @ np.diag([1.0, kappa**2]) @ flow.T
    # twice the error of each factor, and what the ends leave: at t = 1 the state is not all noise
    # (0.5 % of its variance is data), at t = 1/1000 it is not all data (0.1 %)
    np.testing.assert_allclose(got, COVARIANCE, atol=4 * WITHIN[order])


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_a_wrong_sign_in_the_inner_map_update_fails_by_far(kappa, order):
    wrong = flow_of(flipped(table_of(kappa, order)), kappa)
    assert error(wrong, kappa) > 30 * WITHIN[order]


@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_first_order_has_no_inner_update(kappa):
    table = table_of(kappa, 1)
    assert table.is_step_end.all()
    np.testing.assert_array_equal(flipped(table).streams["map"].coefs, table.streams["map"].coefs)


def test_a_start_of_the_wrong_deviation_is_seen_in_the_covariance():
    """The released sampler starts the map at deviation 1 of a network trained with 2."""
    flow = flow_of_order(2.0, 3)
    got = flow @ np.diag([1.0, 1.0]) @ flow.T
    assert abs(got[1, 1] - COVARIANCE[1, 1]) > 0.3

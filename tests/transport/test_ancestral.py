"""Laws of the ancestral solver: marginals, its relatives, and a Gaussian followed exactly."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.transport.ancestral import Ancestral, ancestral_row
from jointseg_jax.transport.discrete import DDIM
from jointseg_jax.transport.dpm import DPMSolverPP, point
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import BetaLinear, Cosine, Linear, ScaledLinear

SCHEDULES = {
    "scaled_linear": ScaledLinear(),
    "beta_linear": BetaLinear(),
    "cosine": Cosine(),
    "linear": Linear(),
}
SPANS = [(0.9, 0.7), (0.5, 0.49), (0.3, 0.01), (0.2, 0.0)]
X = jnp.linspace(-2, 2, 12, dtype=jnp.float32).reshape(3, 4)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def keys(rows=3):
    return jax.random.split(jax.random.key(0), rows)


def columns(solver, process):
    table = solver.table({"x": process})
    return table, table.streams["x"]


# --------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("span", [*SPANS, (1.0, 0.6)], ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_keeps_the_marginals(name, eta, span):
    """With D the true data, a state ``alpha_t D + sigma_t n`` becomes ``alpha_s D + sigma_s n``."""
    if name == "cosine":  # its alpha is rounding alone at t = 1
        span = (min(span[0], Cosine().t_max), span[1])
    at, to = (point(SCHEDULES[name], t) for t in span)
    row = ancestral_row(at, to, eta)
    tight = dict(rel=1e-10, abs=1e-12)
    assert row.x_coef * at.alpha + row.coefs[0] == pytest.approx(to.alpha, **tight)
    variance = (row.x_coef * at.sigma) ** 2 + row.noise_coef**2
    assert variance == pytest.approx(to.sigma**2, **tight)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("span", SPANS[:3], ids=str)
def test_the_noise_is_that_of_the_posterior(name, span):
    """Two Gaussian observations of x_s, given the data: their precisions add."""
    at, to = (point(SCHEDULES[name], t) for t in span)
    ratio = at.alpha / to.alpha
    forward = at.sigma**2 - (ratio * to.sigma) ** 2  # variance of x_t given x_s
    precision = 1 / to.sigma**2 + ratio**2 / forward
    assert ancestral_row(at, to, 1.0).noise_coef ** 2 == pytest.approx(1 / precision, rel=1e-9)
    # the mean, of x_t = 1 and D = 0
    assert ancestral_row(at, to, 1.0).x_coef == pytest.approx(ratio / forward / precision, rel=1e-9)


# ---------------------------------------------------------------------------- its relatives


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("grid", "end"), [("time_uniform", 0.0), ("time_quadratic", 0.0)])
def test_without_noise_it_is_first_order_dpm_solver_pp(name, grid, end):
    process = Process(schedule=SCHEDULES[name], predicts="data")
    knobs = {"steps": 9, "grid": grid, "end": end}
    table, got = columns(Ancestral(eta=0.0, **knobs), process)
    other, want = columns(DPMSolverPP(order=1, method="multistep", **knobs), process)
    assert not table.noisy
    np.testing.assert_array_equal(table.t_network, other.t_network)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_steps_may_be_equal_in_the_log_snr():
    solver = Ancestral(steps=8, grid="log_snr", start=0.9, end=0.02)
    table, _ = columns(solver, Process(schedule=Cosine()))
    lambdas = Cosine().log_snr(np.r_[table.t_network, table.t_next[-1]])
    np.testing.assert_allclose(np.diff(lambdas), (lambdas[-1] - lambdas[0]) / 8, rtol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_on_the_knots_of_scaled_linear_it_is_noisy_ddim(float64, eta):
    process = Process(schedule=ScaledLinear(), predicts="noise", scale=2.0)
    ours, discrete = Ancestral(steps=20, eta=eta), DDIM(steps=20, spacing="trailing", eta=eta)
    (table, got), (other, want) = columns(ours, process), columns(discrete, process)
    np.testing.assert_allclose(table.t_network, other.t_network, rtol=1e-12)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    answer = lambda x, t, step: {"x": jnp.tanh(x["x"])}  # noqa: E731
    runs = [
        solver(answer, {"x": process}, {"x": X.astype(float)}, keys=keys())["x"]
        for solver in (ours, discrete)
    ]
    np.testing.assert_allclose(*runs, rtol=1e-9)


# ------------------------------------------------------------------------------- a Gaussian


def end_of(flow, solver):
    """(mean, variance) where a solver ends, by its own runs on one draw at a time.

    An exact network of a Gaussian is affine, so the end is ``mean + sum_i c_i n_i`` over the start
    and the noise of each step: row 0 has none, row i has draw i alone.
    """
    process, draws = flow.process, 1 + solver.steps
    start = solver.time_range(process.schedule.t_max)[0]
    unit = jnp.eye(draws + 1, draws, k=-1)  # [1 + draws, draws]
    x = process.schedule.alpha(start) * flow.mean + flow.spread(start) * unit[:, :1]
    noise = lambda row, like: {"x": unit[:, 1 + row, None]}  # noqa: E731
    end = solver(flow.predict, {"x": process}, {"x": x}, noise=noise)["x"][:, 0]
    return float(end[0]), float(((end[1:] - end[0]) ** 2).sum())


def recursion(flow, solver):
    """(mean, variance) at the end, in closed form: the moments of ``x_s = c x + u D + v k n``."""
    process, kappa = flow.process, flow.process.scale
    alpha, sigma = process.schedule.alpha, process.schedule.sigma
    times = np.linspace(*solver.time_range(process.schedule.t_max), solver.steps + 1)
    mean, variance = alpha(times[0]) * flow.mean, flow.spread(times[0]) ** 2
    for t, s in itertools.pairwise(times):
        posterior = sigma(s) ** 2 * (1 - (alpha(t) * sigma(s) / (alpha(s) * sigma(t))) ** 2)
        spread = solver.eta**2 * posterior
        c = np.sqrt(sigma(s) ** 2 - spread) / sigma(t)
        u = alpha(s) - c * alpha(t)
        gain = alpha(t) * flow.std**2 / flow.spread(t) ** 2  # D = mean + gain (x - alpha mean)
        mean = c * mean + u * (flow.mean + gain * (mean - alpha(t) * flow.mean))
        variance = (c + u * gain) ** 2 * variance + spread * kappa**2
    return mean, variance


@pytest.mark.thorough_but(4)
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("kappa", [1.0, 2.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_moments_follow_the_closed_form(float64, gaussian, name, eta, kappa):
    predicts = "data" if name == "linear" else "noise"
    flow = gaussian(Process(schedule=SCHEDULES[name], predicts=predicts, scale=kappa))
    solver = Ancestral(steps=10, eta=eta, end=0.02)
    np.testing.assert_allclose(end_of(flow, solver), recursion(flow, solver), rtol=1e-8)


@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_the_closed_form_ends_at_the_datas_moments(gaussian, kappa):
    """To first order in the step; noise of the wrong deviation would leave an error."""
    flow = gaussian(Process(schedule=Cosine(), predicts="data", scale=kappa))
    errors = []
    for steps in (400, 800):
        mean, variance = recursion(flow, Ancestral(steps=steps, end=0.001))
        assert mean == pytest.approx(flow.process.schedule.alpha(0.001) * flow.mean, rel=1e-9)
        errors.append(variance - flow.spread(0.001) ** 2)
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize("name", SCHEDULES)
def test_data_at_a_point_give_the_marginals_at_every_step(float64, gaussian, name):
    """With the data known, every state has mean alpha D and deviation kappa sigma: exactly."""
    flow = gaussian(Process(schedule=SCHEDULES[name], predicts="data", scale=3.0), std=0.0)
    for end in (0.4, 0.05):
        mean, variance = end_of(flow, Ancestral(steps=6, end=end))
        assert mean == pytest.approx(flow.process.schedule.alpha(end) * flow.mean, rel=1e-10)
        assert variance == pytest.approx(flow.spread(end) ** 2, rel=1e-10)


def test_drawn_noise_has_the_deviation_of_the_source(gaussian):
    rows, end = 3000, 0.4
    flow = gaussian(Process(schedule=Linear(), predicts="data", scale=3.0), std=0.0)
    x = flow.process.source(jax.random.split(jax.random.key(1), rows), jnp.zeros((rows, 4)))
    solver = Ancestral(steps=3, end=end)
    state = solver(flow.predict, {"x": flow.process}, {"x": x}, keys=keys(rows))["x"]
    # 12,000 draws: the relative standard error of a deviation is 0.6 %
    assert float(state.std()) == pytest.approx(3.0 * end, rel=0.04)


# ----------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_last_step_returns_the_data_reading(name):
    process = Process(schedule=SCHEDULES[name], predicts="data")
    _, got = columns(Ancestral(steps=5), process)
    assert (got.x_coef[-1], got.coefs[-1, 0], got.noise_coef[-1]) == (0, 1, 0)
    assert (got.noise_coef[:-1] > 0).all()


def test_clip_bounds_the_data_readings():
    process = Process(schedule=Cosine(), predicts="data", clip=1.0)
    loud = lambda x, t, step: {"x": jnp.full_like(x["x"], 50.0)}  # noqa: E731
    end = Ancestral(steps=4)(loud, {"x": process}, {"x": X}, keys=keys())["x"]
    assert np.array_equal(end, jnp.ones_like(X))


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"eta": 1.1}, "ancestral: eta=1.1"),
        ({"grid": "karras"}, "grid = 'karras'; it must be one of 'time_uniform'"),
        ({"start": 0.2, "end": 0.5}, "it steps towards the data only"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_refusals(knobs, said):
    with pytest.raises(ValueError, match=r"[Cc]hange `solver\.") as refused:
        Ancestral(**{"steps": 3, **knobs})
    assert said in str(refused.value)


def test_a_clean_end_is_infinitely_far_in_the_log_snr():
    with pytest.raises(ValueError, match=r"solver: grid='log_snr' .* `solver.start` or `solver.en"):
        Ancestral(steps=3, grid="log_snr").table({"x": Process(schedule=Cosine())})

"""Laws of DPM-Solver(++): exactness, order of convergence, and the ends of the schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.transport.dpm import DPMSolverPP, fast_orders
from jointseg_jax.transport.integrator import integrate
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import BetaLinear, Cosine, Linear, ScaledLinear
from jointseg_jax.transport.solvers import Euler

SD = ScaledLinear()


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def solver(steps, order, **knobs):
    """A solver over ``steps`` updates, on the part of the time where the order shows."""
    knobs = {"method": "singlestep", "grid": "log_snr", "start": 0.9, "end": 0.02} | knobs
    calls = steps * order if knobs["method"] == "singlestep" else steps
    return DPMSolverPP(steps=calls, order=order, **knobs)


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize(
    ("order", "knobs"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (2, {"variant": "taylor"}),
        (3, {"variant": "taylor"}),
        (1, {"reading": "noise"}),
        (2, {"reading": "noise"}),
        (3, {"reading": "noise"}),
        (2, {"method": "multistep"}),
        (2, {"method": "multistep", "variant": "taylor"}),
    ],
)
@pytest.mark.parametrize("schedule", [SD, BetaLinear()], ids=["sd", "beta"])
def test_errors_fall_with_the_order(gaussian, schedule, order, knobs):
    flow = gaussian(Process(schedule=schedule, predicts="data"))
    errors = [flow.error(solver(n, order, **knobs)) for n in (64, 128)]
    # 2, 4, 8; at 64 steps the next order still takes up to 15 % of the third-order ratio
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_third_order_multistep_as_published_and_exact(gaussian):
    flow = gaussian(Process(schedule=SD, predicts="data"))
    published, exact = (
        [flow.error(solver(n, 3, method="multistep", curvature=c)) for n in (64, 128)]
        for c in ("published", "exact")
    )
    # half the curvature is missing: the ratio tends to 4 (4.3 here), not 8
    assert published[0] / published[1] == pytest.approx(4.3, rel=0.1)
    assert exact[0] / exact[1] > 7
    assert exact[1] < published[1] / 10


# How far the deviation of the samples may be off at 50 calls from t = 1 to 1/1000: twice what the
# discretisation leaves for data of deviation 1 (order 1: 5 and 3 %; 2: 1.2 and 0.4 %; 3: 1.5 and
# under 0.01 %, the larger at kappa 2).
WITHIN = {
    ("time_uniform", 1): 0.1,
    ("time_uniform", 2): 0.025,
    ("time_uniform", 3): 0.03,
    ("log_snr", 1): 0.06,
    ("log_snr", 2): 0.008,
    ("log_snr", 3): 0.0002,
}


def deviation(flow, table):
    """Samples' deviation at the end over the exact one, from 512 quantiles (of mean 0)."""
    quantiles = jax.scipy.stats.norm.ppf((jnp.arange(512) + 0.5) / 512)[:, None]
    start = flow.spread(1.0) * quantiles / quantiles.std()
    end = integrate(table, flow.predict, {"x": flow.process}, {"x": start})["x"]
    slope = jnp.sign(jnp.vdot(start, end))  # a flow that crosses itself is not saved by its width
    return float(slope * end.std()) / flow.spread(1e-3)


def standard(gaussian, kappa):
    return gaussian(Process(schedule=SD, predicts="data", scale=kappa), mean=0.0, std=1.0)


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize(("grid", "order"), WITHIN)
@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_samples_have_the_deviation_of_the_data(gaussian, grid, order, kappa):
    flow = standard(gaussian, kappa)
    table = DPMSolverPP(steps=50, order=order, grid=grid).table({"x": flow.process})
    assert abs(deviation(flow, table) - 1) < WITHIN[grid, order]


@pytest.mark.parametrize(("order", "known"), [(1, 0.9727), (3, 1.0047)])
def test_known_deviations_of_the_published_settings(gaussian, order, known):
    flow = standard(gaussian, 1.0)
    table = DPMSolverPP(steps=50, order=order).table({"x": flow.process})
    assert deviation(flow, table) == pytest.approx(known, abs=5e-5)  # four digits in our notes


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize(("grid", "order"), [k for k in WITHIN if k[1] > 1])
@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_the_deviation_exposes_a_wrong_sign_in_the_inner_update(gaussian, grid, order, kappa):
    """A map update that adds where it must subtract would fail the tests above by far."""
    flow = standard(gaussian, kappa)
    table = DPMSolverPP(steps=50, order=order, grid=grid).table({"x": flow.process})
    inner = ~table.is_step_end & np.r_[True, table.is_step_end[:-1]]  # the first stage of each step
    columns = table.streams["x"]
    use = np.where(inner[:, None], -columns.coefs, columns.coefs)
    wrong = dataclasses.replace(table, streams={"x": columns._replace(coefs=use)})
    assert abs(deviation(flow, wrong) - 1) > 10 * WITHIN[grid, order]


def test_scale_enters_through_the_start_alone():
    plain, scaled = (
        DPMSolverPP(steps=9).table({"x": Process(schedule=SD, predicts="data", scale=k)})
        for k in (1.0, 2.0)
    )
    for a, b in zip(plain.streams["x"], scaled.streams["x"]):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("predicts", ["data", "velocity"])
def test_first_order_on_the_linear_schedule_is_euler(gaussian, predicts):
    flow = gaussian(Process(schedule=Linear(), predicts=predicts))
    x = {"x": jnp.linspace(-2, 2, 6)[:, None]}
    processes = {"x": flow.process}
    for end in (0.0, 0.05):
        # a data reading at t = 0 is not needed by either: the last call is before it
        euler = Euler(steps=8, end=end)(flow.predict, processes, x)
        first = DPMSolverPP(steps=8, order=1, end=end)(flow.predict, processes, x)
        np.testing.assert_allclose(first["x"], euler["x"], rtol=1e-12, atol=1e-13)  # float64


def test_image_and_map_move_as_if_alone(gaussian):
    image = gaussian(Process(schedule=SD, predicts="noise"))
    labels = gaussian(Process(schedule=SD, predicts="data", scale=2.0), mean=-1.0)
    flows = {"image": image, "map": labels}
    x = jnp.linspace(-2, 2, 6)[:, None]

    def predict(x, t, step):
        return {k: f.predict({"x": x[k]}, {"x": t[k]}, step)["x"] for k, f in flows.items()}

    processes = {k: f.process for k, f in flows.items()}
    together = DPMSolverPP(steps=11)(predict, processes, dict.fromkeys(flows, x))
    for name, flow in flows.items():
        alone = DPMSolverPP(steps=11)(flow.predict, {"x": flow.process}, {"x": x})["x"]
        np.testing.assert_allclose(together[name], alone, rtol=1e-12, atol=1e-13)  # float64


def test_streams_of_different_schedules_share_a_grid_in_time(gaussian):
    flows = {
        "a": gaussian(Process(schedule=SD, predicts="data")),
        "b": gaussian(Process(schedule=BetaLinear(), predicts="noise")),
    }
    x = jnp.linspace(-2, 2, 6)[:, None]

    def predict(x, t, step):
        return {k: f.predict({"x": x[k]}, {"x": t[k]}, step)["x"] for k, f in flows.items()}

    processes = {k: f.process for k, f in flows.items()}
    for method in ("fast", "multistep"):
        chosen = DPMSolverPP(steps=10, method=method)
        together = chosen(predict, processes, dict.fromkeys(flows, x))
        for name, flow in flows.items():
            alone = chosen(flow.predict, {"x": flow.process}, {"x": x})["x"]
            np.testing.assert_allclose(together[name], alone, rtol=1e-12, atol=1e-13)
    for knobs in ({"method": "singlestep"}, {"grid": "log_snr"}):
        with pytest.raises(
            ValueError, match=r"solver: streams 'a' and 'b' have different schedules"
        ):
            DPMSolverPP(steps=9, **knobs).table(processes)


# ------------------------------------------------------------------- the ends of a schedule


@pytest.mark.parametrize("schedule", [SD, BetaLinear(), Linear()])
def test_a_first_order_step_to_the_clean_end_returns_the_data_reading(schedule):
    process = Process(schedule=schedule, predicts="data")
    answer = lambda x, t, step: {"x": jnp.tanh(x["x"])}  # noqa: E731
    x = {"x": jnp.linspace(-2, 2, 6)[:, None]}
    solver = DPMSolverPP(steps=1, order=1, end=0.0)
    # to the last bit but for tanh itself, which XLA may round otherwise inside a loop
    np.testing.assert_allclose(solver(answer, {"x": process}, x)["x"], jnp.tanh(x["x"]), rtol=1e-15)


def test_a_singular_end_is_refused_at_higher_order_or_lowered(gaussian):
    process = Process(schedule=Linear(), predicts="velocity")
    for knobs in (
        {"method": "fast"},
        {"method": "singlestep"},
        {"method": "multistep", "end": 0.0},
    ):
        with pytest.raises(ValueError, match=r"dpm_solver_pp: the step from .* infinite"):
            DPMSolverPP(steps=6, **knobs).table({"x": process})
    flow = gaussian(process)
    for method in ("fast", "singlestep", "multistep"):
        coarse, fine = (
            DPMSolverPP(steps=n, order=2, method=method, end=0.0, singular="lower")
            for n in (30, 60)
        )
        assert flow.error(fine) < flow.error(coarse) < 0.05


def test_log_snr_grid_needs_finite_ends():
    with pytest.raises(ValueError, match=r"grid='log_snr' from t=1 .* -inf") as refused:
        DPMSolverPP(steps=6, grid="log_snr").table(
            {"x": Process(schedule=Linear(), predicts="velocity")}
        )
    assert "grid='time_uniform'" in str(refused.value)


def test_noise_readings_need_data_in_the_state():
    process = Process(schedule=Linear(), predicts="velocity")
    with pytest.raises(ValueError, match="is not finite there"):
        DPMSolverPP(steps=4, order=1, reading="noise").table({"x": process})


# ------------------------------------------------------------------------------------ grids


def test_every_schedule_starts_at_its_own_end():
    for schedule in (SD, BetaLinear(), Cosine()):
        table = DPMSolverPP(steps=6).table({"x": Process(schedule=schedule)})
        assert table.t_network[0] == schedule.t_max
        assert table.t_next[-1] == pytest.approx(1e-3)


@pytest.mark.thorough_but(9)
@pytest.mark.parametrize("steps", range(1, 13))
@pytest.mark.parametrize("order", [1, 2, 3])
def test_fast_orders_spend_all_calls(steps, order):
    orders = fast_orders(steps, order)
    assert sum(orders) == steps
    assert orders == sorted(orders, reverse=True)
    assert max(orders) <= order
    assert order < 3 or orders[-1] < 3


@pytest.mark.parametrize("method", ["fast", "singlestep", "multistep"])
def test_as_many_calls_as_steps(method):
    table = DPMSolverPP(steps=12, order=3, method=method).table({"x": Process(schedule=SD)})
    assert len(table.t_network) == 12


def test_lower_order_final_ends_with_orders_two_and_one():
    process = {"x": Process(schedule=SD)}
    use = [
        DPMSolverPP(steps=6, method="multistep", lower_order_final=low)
        .table(process)
        .streams["x"]
        .coefs
        for low in (False, True)
    ]
    orders = [[int(np.count_nonzero(row)) for row in u] for u in use]
    assert orders == [[1, 2, 3, 3, 3, 3], [1, 2, 3, 3, 2, 1]]


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"order": 4}, "order = 4; it must be one of 1, 2, 3"),
        ({"method": "adaptive"}, "method = 'adaptive'; it must be one of 'fast'"),
        ({"grid": "logSNR"}, "grid = 'logSNR'; it must be one of 'time_uniform'"),
        ({"reading": "x0"}, "reading = 'x0'; it must be one of 'data', 'noise'"),
        ({"variant": "heun"}, "variant = 'heun'"),
        ({"curvature": "half"}, "curvature = 'half'"),
        ({"singular": "skip"}, "singular = 'skip'"),
        ({"method": "singlestep", "steps": 2}, "needs at least as many network calls"),
    ],
)
def test_refusals(knobs, said):
    with pytest.raises(ValueError, match=r"[Cc]hange `solver\.") as refused:
        DPMSolverPP(**{"steps": 6, **knobs})
    assert said in str(refused.value)

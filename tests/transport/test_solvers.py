"""Laws of the integrator, Euler and Heun."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.build import SOLVERS
from jointseg_jax.transport.dpm import DPMSolverPP
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import BetaLinear, Cosine, Linear, ScaledLinear
from jointseg_jax.transport.solvers import Euler, FixedStepSolver, Heun

FLOW = Process(schedule=Linear(), predicts="velocity")
NOISE = Process(schedule=ScaledLinear(), predicts="noise")
X = jnp.arange(12, dtype=jnp.float32).reshape(3, 4) / 6 - 1


def constant(velocity):
    return lambda x, t, step: {k: jnp.full_like(v, velocity) for k, v in x.items()}


def squash(x, t, step):
    return {k: jnp.tanh(v) for k, v in x.items()}


# ------------------------------------------------------------------------------ Euler, Heun


@pytest.mark.parametrize("solver", [Euler, Heun])
def test_there_and_back_again(solver):
    there = solver(steps=7, start=0.0, end=1.0)(constant(0.7), {"x": FLOW}, {"x": X})
    np.testing.assert_allclose(there["x"], X + 0.7, atol=1e-6)  # seven float32 roundings
    back = solver(steps=7, start=1.0, end=0.0)(constant(0.7), {"x": FLOW}, there)
    np.testing.assert_allclose(back["x"], X, atol=1e-6)


@pytest.mark.parametrize(("solver", "ratio"), [(Euler, 2), (Heun, 4)])
@pytest.mark.parametrize(("start", "end"), [(0.95, 0.05), (0.05, 0.95)])
def test_order_in_both_directions(gaussian, solver, ratio, start, end):
    with jax.enable_x64(True):
        flow = gaussian(FLOW)
        errors = [flow.error(solver(steps=n, start=start, end=end)) for n in (32, 64)]
        # the next order's share at 32 steps is under a tenth
        assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.1)


@pytest.mark.thorough
def test_euler_takes_any_prediction_and_schedule(gaussian):
    with jax.enable_x64(True):
        for schedule, predicts in itertools.product(
            [ScaledLinear(), BetaLinear(), Cosine(), Linear(t_max=0.99)],
            ["noise", "data", "velocity"],
        ):
            flow = gaussian(Process(schedule=schedule, predicts=predicts))
            # first order with derivatives up to 20 (beta_linear); a wrong reading errs by 0.1
            assert flow.error(Euler(steps=400, end=0.02)) < 0.02, (schedule, predicts)


# --------------------------------------------------------------------------- the integrator


def test_several_streams_follow_their_own_schedules():
    processes = {"a": FLOW, "b": NOISE}
    together = Euler(steps=5, end=0.1)(squash, processes, {"a": X, "b": 2 * X})
    for name, start in {"a": X, "b": 2 * X}.items():
        alone = Euler(steps=5, end=0.1)(squash, {name: processes[name]}, {name: start})
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-6)  # float32, fused anew


def test_given_streams_stay_bit_for_bit_and_are_seen_at_time_zero():
    seen = []

    def predict(x, t, step):
        seen.append((set(x), t["map"], t["image"]))
        return {"image": x["map"] + jnp.zeros_like(x["image"]) + t["map"], "map": x["map"]}

    given = {"map": X.at[0, 0].set(jnp.nan).at[1, 1].set(-0.0)}
    processes = {"image": FLOW, "map": FLOW}
    solver = Euler(steps=4)
    with jax.disable_jit():  # so that the times are numbers
        result = solver(predict, processes, {"image": X}, condition=given)
    assert [float(t) for _, t, _ in seen] == [0.0] * 4
    assert [float(t) for *_, t in seen] == [1.0, 0.75, 0.5, 0.25]
    assert all(names == {"image", "map"} for names, *_ in seen)
    assert result["map"] is given["map"]
    np.testing.assert_allclose(result["image"][2], X[2] - X[2], atol=1e-6)  # velocity is the map
    _, states = solver(predict, processes, {"image": X}, condition=given, trajectory=True)
    assert set(states) == {"image"}


@pytest.mark.parametrize("solver", [Euler(steps=3), Heun(steps=3), DPMSolverPP(steps=6)])
def test_trajectory_starts_with_the_start_and_ends_with_the_result(solver):
    process = FLOW if isinstance(solver, Euler | Heun) else NOISE
    result, states = solver(squash, {"x": process}, {"x": X}, trajectory=True)
    table = solver.table({"x": process})
    assert states["x"].shape == (1 + table.is_step_end.sum(), *X.shape)
    assert np.array_equal(states["x"][0], X)
    assert np.array_equal(states["x"][-1], result["x"])
    alone = solver(squash, {"x": process}, {"x": X})
    np.testing.assert_allclose(alone["x"], result["x"], rtol=1e-5, atol=1e-6)  # fused otherwise


def test_final_evaluation_is_the_data_reading_at_the_end():
    state = DPMSolverPP(steps=4, end=0.01)(squash, {"x": NOISE}, {"x": X})
    data = DPMSolverPP(steps=4, end=0.01, final="evaluate")(squash, {"x": NOISE}, {"x": X})
    want = NOISE.data(jnp.tanh(state["x"]), state["x"], 0.01)
    np.testing.assert_allclose(data["x"], want, rtol=1e-5, atol=1e-6)  # float32, fused anew
    assert not np.allclose(data["x"], state["x"])


def test_clip_bounds_the_data_readings():
    process = Process(schedule=ScaledLinear(), predicts="data", clip=1.0)
    loud = lambda x, t, step: {"x": jnp.full_like(x["x"], 50.0)}  # noqa: E731
    solver = DPMSolverPP(steps=4, order=1, end=0.0)
    assert np.array_equal(solver(loud, {"x": process}, {"x": X})["x"], jnp.ones_like(X))


def test_the_state_keeps_its_dtype():
    for dtype in (jnp.float32, jnp.bfloat16):
        result = Euler(steps=2)(squash, {"x": FLOW}, {"x": X.astype(dtype)})
        assert result["x"].dtype == dtype


# ------------------------------------------------------------------------ one network call


def count_calls(jaxpr, name):
    """How often a jitted function of this name is called in a program's text."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.params.get("name") == name
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                found += count_calls(inner.jaxpr, name)
    return found


@jax.jit
def the_network(x):
    return jnp.tanh(x)


def program(solver, process, **options):
    def predict(x, t, step):
        return {"x": the_network(x["x"])}

    def run(x, keys):
        return solver(predict, {"x": process}, {"x": x}, keys=keys, **options)

    return jax.make_jaxpr(run)(X, jax.random.split(jax.random.key(0), len(X)))


FIXED = [name for name, solver in SOLVERS.items() if issubclass(solver, FixedStepSolver)]


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("final", ["state", "evaluate"])
def test_the_network_is_called_in_one_place_whatever_the_steps(name, final):
    knobs = {"end": 0.01} if name == "heun" else {}
    knobs |= {"eta": 1.0} if name == "ddim" else {}
    sizes = []
    for steps in (6, 30):
        solver = SOLVERS[name](steps=steps, final=final, **knobs)
        for trajectory in (False, True):
            jaxpr = program(solver, NOISE, trajectory=trajectory)
            assert count_calls(jaxpr.jaxpr, "the_network") == 1
        sizes.append(len(str(jaxpr).splitlines()))
    assert sizes[0] == sizes[1]  # the program does not grow with the steps


def test_the_counter_counts():
    def twice(x):
        first = the_network(x)
        return jax.lax.scan(lambda c, _: (the_network(c), None), first, None, length=3)

    assert count_calls(jax.make_jaxpr(twice)(X).jaxpr, "the_network") == 2


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda: Euler(steps=0), "steps=0"),
        (lambda: Euler(steps=3, start=0.5, end=0.5), "two different times"),
        (lambda: Euler(steps=3, final="last"), "final = 'last'"),
        (lambda: Euler(steps=3)(squash, {}, {"x": X}), "lacking: ['x']"),
        (lambda: Euler(steps=3)(squash, {"x": FLOW}, {}), "got states []"),
        (lambda: Euler(steps=3)(squash, {"x": FLOW}, {"x": X}, condition={"x": X}), "both: ['x']"),
        (
            lambda: Euler(steps=3, start=1.0)(
                squash, {"x": Process(schedule=Cosine(), predicts="velocity")}, {"x": X}
            ),
            "t_max=0.9946",
        ),
        (
            lambda: Euler(steps=3)(lambda x, t, step: {"y": X}, {"x": FLOW}, {"x": X}),
            "must answer 'x' with shape (3, 4)",
        ),
        (lambda: Heun(steps=3)(squash, {"x": NOISE}, {"x": X}), "to t=0: a velocity reading"),
        (
            lambda: Euler(steps=3)(
                squash, {"x": Process(schedule=ScaledLinear(), clip=1.0)}, {"x": X}
            ),
            "clamps data readings",
        ),
    ],
)
def test_refusals(run, said):
    with pytest.raises(ValueError, match="solver") as refused:
        run()
    assert said in str(refused.value)

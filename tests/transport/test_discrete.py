"""Laws of DDIM, DDPM and the multistep sampler on labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.transport.discrete import DDIM, DDPM, MultistepDPM, ddim_row, ddpm_row, knot
from jointseg_jax.transport.dpm import DPMSolverPP, point, singlestep
from jointseg_jax.transport.integrator import Row, integrate, tabulate
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import Cosine, ScaledLinear

SD = ScaledLinear(time_offset=0)
PROCESS = {"x": Process(schedule=SD)}
PAIRS = [(999, 979), (500, 480), (20, 0), (19, -1), (0, -1)]
X = jnp.linspace(-2, 2, 12, dtype=jnp.float32).reshape(3, 4)


def row_keys(seed=0, rows=3):
    return jax.random.split(jax.random.key(seed), rows)


def tanh(x, t, step):
    return {"x": jnp.tanh(x["x"])}


@pytest.mark.thorough_but(6)
@pytest.mark.parametrize(("label", "previous"), PAIRS)
@pytest.mark.parametrize("kind", ["ddim 0", "ddim 0.5", "ddim 1", "fixed_small", "fixed_large"])
def test_a_step_keeps_the_marginals(kind, label, previous):
    """With D the true data, a state ``a D + s n`` becomes ``a' D + s' n``."""
    at, to = point(SD, knot(SD, label)), point(SD, knot(SD, previous))
    if kind.startswith("ddim"):
        row = ddim_row(at, to, float(kind.split()[1]))
    else:
        row = ddpm_row(SD, label, previous, kind)
    tight = dict(rel=1e-10, abs=1e-12)  # float64; sigma(label 0) = 0.03 amplifies
    assert row.x_coef * at.alpha + row.coefs[0] == pytest.approx(to.alpha, **tight)
    variance = (row.x_coef * at.sigma) ** 2 + row.noise_coef**2
    if kind != "fixed_large":
        assert variance == pytest.approx(to.sigma**2, **tight)
    elif label:
        assert variance > to.sigma**2  # too wide by design


@pytest.mark.parametrize(("label", "previous"), PAIRS)
def test_noisy_ddim_is_ddpm(label, previous):
    at, to = point(SD, knot(SD, label)), point(SD, knot(SD, previous))
    ddim, ddpm = ddim_row(at, to, 1.0), ddpm_row(SD, label, previous, "fixed_small")
    got = (ddim.x_coef, *ddim.coefs, ddim.noise_coef)
    np.testing.assert_allclose(
        got, (ddpm.x_coef, *ddpm.coefs, ddpm.noise_coef), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("label", "previous"), PAIRS)
def test_plain_ddim_is_first_order_dpm_solver_pp(label, previous):
    at, to = point(SD, knot(SD, label)), point(SD, knot(SD, previous))
    ddim, (dpm,) = ddim_row(at, to, 0.0), singlestep("data", "dpm_solver", [at, to])
    np.testing.assert_allclose((ddim.x_coef, *ddim.coefs), (dpm.x_coef, *dpm.coefs), rtol=1e-9)


def test_labels_of_the_spacings():
    def seen(solver):
        return np.round(SD.label(solver.table(PROCESS).t_network)).astype(int).tolist()

    assert seen(DDIM(steps=4, spacing="leading", steps_offset=1)) == [751, 501, 251, 1]
    assert seen(DDIM(steps=4, spacing="trailing")) == [999, 749, 499, 249]
    assert seen(DDIM(steps=4, spacing="linspace")) == [999, 666, 333, 0]
    assert seen(DDPM(steps=5)) == [800, 600, 400, 200, 0]
    assert seen(MultistepDPM(steps=4)) == [999, 749, 500, 250]
    assert seen(MultistepDPM(steps=4, spacing="leading")) == [800, 600, 400, 200]
    assert seen(MultistepDPM(steps=50))[:3] == [999, 979, 959]


def test_where_the_last_step_goes():
    assert DDIM(steps=4).table(PROCESS).t_next[-1] == 0
    assert DDIM(steps=4, set_alpha_to_one=False).table(PROCESS).t_next[-1] == 1e-3
    assert MultistepDPM(steps=4).table(PROCESS).t_next[-1] == 0
    assert MultistepDPM(steps=4, final_sigmas="sigma_min").table(PROCESS).t_next[-1] == 1e-3


def test_karras_steps_are_equal_in_the_seventh_root_of_sigma():
    solver = MultistepDPM(steps=12, karras=True)
    times = np.array([row.t for row in solver.rows(SD, 1.0)])
    roots = (SD.sigma(times) / SD.alpha(times)) ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), (roots[-1] - roots[0]) / 11, rtol=1e-9)
    np.testing.assert_allclose(times[[0, -1]], [1.0, 1e-3], rtol=1e-9)
    labels = SD.label(solver.table(PROCESS).t_network)
    np.testing.assert_allclose(labels, np.round(labels), atol=1e-9)  # the network sees knots
    assert np.abs(labels - SD.label(times)).max() <= 0.5


def orders(**knobs):
    rows = MultistepDPM(**knobs).rows(SD, 1.0)
    return [len(row.coefs) for row in rows]


def test_orders_rise_and_fall():
    assert orders(steps=6, order=3) == [1, 2, 3, 3, 2, 1]
    assert orders(steps=16, order=3) == [1, 2, *[3] * 13, 1]  # to sigma = 0: first order
    kept = {"final_sigmas": "sigma_min", "lower_order_final": False}
    assert orders(steps=6, order=3, **kept) == [1, 2, 3, 3, 3, 3]
    assert orders(steps=6, order=3, euler_at_final=True, **kept) == [1, 2, 3, 3, 3, 1]


# ------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize("solver", [DDIM(steps=5, eta=1.0), DDPM(steps=5)])
def test_noise_of_a_row_depends_on_its_own_key(solver):
    start = {"x": jnp.concatenate([X, X[:1]])}  # the last row starts as the first
    all_rows = solver(tanh, PROCESS, start, keys=row_keys(rows=4))["x"]
    some = solver(tanh, PROCESS, {"x": X[1:]}, keys=row_keys(rows=4)[1:3])["x"]
    np.testing.assert_allclose(all_rows[1:3], some, rtol=1e-5, atol=1e-6)  # fused otherwise
    assert not np.allclose(all_rows[0], all_rows[3])


def test_streams_draw_different_noise_and_steps_are_numbered():
    names = ("a", "b")
    processes = dict.fromkeys(names, PROCESS["x"])
    zeros = {name: jnp.zeros((2, 500)) for name in names}
    still = lambda x, t, step: zeros  # noqa: E731
    pure = tabulate({k: [Row(0.5, 0.5, 0.0, (0.0,), noise_coef=1.0)] for k in names}, processes)
    state = integrate(pure, still, processes, zeros, keys=row_keys(rows=2))
    samples = np.concatenate([state[name] for name in names])  # four rows, all unrelated
    off_diagonal = np.corrcoef(samples)[~np.eye(4, dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(500)  # five standard errors
    drawn = []
    with jax.disable_jit():
        DDPM(steps=4)(still, processes, zeros, noise=lambda row, like: drawn.append(row) or zeros)
    assert [int(row) for row in drawn] == [0, 1, 2, 3]


def test_steps_draw_different_noise():
    still = Row(0.5, 0.5, 1.0, (0.0,), noise_coef=1.0)
    table = tabulate({"x": [still] * 4}, PROCESS)
    end = integrate(table, tanh, PROCESS, {"x": jnp.zeros((2, 4000))}, keys=row_keys(rows=2))
    # four independent draws have deviation 2, equal ones 4; the standard error is 0.016
    assert float(end["x"].std()) == pytest.approx(2.0, abs=0.1)


def test_noise_needs_keys():
    with pytest.raises(ValueError, match="give `keys=`, one per row"):
        DDPM(steps=3)(tanh, PROCESS, {"x": X})
    DDIM(steps=3)(tanh, PROCESS, {"x": X})  # eta 0 draws nothing


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DDIM(steps=3, eta=1.5), "eta=1.5"),
        (lambda: DDIM(steps=0), "steps=0"),
        (lambda: DDIM(steps=3, spacing="even"), "spacing = 'even'; it must be one of 'linspace'"),
        (lambda: DDPM(steps=3, variance="learned"), "variance = 'learned'"),
        (
            lambda: MultistepDPM(steps=3, solver_type="dpm_solver"),
            "must be one of 'midpoint', 'heun'",
        ),
        (lambda: MultistepDPM(steps=3, algorithm="sde"), "algorithm = 'sde'"),
        (lambda: DDIM(steps=1001).table(PROCESS), "1000 labels, too few"),
        (lambda: DDIM(steps=1000, steps_offset=1).table(PROCESS), "the first label is 1000"),
        (
            lambda: DDPM(steps=3).table({"x": Process(schedule=Cosine())}),
            "DDPM steps on the knots of scaled_linear",
        ),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError, match=r"[Cc]hange") as refused:
        make()
    assert said in str(refused.value)


def test_labels_of_both_conventions_give_the_same_run():
    """A network that asks for alpha-bar, not for a label, cannot tell time_offset 0 from 1."""
    runs = []
    for offset in (0, 1):
        process = Process(schedule=ScaledLinear(time_offset=offset))
        for solver in (DDIM(steps=5), DPMSolverPP(steps=5)):
            runs.append(solver(tanh, {"x": process}, {"x": X})["x"])
    assert np.array_equal(runs[0], runs[2]) and np.array_equal(runs[1], runs[3])

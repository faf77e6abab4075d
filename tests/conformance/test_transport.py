"""Schedules and solvers against stored runs of the reference implementations, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.transport.dpm import DPMSolverPP
from jointseg_jax.transport.integrator import integrate
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import BetaLinear, Cosine, Linear, ScaledLinear
from jointseg_jax.transport.solvers import Euler

LABELS = 1000


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def report(case, checked):
    print(f"{case.name}: {checked} cases checked")
    assert checked, f"{case.name}: the fixture lists no case"


def eps_model(inputs, x, label):
    return jnp.tanh(x @ inputs["A"].T) + (inputs["b"] * (label / LABELS))[None]


def data_model(inputs, x, label):
    return 1.5 * jnp.tanh(x @ inputs["C"].T) + (inputs["d"] * (1 - label / LABELS))[None]


# ------------------------------------------------------------------------------ schedules


@pytest.mark.cases("noise_schedules*")
def test_noise_schedules(case):
    config, inputs, outputs = case.config, case.inputs, case.outputs
    betas = {k: config[k] for k in ("beta_start", "beta_end", "steps")}
    discrete = ScaledLinear(**betas)
    knots = np.arange(config["steps"] + 1) / config["steps"]
    log_alpha = discrete.log_alpha(knots)
    case.check("sd_betas", discrete.betas)
    case.check("uvit_cum_alphas", np.exp(2 * log_alpha))
    case.check("uvit_cum_betas", discrete.sigma(knots) ** 2)
    diffusers = ScaledLinear(**betas, time_offset=0)
    labels = np.arange(config["steps"])
    case.check("alphas_cumprod", diffusers.alpha(diffusers.time(labels)) ** 2)
    check_skips(case, outputs, log_alpha)
    schedules = {"discrete": discrete, "linear": BetaLinear(), "cosine": Cosine()}
    for name, schedule in schedules.items():
        t = inputs["t"][inputs["t"] <= schedule.t_max]
        for xp in (np.asarray, jnp.asarray):  # the host's path and JAX's
            case.check(f"{name}_log_alpha", schedule.log_alpha(xp(t)))
            case.check(f"{name}_sigma", schedule.sigma(xp(t)))
            case.check(f"{name}_lambda", schedule.log_snr(xp(t)))
            case.check(f"{name}_inverse_lambda", schedule.time_of(xp(inputs["lam"])))
    single = np.cumprod(1 - betas_in_float32(discrete), dtype=np.float32)
    # the reference itself in float32: a product of 1000 factors, each rounded
    np.testing.assert_allclose(outputs["alphas_cumprod_float32"], single, rtol=1e-4)
    report(case, len(schedules))


def betas_in_float32(schedule):
    return schedule.betas.astype(np.float32)


def check_skips(case, outputs, log_alpha):
    """Products of 1 - beta between two knots, and one less them."""
    size = outputs["uvit_skip_alphas_head"].shape[0]
    between = np.triu(2 * (log_alpha[None, :size] - log_alpha[:size, None]))
    case.check("uvit_skip_alphas_head", np.exp(between))
    case.check("uvit_skip_betas_head", -np.expm1(between))


# ----------------------------------------------------------- continuous-time DPM-Solver(++)


def dpm_solver(spec):
    grids = {"time_uniform": "time_uniform", "logSNR": "log_snr", "t2": "time_quadratic"}
    return DPMSolverPP(
        steps=spec["steps"],
        order=spec["order"],
        method=spec["method"],
        grid=grids[spec["skip"]],
        reading="data" if spec["predict_x0"] else "noise",
        variant=spec["solver_type"],
        end=spec["eps"],
    )


def dpm_process(spec):
    schedules = {"sd": ScaledLinear(), "linear": BetaLinear()}
    predicts = {"eps": "noise", "x0": "data"}
    return Process(schedule=schedules[spec["schedule"]], predicts=predicts[spec["model"]])


def check_times(case, name, table):
    """When the network was called, and from where to where each step went."""
    ends = table.reached[table.commit]
    case.check(f"{name}__t_to", ends)
    case.check(f"{name}__t_from", np.concatenate([table.times[:1], ends[:-1]]))
    if f"{name}__model_call_t" in case.outputs:
        case.check(f"{name}__model_call_t", table.times)


@pytest.mark.cases("dpm_solver_pp")
def test_dpm_solver(case):
    inputs = {k: jnp.asarray(v) for k, v in case.inputs.items()}
    models = {"eps": eps_model, "x0": data_model}
    for spec in case.config["cases"]:
        process, name = dpm_process(spec), spec["name"]

        def predict(x, t, step, spec=spec, process=process):
            return {"x": models[spec["model"]](inputs, x["x"], process.schedule.label(t["x"]))}

        solver, start = dpm_solver(spec), {"x": inputs["x_init"]}
        final, states = solver(predict, {"x": process}, start, trajectory=True)
        check_times(case, name, solver.table({"x": process}))
        case.check(f"{name}__xs", states["x"])
        case.check(f"{name}__final", final["x"])
    report(case, len(case.config["cases"]))


@pytest.mark.cases("dpm_solver_pp_joint")
def test_joint_dpm_solver(case):
    inputs = {k: jnp.asarray(v) for k, v in case.inputs.items()}
    start = {"image": inputs["x_init"], "map": inputs["map_init"]}

    def predict(x, t, step):
        both = jnp.concatenate([x["image"], x["map"]], axis=-1)
        image = {"A": inputs["A_image"], "b": inputs["b_image"]}
        labels = {"C": inputs["C_map"], "d": inputs["d_map"]}
        label = t["image"] * LABELS
        return {"image": eps_model(image, both, label), "map": data_model(labels, both, label)}

    for spec in case.config["cases"]:
        name, schedule = spec["name"], dpm_process(spec).schedule
        processes = {
            "image": Process(schedule=schedule, predicts="noise"),
            "map": Process(schedule=schedule, predicts="data", scale=case.config["map_std"]),
        }
        solver = dpm_solver(spec)
        final, states = solver(predict, processes, start, trajectory=True)
        check_times(case, name, solver.table(processes))
        for stream in start:
            case.check(f"{name}__xs_{stream}", states[stream])
            case.check(f"{name}__final_{stream}", final[stream])
    report(case, len(case.config["cases"]))


# ---------------------------------------------------------------------------- rectified flow


@pytest.mark.cases("semflow_sampler")
def test_semflow_sampler(case):
    inputs = {k: jnp.asarray(v) for k, v in case.inputs.items()}
    process = Process(schedule=Linear(), predicts="velocity")

    def predict(x, t, step):
        return {"x": eps_model(inputs, x["x"], process.schedule.label(t["x"]))}

    checked = 0
    for steps in case.config["steps"]:
        for direction, ends in {"image_to_mask": (0.0, 1.0), "mask_to_image": (1.0, 0.0)}.items():
            name = f"{direction}_{steps}"
            labels = case.outputs[f"{name}__timesteps"]
            table = Euler(steps=len(labels), start=ends[0], end=ends[1]).table({"x": process})
            if LABELS % steps == 0:
                # Euler's own times are the reference's integer labels
                np.testing.assert_allclose(process.schedule.label(table.times), labels, atol=1e-9)
            # where steps does not divide 1000 the reference shows the network rounded labels
            table = dataclasses.replace(table, times=labels / LABELS)
            start = {"x": inputs["x_init"]}
            final, states = integrate(table, predict, {"x": process}, start, trajectory=True)
            case.check(f"{name}__xs", states["x"])
            case.check(f"{name}__final", final["x"])
            checked += 1
    data, source = inputs["x_init"], inputs["z1"]
    case.check("interpolated", process.at(data, source, inputs["t"]))
    case.check("velocity_target", process.target(data, source, inputs["t"]))
    report(case, checked)

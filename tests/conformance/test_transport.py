"""Schedules and solvers against stored runs of the reference implementations, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.transport.discrete import DDIM, MultistepDPM, ddpm_row
from jointseg_jax.transport.dpm import DPMSolverPP
from jointseg_jax.transport.integrator import integrate, tabulate
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
    single = diffusers.alpha(diffusers.time(jnp.asarray(labels, jnp.float32))) ** 2
    assert single.dtype == jnp.float32
    # the reference multiplies up to 1000 factors in float32, each rounded by 6e-8
    np.testing.assert_allclose(single, outputs["alphas_cumprod_float32"], rtol=1e-4)
    report(case, len(schedules))


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
    ends = table.t_next[table.is_step_end]
    case.check(f"{name}__t_to", ends)
    case.check(f"{name}__t_from", np.concatenate([table.t_network[:1], ends[:-1]]))
    if f"{name}__model_call_t" in case.outputs:
        case.check(f"{name}__model_call_t", table.t_network)


@pytest.mark.cases("dpm_solver_pp*", "!dpm_solver_pp_joint*")
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


def joint_start_and_network(case, dtype):
    inputs = {k: jnp.asarray(v, dtype) for k, v in case.inputs.items()}
    image = {"A": inputs["A_image"], "b": inputs["b_image"]}
    labels = {"C": inputs["C_map"], "d": inputs["d_map"]}

    def predict(x, t, step):
        both, label = jnp.concatenate([x["image"], x["map"]], axis=-1), t["image"] * LABELS
        return {"image": eps_model(image, both, label), "map": data_model(labels, both, label)}

    return {"image": inputs["x_init"], "map": inputs["map_init"]}, predict


def joint_processes(case, spec):
    schedule = dpm_process(spec).schedule
    return {
        "image": Process(schedule=schedule, predicts="noise"),
        "map": Process(schedule=schedule, predicts="data", scale=float(case.config["map_std"])),
    }


@pytest.mark.cases("dpm_solver_pp_joint*")
def test_joint_dpm_solver(case):
    start, predict = joint_start_and_network(case, jnp.float64)
    for spec in case.config["cases"]:
        name, solver, processes = spec["name"], dpm_solver(spec), joint_processes(case, spec)
        final, states = solver(predict, processes, start, trajectory=True)
        check_times(case, name, solver.table(processes))
        for stream in start:
            case.check(f"{name}__xs_{stream}", states[stream])
            case.check(f"{name}__final_{stream}", final[stream])
    report(case, len(case.config["cases"]))


@pytest.mark.cases("dpm_solver_pp_joint*")
def test_joint_dpm_solver_in_float32(case):
    start, predict = joint_start_and_network(case, jnp.float32)
    cases = [spec for spec in case.config["cases"] if spec["method"] == "fast"]
    if not cases:
        pytest.skip(f"{case.name} lists no case of the method that is run in float32")
    for spec in cases:
        final = dpm_solver(spec)(predict, joint_processes(case, spec), start)
        for stream, got in final.items():
            want = case.outputs[f"{spec['name']}__final_{stream}"]
            assert got.dtype == jnp.float32
            # the reference's own float32 run is off by 4e-5
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    report(case, len(cases))


# ---------------------------------------------------------------------------- rectified flow


@pytest.mark.cases("semflow_sampler*")
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
            if LABELS % steps == 0 and len(labels) == steps:
                # Euler's own times are the reference's integer labels
                np.testing.assert_allclose(
                    process.schedule.label(table.t_network), labels, atol=1e-9
                )
            # where steps does not divide 1000 the reference shows the network rounded labels
            table = dataclasses.replace(table, t_network=labels / LABELS)
            start = {"x": inputs["x_init"]}
            final, states = integrate(table, predict, {"x": process}, start, trajectory=True)
            case.check(f"{name}__xs", states["x"])
            case.check(f"{name}__final", final["x"])
            checked += 1
    data, source = inputs["x_init"], inputs["z1"]
    case.check("interpolated", process.interpolate(data, source, inputs["t"]))
    case.check("velocity_target", process.target(data, source, inputs["t"]))
    report(case, checked)


# -------------------------------------------------------------------------------- diffusers

PREDICTIONS = {"epsilon": "noise", "sample": "data", "v_prediction": "velocity"}


def diffusers_process(prediction):
    """The stream's process, and the model the fixture used for such a prediction."""
    process = Process(schedule=ScaledLinear(time_offset=0), predicts=PREDICTIONS[prediction])
    return process, data_model if prediction == "sample" else eps_model


def answering(model, inputs, process):
    """A predict function with the labels of the process's schedule."""
    return lambda x, t, step: {"x": model(inputs, x["x"], process.schedule.label(t["x"]))}


def check_run(case, name, solver, prediction, inputs):
    process, model = diffusers_process(prediction)
    final, states = solver(
        answering(model, inputs, process),
        {"x": process},
        {"x": inputs["x_init"]},
        trajectory=True,
        noise=lambda row, like: {"x": inputs["noise"][row]},
    )
    table = solver.table({"x": process})
    np.testing.assert_allclose(
        process.schedule.label(table.t_network),
        case.outputs[f"{name}__timesteps"],
        atol=1e-9,  # whole numbers up to 999, through a division by 1000
    )
    case.check(f"{name}__xs", states["x"])
    case.check(f"{name}__final", final["x"])
    return process, table


@pytest.mark.cases("diffusers_samplers*")
def test_ddpm_steps(case):
    inputs = {k: jnp.asarray(v) for k, v in case.inputs.items()}
    for spec in case.config["ddpm"]:
        process, model = diffusers_process(spec["prediction_type"])
        schedule, name = process.schedule, spec["name"]
        previous = spec["t"] - schedule.steps // spec["n"]
        row = ddpm_row(schedule, spec["t"], previous, spec["variance_type"])
        table = tabulate({"x": [row]}, {"x": process})
        predict, start = answering(model, inputs, process), {"x": inputs["x_t"]}
        noise = lambda row, like: {"x": inputs["noise"][row]}  # noqa: E731
        after = integrate(table, predict, {"x": process}, start, noise=noise)
        case.check(f"{name}__prev", after["x"])
        output = model(inputs, inputs["x_t"], float(spec["t"]))
        case.check(f"{name}__x0", process.data(output, inputs["x_t"], row.t))
        assert case.outputs[f"{name}__prev_t"] == previous
    report(case, len(case.config["ddpm"]))


@pytest.mark.cases("diffusers_samplers*")
def test_ddim(case):
    inputs = {k: jnp.asarray(v) for k, v in case.inputs.items()}
    for spec in case.config["ddim"]:
        knobs = {k: spec[k] for k in ("set_alpha_to_one", "steps_offset", "spacing", "eta")}
        solver = DDIM(steps=spec["n"], **knobs)
        check_run(case, spec["name"], solver, spec["prediction_type"], inputs)
    report(case, len(case.config["ddim"]))


DIFFUSERS_NAMES = {
    "solver_order": "order",
    "timestep_spacing": "spacing",
    "steps_offset": "steps_offset",
    "solver_type": "solver_type",
    "final_sigmas_type": "final_sigmas",
    "algorithm_type": "algorithm",
    "use_karras_sigmas": "karras",
    "euler_at_final": "euler_at_final",
    "lower_order_final": "lower_order_final",
}


@pytest.mark.cases("diffusers_samplers*")
def test_multistep_dpm(case):
    inputs = {k: jnp.asarray(v) for k, v in case.inputs.items()}
    for spec in case.config["dpm"]:
        knobs = dict(spec["kw"])
        prediction = knobs.pop("prediction_type", "epsilon")
        solver = MultistepDPM(steps=spec["n"], **{DIFFUSERS_NAMES[k]: v for k, v in knobs.items()})
        process, table = check_run(case, spec["name"], solver, prediction, inputs)
        rows = solver.rows(process.schedule, 1.0)
        times = np.array([rows[0].t, *table.t_next])
        ratio = process.schedule.sigma(times) / process.schedule.alpha(times)
        case.check(f"{spec['name']}__sigmas", ratio)
    report(case, len(case.config["dpm"]))


@pytest.mark.cases("diffusers_samplers*")
def test_add_noise_and_velocity(case):
    inputs = {k: jnp.asarray(v) for k, v in case.inputs.items()}
    process, _ = diffusers_process("v_prediction")
    data, source = inputs["x_init"], inputs["noise"][1]
    for spec in case.config["add_noise"]:
        t = process.schedule.time(spec["t"])
        case.check(f"add_noise_{spec['t']}", process.interpolate(data, source, t))
        case.check(f"velocity_{spec['t']}", process.target(data, source, t))
    report(case, len(case.config["add_noise"]))

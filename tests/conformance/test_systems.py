"""Whole systems against reference runs: guided sampling and training losses of the U-ViT family.

Everything goes through ``Joint``. Only what a reference run fixes beforehand is put in its place:
the times of a training step, and every draw of noise (``Scripted``).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.codecs.pixels import Latents
from jointseg_jax.models.text import Features
from jointseg_jax.models.uvit import UViT
from jointseg_jax.rng import sample_keys
from jointseg_jax.systems.joint import TEXT_STREAM, Joint
from jointseg_jax.systems.system import Stream
from jointseg_jax.transport.discrete import MultistepDPM
from jointseg_jax.transport.dpm import DPMSolverPP
from jointseg_jax.transport.guidance import Branch, Guidance
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import ScaledLinear
from jointseg_jax.transport.times import Shared
from jointseg_jax.weights.architectures import uvit_fields
from jointseg_jax.weights.convert import to_ours
from jointseg_jax.weights.tables import layout_of, table

GRIDS = ("image", "mask")  # the streams that the references keep as [channels, height, width]
GRID_INPUTS = (
    *("z_init", "x0", "eps", "z", "z_noise", "image_latents", "label_latents"),
    *("noise_image", "noise_label", "joint_image_noise", "joint_label_noise"),
)
LAST = 1000  # the label that stands for pure noise


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


# --------------------------------------------------------------------- a system of a fixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scripted(Joint):
    """A joint system whose noise is given: where streams begin, and at each step for "no text"."""

    begin: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    fresh: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)

    def source(self, name, keys, step=None):
        return self.begin[name] if step is None else self.fresh[name][step]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts(Features):
    """Features whose empty prompt is given."""

    nothing: Any = None

    def empty(self, batch):
        return jnp.broadcast_to(self.nothing[None], (batch, self.length, self.width))


@dataclasses.dataclass(frozen=True)
class Labels:
    """Training times of given labels."""

    labels: Mapping[str, jax.Array]
    schedule: ScaledLinear

    def draw(self, keys, streams):
        return {name: self.schedule.time(self.labels[name].astype(jnp.float32)) for name in streams}


@dataclasses.dataclass
class Spy:
    """A denoiser that keeps what it was asked and what it answered."""

    module: UViT
    data_type: int | None = None
    calls: list = dataclasses.field(default_factory=list)
    estimated: tuple[str, ...] = ()

    def init(self, key, *inputs):
        return self.module.init(key, *inputs)

    def apply(self, variables, latents, times, text):
        rows = next(iter(latents.values())).shape[0]
        kind = None if self.data_type is None else jnp.full((rows,), self.data_type)
        outputs, taps = self.module.apply(variables, latents, times, text, data_type=kind)
        self.calls.append((latents, outputs))
        return outputs, taps


@dataclasses.dataclass
class Traced:
    """A solver that keeps the network it was given, its first answer, and all states."""

    solver: Any
    processes: Any = None
    predict: Any = None
    first: Any = None
    states: Any = None

    def __call__(self, predict, processes, x, *, keys=None, condition=None):
        self.processes, self.predict, condition = processes, predict, condition or {}
        t = jnp.float32(self.table.t_network[0])
        times = dict.fromkeys(x, t) | dict.fromkeys(condition, jnp.float32(0))
        self.first = predict({**x, **condition}, times, jnp.int32(0))
        final, states = self.solver(
            predict, processes, x, keys=keys, condition=condition, trajectory=True
        )
        self.states = {name: state[1:] for name, state in states.items()}  # [0] is the start
        return final

    @property
    def steps(self):
        return self.solver.steps

    @property
    def table(self):
        return self.solver.table(self.processes)


def guided(denoise, conditional, unconditional=()):
    """The guided network, as a solver calls it."""
    guidance = Guidance(conditional, unconditional)
    return lambda x, t, step: guidance.combine(denoise(*guidance.expand(x, t, step)), t)


def module_of(case):
    return UViT(**uvit_fields(layout_of(case.weights), case.config["model"]))


def params_of(case):
    ours = to_ours(case.weights, table(layout_of(case.weights), module_of(case)))
    return {"denoiser": jax.tree.map(jnp.asarray, ours)}


def system(case, schedule, *, guidance=1.0, **fields):
    """The joint system of a fixture's weights: every stream predicts its noise."""
    module = module_of(case)
    spy = Spy(module, case.config.get("data_type") if module.data_types else None)
    specs = dict(module.streams)
    streams = {
        name: Stream(
            field=name,
            codec=Latents(shape=spec.shape),
            process=Process(schedule=schedule, predicts="noise"),
            guidance=guidance,
        )
        for name, spec in specs.items()
    }
    words = specs.get(TEXT_STREAM)
    defaults = {
        "text": Features(width=words.width, length=words.count) if words else None,
        "times": Shared(),
        "solver": None,
        "size": (1, 1),  # every codec has a fixed shape
    }
    return Scripted(streams=streams, denoiser=spy, **(defaults | fields))


def arrays(case):
    """The fixture's inputs, channels last."""
    inputs = {k: jnp.asarray(v) for k, v in case.inputs.items()}
    return inputs | {k: jnp.moveaxis(inputs[k], -3, -1) for k in GRID_INPUTS if k in inputs}


def reference_layout(name, x):
    return np.moveaxis(np.asarray(x), -1, -3) if name in GRIDS else np.asarray(x)


def flat(streams, names, leading=1):
    """The named streams as one vector per row, as the references keep them."""
    parts = [reference_layout(n, streams[n]) for n in names]
    return np.concatenate([p.reshape(*p.shape[:leading], -1) for p in parts], axis=-1)


def rows_of(case):
    return sample_keys(0, jnp.arange(case.config["batch"]))


def check_all(case, got):
    """Every output of the fixture, and no other."""
    assert set(got) == set(case.outputs)
    for name, value in got.items():
        case.check(name, value)
    print(f"{case.name}: {len(got)} outputs checked")


# ------------------------------------------------------------------------------ U-ViT


@pytest.mark.cases("uvit_t2i_sampling*")
def test_uvit_sampling_and_loss(case):
    schedule, given, params = ScaledLinear(), arrays(case), params_of(case)
    context = given["context"]
    text = Prompts(width=context.shape[2], length=context.shape[1], nothing=given["empty_context"])
    steps, scale = case.config["steps"], float(case.config["scale"]) + 1
    solver = Traced(DPMSolverPP(steps=steps, order=3, method="fast", end=1e-3))
    build = functools.partial(system, case, schedule, text=text, text_drop=0.0)

    joint = build(guidance=scale, solver=solver, begin={"image": given["z_init"]})
    asked = [name for name in case.outputs if name.startswith("guided_at_t")]

    @jax.jit
    def sample(params):
        joint.generate(params, {}, context, rows_of(case))
        times = {n: jnp.float32(schedule.time(float(n.removeprefix("guided_at_t")))) for n in asked}
        start = {"image": given["z_init"]}
        answers = {n: solver.predict(start, {"image": t}, jnp.int32(0)) for n, t in times.items()}
        return solver.states["image"], {n: a["image"] for n, a in answers.items()}

    @jax.jit
    def loss(params, clean, noise, label, context):
        """A batch of one row: its loss, and what the network saw."""
        row = build(times=Labels({"image": label}, schedule), begin={"image": noise})
        batch = {"image": clean, "text": context}
        total, _ = row.loss(params, {}, batch, sample_keys(0, jnp.arange(1)))
        return total[None], row.denoiser.calls[0][0]["image"]

    xs, answers = jax.tree.map(functools.partial(reference_layout, "image"), sample(params))
    one_by_one = zip(*(rows[:, None] for rows in (given["x0"], given["eps"], given["n"], context)))
    losses, noised = zip(*(loss(params, *row) for row in one_by_one))
    times = solver.table
    check_all(
        case,
        {"xs": xs, "final": xs[-1], **answers}
        | {"t_to": times.t_next[times.is_step_end], "model_call_t": times.t_network}
        | {"loss_per_sample": np.concatenate(losses)}
        | {"xn": reference_layout("image", np.concatenate(noised))},
    )


# ------------------------------------------------------------------------ UniDiffuser


@pytest.mark.cases("unidiffuser_guidance*")
def test_unidiffuser_guidance(case):
    schedule, given, scale = ScaledLinear(), arrays(case), float(case.config["scale"]) + 1
    joint, params = system(case, schedule), params_of(case)
    state = {"image": given["z"], "clip": given["clip_img"], "text": given["text"]}
    noise = {n: given[f"{k}_noise"] for n, k in NAMES.items()}
    nothing = jnp.broadcast_to(given["empty_text"][None], given["text"].shape)
    t, clean = schedule.time(given["timesteps"]), jnp.zeros_like(given["timesteps"])
    last = schedule.time(float(LAST))
    no_text = Branch(latents={"text": noise["text"]}, times={"text": last})
    no_image = Branch(latents={n: noise[n] for n in PICTURE}, times=dict.fromkeys(PICTURE, last))
    empty_text = Branch(latents={"text": nothing})
    picture, words = dict.fromkeys(PICTURE, scale), {"text": scale}

    def ask(unconditional, *, image=t, text=t, conditional=None):
        @jax.jit
        def answer(params):
            denoise = functools.partial(joint.denoise, params)
            times = {"image": image, "clip": image, "text": text}
            predict = guided(denoise, conditional or Branch(), unconditional)
            return predict(state, times, jnp.int32(0))

        return answer(params)

    modes = {
        "t2i_true_uncond": (PICTURE, ask([(no_text, picture)], text=clean)),
        "t2i_empty_token": (PICTURE, ask([(empty_text, picture)], text=clean)),
        "i2t": (("text",), ask([(no_image, words)], image=clean)),
        "joint": ((*PICTURE, "text"), ask([(no_image, words), (no_text, picture)])),
        "i": (PICTURE, ask([], conditional=no_text)),
        "t": (("text",), ask([], conditional=no_image)),
    }
    got = {mode: flat(answer, names) for mode, (names, answer) in modes.items()}
    got |= {mode: got[mode].reshape(given["text"].shape) for mode in ("i2t", "t")}
    check_all(case, got)


PICTURE = ("image", "clip")
NAMES = {"image": "z", "clip": "clip_img", "text": "text"}


# ------------------------------------------------------------------------ JoDiffusion

PAIR = ("image", "clip", "mask")  # what shares one time, in the order of the reference's vectors
EVERYTHING = ("text", *PAIR)
REFERENCE = {"image": "image", "clip": "clip", "mask": "label", "text": "text"}


def clean_streams(given):
    names = {"image": "image_latents", "clip": "image_embeds", "mask": "label_latents"}
    return {n: given[k] for n, k in (names | {"text": "prompt_embeds"}).items()}


def report(mode, times, first, states, names):
    """What a sampling run is checked against, under the reference's names."""
    finals = {f"{mode}_final_{REFERENCE[n]}": reference_layout(n, states[n][-1]) for n in names}
    return finals | {
        f"{mode}_first_noise_pred": flat(first, names),
        f"{mode}_xs": flat(states, names, leading=2),
        f"{mode}_timesteps": ScaledLinear(time_offset=0).label(times.t_network),
    }


@pytest.mark.cases("jodiffusion_sampling*")
def test_jodiffusion_sampling(case):
    schedule, given, params = ScaledLinear(time_offset=0), arrays(case), params_of(case)
    start, last = clean_streams(given), schedule.time(float(LAST))
    scale = max(float(case.config["guidance_scale"]), 1.0)  # the reference's g <= 1 is off
    solver = MultistepDPM(steps=case.config["steps"], order=3)
    joint = system(
        case,
        schedule,
        guidance=scale,
        solver=Traced(solver),
        unconditional_time=last,
        begin={n: start[n] for n in PAIR},
        fresh={"text": given["uncond_text_noise"]},
    )
    noise = {n: given[f"joint_{REFERENCE[n]}_noise"] for n in PAIR}
    no_text = Branch(latents={"text": given["uncond_text_noise"].__getitem__}, times={"text": last})
    no_pair = Branch(
        latents={n: noise[n].__getitem__ for n in PAIR}, times=dict.fromkeys(PAIR, last)
    )
    unconditional = [(no_text, dict.fromkeys(PAIR, scale)), (no_pair, {"text": scale})]
    joint_mode, processes = Traced(solver), {n: s.process for n, s in joint.streams.items()}

    @jax.jit
    def sample(params):
        joint.generate(params, {}, start["text"], rows_of(case))
        predict = guided(functools.partial(joint.denoise, params), Branch(), unconditional)
        joint_mode(predict, processes, start | {"text": given["joint_text_init"]})
        return [(run.first, run.states) for run in (joint.solver, joint_mode)]

    text2img, joint_mode_run = sample(params)
    times = solver.table(processes)
    check_all(
        case,
        report("text2img", times, *text2img, PAIR)
        | report("joint", times, *joint_mode_run, EVERYTHING),
    )


@pytest.mark.cases("jodiffusion_training_loss*")
def test_jodiffusion_loss(case):
    schedule, given, params = ScaledLinear(time_offset=0), arrays(case), params_of(case)
    labels = dict.fromkeys(PAIR, given["t_image"]) | {"text": given["t_text"]}
    build = functools.partial(
        system,
        case,
        schedule,
        weights="elements",
        times=Labels(labels, schedule),
        begin={n: given[f"noise_{REFERENCE[n]}"] for n in EVERYTHING},
    )
    got = {}
    for mode, names in {"image_only": PAIR, "joint": EVERYTHING}.items():
        joint = build(known=() if mode == "joint" else (TEXT_STREAM,))

        @jax.jit
        def run(params, joint=joint):
            loss, _ = joint.loss(params, {}, clean_streams(given), rows_of(case))
            return loss, *joint.denoiser.calls[0]

        loss, latents, outputs = run(params)
        for name in names:
            got[f"noised_{REFERENCE[name]}"] = reference_layout(name, latents[name])
        got |= {f"loss_{mode}": loss, f"pred_{mode}": flat(outputs, names)}
    check_all(case, got)

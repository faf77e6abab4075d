"""Joint systems: what a row depends on, how streams are weighed, what the network is shown."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.codecs.bits import Bits, PanopticBits
from jointseg_jax.codecs.pixels import Latents, Pixels
from jointseg_jax.models.embed import Patches, Tokens
from jointseg_jax.models.text import Features, Words
from jointseg_jax.models.uvit import UViT
from jointseg_jax.rng import fold, sample_keys
from jointseg_jax.systems.joint import Joint
from jointseg_jax.systems.system import Stream
from jointseg_jax.transport.ancestral import Ancestral
from jointseg_jax.transport.discrete import MultistepDPM
from jointseg_jax.transport.dpm import DPMSolverPP
from jointseg_jax.transport.loss_weight import InverseSigma
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import Cosine, ScaledLinear
from jointseg_jax.transport.times import Grouped, Shared

SIDE, CLASSES, WORDS, WIDTH = 8, 5, 3, 4

# float32: the same sums in another order, or compiled into another program
REORDERED = 1e-5


class Mixer(nn.Module):
    """The smallest denoiser: each output sees every stream, every time and the text."""

    estimated = ()
    log: Any = None

    @nn.compact
    def __call__(self, latents, times, text=None):
        if self.log is not None:
            self.log((latents, times, text))
        seen = [z.reshape(z.shape[0], -1, z.shape[-1]).mean(1) for z in latents.values()]
        seen += [t[:, None] / 1000 for t in times.values()]
        seen += [] if text is None else [text.mean(1)]
        mixed = nn.tanh(nn.Dense(8, name="mix")(jnp.concatenate(seen, axis=-1)))
        out = {}
        for name, z in latents.items():
            shared = nn.Dense(z.shape[-1], name=f"{name}_shared")(mixed)
            shared = shared.reshape(z.shape[0], *(1,) * (z.ndim - 2), -1)
            out[name] = nn.Dense(z.shape[-1], name=name)(z) + shared
        return out, {}


class Echo(nn.Module):
    """Says that the image is the mask's first channels, plus the mask's time label."""

    estimated = ()

    @nn.compact
    def __call__(self, latents, times, text=None):
        self.param("unused", nn.initializers.zeros, (1,))
        mask = latents["mask"]
        image = mask[..., :3] + times["mask"].reshape(-1, 1, 1, 1)
        return {"image": image, "mask": mask}, {}


class Counter(nn.Module):
    """Says that the image's data is its estimate and c more; the mask has no estimate."""

    estimated = ("image",)

    @nn.compact
    def __call__(self, latents, times, text=None, *, estimates=None):
        c = self.param("c", nn.initializers.constant(1 / 8), ())
        known = jnp.zeros_like(latents["image"]) if estimates is None else estimates["image"]
        return {"image": known + c, "mask": latents["mask"]}, {}


@dataclasses.dataclass
class Asks:
    """In place of a solver: asks the network at given steps, without integrating."""

    steps: tuple[int, ...] = (0,)
    start: Any = None
    answers: list = dataclasses.field(default_factory=list)

    def __call__(self, predict, processes, x, *, keys, condition):
        self.start = x
        times = dict.fromkeys(x, jnp.float32(0.5)) | dict.fromkeys(condition, jnp.float32(0))
        self.answers += [predict({**x, **condition}, times, jnp.int32(i)) for i in self.steps]
        return {**x, **condition}


def context(*, image=(), mask=(), **changes):
    """Image and label bits; words as context of the network."""
    cosine = Cosine()
    image = {"process": Process(schedule=cosine, predicts="velocity"), **dict(image)}
    mask = {"process": Process(schedule=cosine, predicts="data", scale=2.0), **dict(mask)}
    fields = {
        "streams": {
            "image": Stream(field="image", codec=Pixels(), **image),
            "mask": Stream(field="labels", codec=Bits(classes=CLASSES), **mask),
        },
        "denoiser": Mixer(),
        "times": Shared(),
        "solver": DPMSolverPP(steps=3, order=2, method="multistep"),
        "size": (SIDE, SIDE),
        "text": Words(vocabulary_size=7, width=WIDTH, length=WORDS),
    }
    return Joint(**(fields | changes))


def text_stream(*, guidance=1.0, **changes):
    """The same pair with the words' features as a stream of their own; noise predictions."""
    process = Process(schedule=ScaledLinear(time_offset=0), predicts="noise")
    image = {"process": process, "guidance": guidance}
    words = Words(vocabulary_size=7, width=WIDTH, length=WORDS, trainable=False)
    codec = Latents(shape=(WORDS, WIDTH))
    joint = context(image=image, mask=image, text=words)
    fields = {
        "streams": {"text": Stream(field="text", codec=codec, process=process), **joint.streams},
        "times": Grouped(groups=(("image", "mask"), ("text",))),
        "solver": MultistepDPM(steps=3),
    }
    return dataclasses.replace(joint, **(fields | changes))


SYSTEMS = {"context": context, "text_stream": text_stream}


def asked(make, kind, text):
    """The guided answers of a system's network to one question."""

    @jax.jit
    def answers(params):
        joint = make(solver=Asks())
        joint.generate(params, {}, text, keys())
        return joint.solver.answers

    return answers(params_of(kind))


def batch(rows=4, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
        "image": rng.integers(0, 256, (rows, SIDE, SIDE, 3), dtype=np.uint8),
        "labels": rng.integers(-1, CLASSES, (rows, SIDE, SIDE), dtype=np.int16),
        "text": rng.integers(1, 7, (rows, WORDS), dtype=np.int32),
    }
    return {k: jnp.asarray(v) for k, v in arrays.items()}


def keys(rows=4):
    return sample_keys(0, jnp.arange(rows))


def only(i, tree):
    """A batch of row ``i`` four times: a mean over it is that row's, in the same program."""
    return jax.tree.map(lambda x: x[jnp.full(4, i)], tree)


@functools.cache
def params_of(kind):
    return jax.jit(SYSTEMS[kind]().init)(jax.random.key(0))


def close(got, want, **tolerance):
    tolerance = {"rtol": REORDERED, "atol": REORDERED} | tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


def same_pairs(got, want):
    """Equal up to float32 rounding before the readings of pixels and bits."""
    assert got["image"].dtype == jnp.uint8
    levels = np.abs(got["image"].astype(int) - want["image"].astype(int))
    assert levels.max() <= 1  # a pixel within rounding of the border between two grey levels
    # a bit within rounding of its threshold falls on either side; independent maps differ in 4/5
    assert np.mean(got["labels"] != want["labels"]) <= 0.02
    assert np.mean(np.abs(got["confidence"] - want["confidence"]) > 1e-3) <= 0.02


# ------------------------------------------------------------------------------- rows


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("kind", SYSTEMS)
def test_a_rows_loss_depends_on_its_own_key_only(kind):
    joint, rows = SYSTEMS[kind](), batch()
    loss = jax.jit(joint.loss)
    _, together = loss(params_of(kind), {}, rows, keys())
    alone = [loss(params_of(kind), {}, only(i, rows), only(i, keys()))[1] for i in range(4)]
    mean = jax.tree.map(lambda *terms: sum(terms) / 4, *alone)
    close(together, mean)
    assert len({float(a["loss"]) for a in alone}) == 4


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("kind", SYSTEMS)
def test_a_sample_depends_on_its_own_key_only(kind):
    guidance = {"guidance": 2.0} if kind == "text_stream" else {"image": {"guidance": 2.0}}
    joint, text = SYSTEMS[kind](**guidance), batch()["text"]
    generate = jax.jit(joint.generate)
    together = generate(params_of(kind), {}, text, keys())
    beside_others = jnp.array([0, 11, 2, 13])
    other = generate(params_of(kind), {}, text[beside_others % 4], sample_keys(0, beside_others))
    for name, values in together.items():
        np.testing.assert_array_equal(values[0::2], other[name][0::2])
        assert (values[1::2] != other[name][1::2]).any()
    assert np.mean(together["labels"][0] != together["labels"][1]) > 0.1


@pytest.mark.thorough
def test_a_sample_is_the_same_alone():
    joint, text = context(image={"guidance": 2.0}), batch()["text"]
    generate = jax.jit(joint.generate)
    together = generate(params_of("context"), {}, text, keys())
    alone = [
        generate(params_of("context"), {}, text[i : i + 1], keys()[i : i + 1]) for i in range(4)
    ]
    same_pairs(together, jax.tree.map(lambda *rows: jnp.concatenate(rows), *alone))


# ---------------------------------------------------------------------------- weights


def test_element_weights_are_one_mean_over_the_concatenated_vector():
    process = Process(schedule=Cosine(), predicts="data")
    joint = context(image={"process": process}, mask={"process": process}, weights="elements")
    silent = jax.tree.map(jnp.zeros_like, params_of("context"))  # the network says 0
    loss, _ = jax.jit(joint.loss)(silent, {}, batch(), keys())
    clean = joint.encode(silent, {}, batch(), keys())
    assert clean["image"].size == clean["mask"].size  # 3 channels and 3 bits ...
    both = np.concatenate([np.ravel(z) for z in clean.values()])
    close(loss, np.mean(both**2))  # ... so the text stream below is what tells sizes apart


@pytest.mark.thorough
def test_element_weights_follow_the_sizes_and_leave_out_weight_zero():
    joint = text_stream(weights="elements")
    sizes = {"text": WORDS * WIDTH, "image": SIDE * SIDE * 3, "mask": SIDE * SIDE * 3}
    loss, terms = jax.jit(joint.loss)(params_of("text_stream"), {}, batch(), keys())
    close(loss, sum(sizes[k] * terms["loss/" + k] for k in sizes) / sum(sizes.values()))

    unweighed = dataclasses.replace(joint.streams["mask"], weight=0.0)
    joint = dataclasses.replace(joint, streams={**joint.streams, "mask": unweighed})
    loss, terms = jax.jit(joint.loss)(params_of("text_stream"), {}, batch(), keys())
    sizes.pop("mask")
    close(loss, sum(sizes[k] * terms["loss/" + k] for k in sizes) / sum(sizes.values()))


def test_explicit_weights_multiply_each_streams_mean():
    joint = context(image={"weight": 0.5}, mask={"weight": 3.0})
    loss, terms = jax.jit(joint.loss)(params_of("context"), {}, batch(), keys())
    close(loss, 0.5 * terms["loss/image"] + 3.0 * terms["loss/mask"])
    close(terms["loss"], loss)


def test_a_process_weighs_each_row_by_its_time():
    weight = InverseSigma(cap=3.0)
    process = Process(schedule=Cosine(), predicts="data", scale=2.0, weight=weight)
    params, rows = params_of("context"), batch()
    plain, weighed = jax.jit(context().loss), jax.jit(context(mask={"process": process}).loss)
    _, terms = weighed(params, {}, rows, keys())
    alone = [plain(params, {}, only(i, rows), only(i, keys()))[1] for i in range(4)]
    t = context().times.draw(fold(keys(), "time"), ("image", "mask"))["mask"]
    weights = np.minimum(1 / (2 * Cosine().sigma(t)), 3)  # the noise's deviation is 2 sigma
    assert np.ptp(weights) > 0.1
    close(terms["loss/mask"], np.mean([w * a["loss/mask"] for w, a in zip(weights, alone)]))
    close(terms["loss/image"], np.mean([a["loss/image"] for a in alone]))
    close(terms["loss"], terms["loss/image"] + terms["loss/mask"])


# ------------------------------------------------------------------------------- text


def test_dropped_text_is_the_empty_prompt():
    empty = batch() | {"text": jnp.zeros((4, WORDS), jnp.int32)}
    params = params_of("context")

    def loss(rows, drop):
        return jax.jit(context(text_drop=drop).loss)(params, {}, rows, keys())[0]

    close(loss(batch(), 0.999_999), loss(empty, 0.0))
    assert abs(loss(batch(), 0.0) - loss(empty, 0.0)) > 100 * REORDERED


def test_text_is_dropped_at_its_rate_and_by_the_rows_own_key():
    seen, rows = [], 512
    text = Features(width=WIDTH, length=WORDS)
    joint = context(text=text, text_drop=0.5, denoiser=Mixer(log=seen.append))
    many = batch(rows) | {"text": jnp.ones((rows, WORDS, WIDTH))}

    @jax.jit
    def dropped(keys):
        joint.loss(params_of("context"), {}, many, keys)
        return (seen.pop()[2] == 0).all((1, 2))

    once = dropped(keys(rows))
    assert abs(np.mean(once) - 0.5) < 4 * 0.5 / rows**0.5  # four standard deviations
    np.testing.assert_array_equal(dropped(keys(rows)[::-1]), once[::-1])


@pytest.mark.thorough
def test_no_text_is_the_empty_prompt():
    for kind, make in SYSTEMS.items():
        none, empty = (asked(make, kind, t) for t in (None, jnp.zeros((4, WORDS), jnp.int32)))
        close(none, empty)


# ----------------------------------------------------------------------- known streams


@pytest.mark.parametrize("guidance", [1.0, 2.0])  # of equal answers to both branches
def test_sampling_hands_each_call_the_data_of_the_one_before(guidance):
    process = Process(schedule=Cosine(), predicts="data")
    joint = context(
        image={"process": process, "guidance": guidance},
        denoiser=Counter(),
        solver=Ancestral(steps=4),
    )
    params = joint.init(jax.random.key(0))
    made = jax.jit(joint.generate)(params, {}, batch()["text"], keys())
    # the step to t = 0 returns the data reading, to which each of four calls added 1/8
    np.testing.assert_array_equal(made["image"], round(255 * (1 + 0.5) / 2))


@pytest.mark.parametrize("rows", [4, 5])
def test_training_shows_every_second_row_its_own_first_answer(rows):
    joint = context(
        image={"process": Process(schedule=Cosine(), predicts="data")},
        mask={"weight": 0.0},
        denoiser=Counter(),
    )
    params, given = joint.init(jax.random.key(0)), batch(rows)
    loss = jax.jit(jax.value_and_grad(joint.loss, has_aux=True))
    (total, _), slope = loss(params, {}, given, keys(rows))
    clean = np.asarray(joint.encode(params, {}, given, keys(rows))["image"])
    # rows 0, 2, ..: 1/8 of the first call and 1/8 more; the others 1/8
    answers = np.where(np.arange(rows) % 2 == 0, 2 / 8, 1 / 8)[:, None, None, None]
    np.testing.assert_allclose(total, np.mean((answers - clean) ** 2), rtol=1e-5)
    # the first call is held constant: the slope counts the second one alone
    want = np.mean(2 * (answers - clean))
    np.testing.assert_allclose(slope["denoiser"]["c"], want, rtol=1e-4, atol=1e-6)


def test_known_streams_are_seen_clean_at_time_zero_and_not_trained():
    seen = []
    joint = text_stream(known=("text",), denoiser=Mixer(log=seen.append))
    params = params_of("text_stream")

    @jax.jit
    def run(params):
        _, terms = joint.loss(params, {}, batch(), keys())
        return terms, seen.pop()[:2], joint.encode(params, {}, batch(), keys())

    terms, (latents, labels), clean = run(params)
    np.testing.assert_array_equal(latents["text"], clean["text"])
    np.testing.assert_array_equal(labels["text"], 0)
    assert (labels["image"] > 0).all() and not np.allclose(latents["image"], clean["image"])
    assert set(terms) == {"loss", "loss/image", "loss/mask"}


def test_given_labels_come_back_and_are_seen_clean_at_time_zero():
    """The image is read from one more evaluation, where it echoes what the mask then was."""
    process = Process(schedule=Cosine(), predicts="data")
    solver = DPMSolverPP(steps=3, order=2, method="multistep", final="evaluate")
    joint = context(image={"process": process}, denoiser=Echo(), solver=solver)
    params = {"denoiser": {"unused": jnp.zeros(1)}, "text": params_of("context")["text"]}
    given = {"labels": batch()["labels"]}
    out = jax.jit(joint.generate)(params, {}, batch()["text"], keys(), condition=given)
    np.testing.assert_array_equal(out["labels"], given["labels"])
    corners = joint.streams["mask"].codec.encode({}, given["labels"])
    np.testing.assert_array_equal(out["image"], np.where(corners > 0, 255, 0))


def test_given_must_name_fields_and_hold_what_training_held():
    generate = functools.partial(context().generate, params_of("context"), {}, None, keys())
    with pytest.raises(ValueError, match="given has masks and the streams' fields are image, lab"):
        generate(condition={"masks": batch()["labels"]})
    joint = context(known=("mask",))
    with pytest.raises(ValueError, match="trained to see labels, and given has nothing"):
        joint.generate(params_of("context"), {}, None, keys())


# ---------------------------------------------------------------------------- guidance


@pytest.mark.parametrize(
    ("image", "mask", "given", "rows"),
    [(1.0, 1.0, False, 4), (2.0, 1.0, False, 8), (1.0, 2.0, False, 8), (1.0, 2.0, True, 4)],
)
def test_the_network_is_asked_twice_only_where_a_free_stream_is_guided(image, mask, given, rows):
    seen = []
    joint = context(
        image={"guidance": image}, mask={"guidance": mask}, denoiser=Mixer(log=seen.append)
    )
    given = {"labels": batch()["labels"]} if given else None
    call = functools.partial(joint.generate, condition=given)
    jax.eval_shape(call, params_of("context"), {}, batch()["text"], keys())
    assert {z.shape[0] for latents, _, _ in seen for z in latents.values()} == {rows}


def test_guidance_scales_what_the_prompt_adds_to_each_stream():
    def answer(image, mask, text):
        scales = {"image": {"guidance": image}, "mask": {"guidance": mask}}
        return asked(functools.partial(context, **scales), "context", text)[0]

    with_text, without = answer(1.0, 1.0, batch()["text"]), answer(1.0, 1.0, None)
    guided = answer(3.0, 1.0, batch()["text"])
    close(guided["image"], without["image"] + 3 * (with_text["image"] - without["image"]))
    close(guided["mask"], with_text["mask"])
    assert np.abs(with_text["image"] - without["image"]).max() > 100 * REORDERED


@pytest.mark.parametrize(("interval", "inside"), [([0, 0.4], False), ((0.4, 0.6), True)])
def test_guidance_holds_in_its_interval(interval, inside):
    """The network is asked at time 0.5."""

    def answer(**image):
        return asked(functools.partial(context, image=image), "context", batch()["text"])[0]

    want = answer(guidance=3.0) if inside else answer()
    close(answer(guidance=3.0, guidance_interval=interval), want)


@pytest.mark.thorough
@pytest.mark.parametrize(("time", "label"), [(1.0, 999), (1.001, 1000)])
def test_a_text_stream_is_silenced_by_fresh_noise_at_every_step(time, label):
    seen = []
    joint = text_stream(
        guidance=2.0,
        unconditional_time=time,
        denoiser=Mixer(log=seen.append),
        solver=Asks(steps=(0, 0, 1)),
    )

    @jax.jit
    def calls(params):
        joint.generate(params, {}, batch()["text"], keys())
        return [call[:2] for call in seen]

    features, noise = joint.text.features({}, batch()["text"]), []
    for latents, labels in calls(params_of("text_stream")):
        np.testing.assert_array_equal(latents["text"][0::2], features)
        np.testing.assert_array_equal(labels["text"][0::2], 0)
        # 1000 t - 1 in float32 at t near 1 is good to 1000 x 6e-8
        np.testing.assert_allclose(labels["text"][1::2], label, atol=1e-4)
        np.testing.assert_array_equal(latents["image"][0::2], latents["image"][1::2])
        noise.append(np.asarray(latents["text"][1::2]))
    np.testing.assert_array_equal(noise[0], noise[1])
    draws = np.concatenate([noise[0], noise[2]]).reshape(8, -1)
    # eight independent vectors of 12 normal numbers: the mean square of all has sd 0.14
    assert abs(np.mean(draws**2) - 1) < 0.6
    between = np.corrcoef(draws) - np.eye(8)
    assert np.abs(between).max() < 0.95


# ------------------------------------------------------------------------ the rest


def small_uvit():
    patches = {"grid": (SIDE, SIDE), "channels": 3, "patch": 4}
    return UViT(
        streams={"image": Patches(conv=True, **patches), "mask": Patches(tanh=True, **patches)},
        time_tokens=("image", "mask"),
        context=Tokens(count=WORDS, width=WIDTH),
        width=16,
        depth=2,
        heads=2,
        data_types=2,
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    "joint", [context(denoiser=small_uvit()), text_stream()], ids=["context", "text_stream"]
)
def test_the_gradient_reaches_every_parameter(joint):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(joint.init, jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.1, s.shape), s.dtype), shapes)
    gradient = jax.jit(jax.grad(lambda p: joint.loss(p, {}, batch(), keys())[0]))(params)
    still = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradient)
        if not (np.isfinite(g).all() and np.any(g))
    ]
    assert not still
    assert ("text" in params) == ("text" not in joint.streams)  # a text stream's features stay


def test_generation_starts_at_the_processes_own_scale():
    def start(scale):
        process = Process(schedule=Cosine(), predicts="data", scale=scale)

        @jax.jit
        def begin(params):
            joint = context(mask={"process": process}, solver=Asks(steps=()))
            joint.generate(params, {}, None, keys())
            return joint.solver.start

        return begin(params_of("context"))

    unit, double = start(1.0), start(2.0)
    np.testing.assert_array_equal(double["mask"], 2 * unit["mask"])
    np.testing.assert_array_equal(double["image"], unit["image"])
    assert abs(np.std(double["mask"]) - 2) < 0.2  # 768 draws: the sd of their std is 0.05


@pytest.mark.parametrize("kind", SYSTEMS)
def test_previews_are_pairs_a_person_can_look_at(kind):
    joint = SYSTEMS[kind]()
    shown = jax.eval_shape(joint.preview, params_of(kind), {}, batch(), keys())
    size = (4, SIDE, SIDE)
    assert {k: (v.shape, v.dtype.name) for k, v in shown.items()} == {
        "image": ((*size, 3), "uint8"),
        "labels": (size, "int32"),
        "confidence": (size, "float32"),
    }


@pytest.mark.thorough
def test_panoptic_streams_give_labels_and_segments():
    mask = Stream(
        field="panoptic",
        codec=PanopticBits(classes=CLASSES, instance_bits=2),
        process=Process(schedule=Cosine(), predicts="data"),
    )
    joint = context()
    joint = dataclasses.replace(joint, streams={**joint.streams, "mask": mask}, known=("mask",))
    labels = batch()["labels"]
    values = jnp.stack([labels, (labels + 1) % 4], axis=-1)
    params = jax.jit(joint.init)(jax.random.key(0))
    shown = jax.jit(joint.preview)(params, {}, batch() | {"panoptic": values}, keys())
    assert {k: v.dtype.name for k, v in shown.items()} == {
        "image": "uint8",
        "labels": "int32",
        "segments": "int32",
        "confidence": "float32",
    }
    np.testing.assert_array_equal(shown["labels"], labels)
    np.testing.assert_array_equal(shown["segments"], (labels + 1) % 4)


def test_previews_give_the_maps_that_the_network_needs():
    joint = context(known=("mask",))
    shown = jax.jit(joint.preview)(params_of("context"), {}, batch(), keys())
    np.testing.assert_array_equal(shown["labels"], batch()["labels"])


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (context, {"weights": "sum"}, "weights='sum': must be one of explicit, elements"),
        (context, {"text_drop": 1.0}, r"text_drop=1.0: must lie in \[0, 1\)"),
        (context, {"text_drop": -0.1}, r"text_drop=-0.1: must lie in \[0, 1\)"),
        (context, {"known": ("map",)}, "known names map and the streams are image, mask"),
        (context, {"known": ("image", "mask")}, "every stream is known or has weight 0"),
        (
            context,
            {"image": {"weight": 0.0}, "mask": {"weight": 0.0}},
            "every stream is known or has weight 0",
        ),
        (text_stream, {"text": None}, "a `text` stream needs the encoder"),
        (
            context,
            {"text": None, "image": {"guidance": 2.0}},
            "image ask for guidance and there is no text",
        ),
        (context, {"image": {"weight": -1.0}}, "stream 'image': weight=-1.0, guidance=1.0: must"),
        (context, {"mask": {"guidance": -1.0}}, "stream 'labels': weight=1.0, guidance=-1.0: must"),
        (
            context,
            {"image": {"guidance_interval": (0.5, 0.2)}},
            r"stream 'image': guidance_interval=\(0.5, 0.2\): give two times \(low, high\)",
        ),
    ],
)
def test_mistakes_are_named_when_the_system_is_made(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)

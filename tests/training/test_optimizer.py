"""Schedules at named steps, rules over paths, and what Muon takes as a matrix."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jointseg_jax import rules
from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.models.uvit import UViT
from jointseg_jax.systems.text import Words
from jointseg_jax.training.optimizer import (
    DECAY_ALL,
    MATRICES,
    OPTIMIZERS,
    SCHEDULES,
    AdamW,
    Muon,
)
from jointseg_jax.types import UserError

LR = 0.5
ROUNDING = 1e-5  # float32, a handful of operations
CONSTANT = {"name": "constant", "lr": LR}
PARAMS = {
    "body": {"kernel": jnp.full((4, 2), 3.0), "bias": jnp.full((2,), 3.0)},
    "head": {"kernel": jnp.full((2, 4), 3.0), "scale": jnp.full((4,), 3.0)},
}


def step(optimizer, grads, params=PARAMS, steps=100):
    """The first update and the optimizer's state after it."""
    transform = optimizer.build(steps)
    return jax.jit(transform.update)(grads, transform.init(params), params)


def gradient(params=PARAMS, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)


def zeros(params=PARAMS):
    return jax.tree.map(jnp.zeros_like, params)


def close(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=ROUNDING, atol=ROUNDING), got, want
    )


# --------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("name", "fields", "at"),
    [
        ("constant", {}, {0: 1, 99: 1, 500: 1}),
        ("constant", {"warmup": 10}, {0: 0, 5: 0.5, 10: 1, 99: 1}),
        ("linear", {}, {1: 1, 51: 0.5, 101: 0, 500: 0}),
        ("linear", {"warmup": 20}, {0: 0, 10: 0.5, 20: 1, 60: 0.5, 100: 0}),
        ("linear", {"warmup": 20, "final": 0.5}, {20: 1, 60: 0.75, 100: 0.5, 500: 0.5}),
        ("cosine", {}, {0: 1, 25: 0.5 + 0.5 * math.cos(math.pi / 4), 50: 0.5, 100: 0, 500: 0}),
        ("cosine", {"warmup": 20}, {0: 0, 10: 0.5, 20: 1, 60: 0.5, 100: 0}),
        ("cosine", {"warmup": 20, "final": 0.2}, {20: 1, 60: 0.6, 100: 0.2}),
    ],
)
def test_schedules_at_named_steps(name, fields, at):
    schedule = AdamW(schedule={"name": name, "lr": LR, **fields}).learning_rate(100)
    np.testing.assert_allclose([schedule(n) for n in at], [LR * v for v in at.values()], atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_shorter_than_its_warm_up_only_warms_up(name):
    schedule = AdamW(schedule={"name": name, "lr": LR, "warmup": 8}).learning_rate(4)
    np.testing.assert_allclose([schedule(n) for n in (0, 2, 4)], [0, LR / 4, LR / 2])


def test_the_update_follows_the_schedule():
    optimizer = AdamW(schedule={"name": "linear", "lr": LR, "warmup": 4}).build(8)
    state, lengths = optimizer.init(PARAMS), []
    for _ in range(8):
        updates, state = optimizer.update(gradient(), state, PARAMS)
        lengths.append(float(jnp.abs(updates["body"]["bias"]).max()))
    # with one gradient for ever Adam's direction is its sign
    np.testing.assert_allclose(lengths, LR * np.array([0, 1, 2, 3, 4, 3, 2, 1]) / 4, atol=ROUNDING)


# ------------------------------------------------------------------------------- AdamW


def test_the_first_adamw_update_in_closed_form():
    optimizer, grads = AdamW(schedule=CONSTANT, eps=0.1, weight_decay=0.01), gradient()
    updates, _ = step(optimizer, grads)
    want = jax.tree.map(lambda g: -LR * g / (jnp.abs(g) + 0.1), grads)
    for layer in ("body", "head"):
        want[layer]["kernel"] -= LR * 0.01 * PARAMS[layer]["kernel"]
    close(updates, want)


def test_adamw_is_that_of_optax():
    grads = [gradient(seed=i) for i in range(3)]
    ours = AdamW(schedule=CONSTANT, b1=0.8, b2=0.9, weight_decay=0.1, decay=DECAY_ALL).build(10)
    theirs = optax.adamw(LR, b1=0.8, b2=0.9, weight_decay=0.1)
    states = [ours.init(PARAMS), theirs.init(PARAMS)]
    for g in grads:
        (a, states[0]), (b, states[1]) = (
            x.update(g, s, PARAMS) for x, s in zip((ours, theirs), states, strict=True)
        )
        close(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_where_the_rules_say(name):
    def decayed(**fields):
        optimizer = OPTIMIZERS[name](schedule=CONSTANT, weight_decay=0.1, **fields)
        updates, _ = step(optimizer, zeros())
        assert {float(jnp.ptp(u)) for u in jax.tree.leaves(updates)} == {0.0}
        return {p: float(u.ravel()[0]) for p, u in rules.by_path(updates).items()}

    full = -LR * 0.1 * 3.0
    default = decayed()
    assert default == pytest.approx(
        {"body/bias": 0, "body/kernel": full, "head/kernel": full, "head/scale": 0}
    )
    assert decayed(decay=DECAY_ALL) == pytest.approx(dict.fromkeys(default, full))
    head = decayed(decay=((r"^params/head/", True), (r"", False)))
    assert [p for p, u in head.items() if u] == ["head/kernel", "head/scale"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lr_scale_multiplies_the_whole_update(name):
    fields = {"schedule": CONSTANT, "weight_decay": 0.1}
    plain, _ = step(OPTIMIZERS[name](**fields), gradient())
    scale = ((r"^params/body/", 0.25), (r"scale$", 0.0), (r"", 1.0))
    scaled, _ = step(OPTIMIZERS[name](**fields, lr_scale=scale), gradient())
    factors = {"body": {"kernel": 0.25, "bias": 0.25}, "head": {"kernel": 1.0, "scale": 0.0}}
    close(scaled, jax.tree.map(lambda u, f: u * f, plain, factors))


def test_clipping_bounds_what_the_moments_see():
    def first_moment(clip):
        _, state = step(AdamW(schedule=CONSTANT, clip=clip, b1=0.9), gradient())
        return optax.tree.get(state, "mu")

    norm = float(optax.tree.norm(gradient()))
    close(optax.tree.norm(first_moment(0.0)), 0.1 * norm)
    close(optax.tree.norm(first_moment(norm / 4)), 0.1 * norm / 4)
    close(first_moment(4 * norm), first_moment(0.0))


def test_the_first_moment_has_the_dtype_asked_for():
    _, state = step(AdamW(schedule=CONSTANT, mu_dtype="bfloat16"), gradient())
    moments = {n: optax.tree.get(state, n)["body"]["kernel"].dtype for n in ("mu", "nu")}
    assert moments == {"mu": jnp.bfloat16, "nu": jnp.float32}


# -------------------------------------------------------------------------------- Muon

WIDTH, WORDS = 8, 3


def uvit(scan):
    module = UViT(
        streams={
            "text": {"kind": "tokens", "count": WORDS, "width": 6, "inner": 4},
            "image": {"kind": "patches", "grid": (4, 4), "channels": 3, "patch": 2, "conv": True},
            "mask": {"kind": "patches", "grid": (4, 4), "channels": 5, "patch": 2},
        },
        time_tokens=("image",),
        context={"kind": "tokens", "count": WORDS, "width": 7},
        width=WIDTH,
        depth=4,
        heads=2,
        norm="post",
        time_mlp=True,
        classes=3,
        data_types=2,
        scan=scan,
    )
    shapes = jax.eval_shape(module.init, jax.random.key(0), **module.input_shapes())["params"]
    words = Words(vocabulary_size=9, width=7, length=WORDS)
    return {"denoiser": shapes, "text": jax.eval_shape(words.init, jax.random.key(0))}


def label_ae():
    codec = LabelAE(
        classes=5, widths=(4, 8, 8), middle_width=8, middle_blocks=1, up_widths=(8, 4), groups=4
    )
    return jax.eval_shape(codec.init, jax.random.key(0))


# matrices as (how many, inputs, outputs) by the end of the path
UVIT = {
    "attn/qkv": (3, 8, 8),
    "attn/out": (1, 8, 8),
    "mlp/fc1": (1, 8, 32),
    "mlp/fc2": (1, 32, 8),
    "join": (1, 8, 8),
    "join_skip": (1, 8, 8),
    "time_image/fc1": (1, 8, 32),
    "time_image/fc2": (1, 32, 8),
    "context_in/project": (1, 7, 8),
    "text_in/squeeze": (1, 6, 4),
    "text_in/project": (1, 4, 8),
    "text_out/project": (1, 8, 4),
    "text_out/expand": (1, 4, 6),
    "image_in/project": (1, 2 * 2 * 3, 8),
    "image_out/project": (1, 8, 2 * 2 * 3),
    "image_out/conv": (1, 9 * 3, 3),
    "mask_in/project": (1, 2 * 2 * 5, 8),
    "mask_out/project": (1, 8, 2 * 2 * 5),
}
LABEL_AE = {
    "encoder/conv_in": (1, 9 * 3, 4),  # 5 classes are 3 bits
    "encoder/widen_0": (1, 9 * 4, 8),
    "encoder/halve_0": (1, 9 * 8, 8),
    "encoder/widen_1": (1, 9 * 8, 8),
    "encoder/halve_1": (1, 9 * 8, 8),
    "encoder/conv_middle": (1, 9 * 8, 8),
    "middle_0/conv_1": (1, 9 * 8, 8),
    "middle_0/conv_2": (1, 9 * 8, 8),
    "encoder/conv_out": (1, 9 * 8, 8),  # mean and log variance of 4 channels
    "decoder/conv_in": (1, 9 * 4, 8),
    "decoder/double_0": (1, 8, 4 * 8),  # a pixel becomes four
    "decoder/double_1": (1, 8, 4 * 4),
    "decoder/conv_out": (1, 9 * 4, 5),
}


def matrices(tree):
    """How each leaf that Muon takes is cut: (how many, inputs, outputs) by path."""
    axes = rules.by_path(
        rules.match(tree, [(p, (v,)) for p, v in MATRICES], where="x", dead="allow")
    )
    found = {}
    for (path, leaf), (cut,) in zip(rules.by_path(tree).items(), by_leaf(axes), strict=True):
        if cut is None:
            continue
        inputs, outputs = ([leaf.shape[i] for i in part] for part in cut)
        many = leaf.size // math.prod(inputs + outputs)
        assert len({i % leaf.ndim for part in cut for i in part}) == len(inputs + outputs), path
        found[path] = (many, math.prod(inputs), math.prod(outputs))
    return found

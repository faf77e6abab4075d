"""Schedules at named steps, rules over paths, and what Muon takes as a matrix."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jointseg_jax import rules
from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.models.text import Words
from jointseg_jax.models.uvit import UViT
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
        ("linear", {}, {0: 1, 50: 0.5, 100: 0, 500: 0}),
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
    update, grads = jax.jit(optimizer.update), gradient()
    for _ in range(8):
        updates, state = update(grads, state, PARAMS)
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
            jax.jit(x.update)(g, s, PARAMS) for x, s in zip((ours, theirs), states, strict=True)
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
    free = first_moment(0.0)
    close(optax.tree.norm(free), 0.1 * norm)
    close(optax.tree.norm(first_moment(norm / 4)), 0.1 * norm / 4)
    close(first_moment(4 * norm), free)


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
    found = {}
    for path, leaf in rules.by_path(tree).items():
        axes = next(v for pattern, v in MATRICES if re.search(pattern, "params/" + path))
        if axes is None:
            continue
        inputs, outputs = ([leaf.shape[i] for i in part] for part in axes)
        assert len({i % leaf.ndim for part in axes for i in part}) == len(inputs + outputs), path
        many = leaf.size // math.prod(inputs + outputs)
        found[path] = (many, math.prod(inputs), math.prod(outputs))
    return found


def expected(table, path, layers):
    (cut,) = [v for end, v in table.items() if f"/{path}".endswith(f"/{end}/kernel")]
    return (cut[0] * (layers if re.search("(in|out)_blocks/", path) else 1), *cut[1:])


@pytest.mark.parametrize(
    ("make", "table", "layers"),
    [
        (functools.partial(uvit, False), UVIT, 1),
        (functools.partial(uvit, True), UVIT, 2),
        (label_ae, LABEL_AE, 1),
    ],
    ids=["uvit unrolled", "uvit scanned", "label_ae"],
)
def test_every_kernel_is_a_matrix_with_the_axes_of_its_layer(make, table, layers):
    tree = make()
    found = matrices(tree)
    assert sorted(found) == [p for p in sorted(rules.paths(tree)) if p.endswith("/kernel")]
    assert found == {path: expected(table, path, layers) for path in found}
    assert all(any(f"/{p}".endswith(f"/{end}/kernel") for p in found) for end in table)


# Newton-Schulz as published stops early: singular values end somewhere in this band
BAND = (0.6, 1.3)


@pytest.mark.parametrize("shape", [(8, 8), (6, 3), (3, 6)])
def test_muon_moves_a_matrix_along_an_orthogonal_one(shape):
    params = {"fc": {"kernel": jnp.zeros(shape)}}
    updates, _ = step(Muon(schedule=CONSTANT), gradient(params), params)
    found = np.linalg.svd(updates["fc"]["kernel"], compute_uv=False)
    found /= LR * max(1, shape[1] / shape[0]) ** 0.5
    assert BAND[0] < found.min() and found.max() < BAND[1]
    grad = np.asarray(gradient(params)["fc"]["kernel"])
    left, _, right = np.linalg.svd(grad, full_matrices=False)
    along = np.einsum("ik,ij,kj->k", left, updates["fc"]["kernel"], right)
    assert (along < 0).all()  # downhill along every singular direction


def test_muon_takes_every_head_layer_and_tap_as_its_rule_says():
    """Cut up by the rules, each part is orthogonal by itself: another cut would not be."""
    shapes = {
        "in_blocks/attn/qkv/kernel": (2, 8, 3, 2, 4),
        "attn/out/kernel": (2, 4, 8),
        "image_out/conv/kernel": (3, 3, 4, 8),
        "double_0/kernel": (2, 2, 16, 4),
    }
    params = rules.nested({path: jnp.zeros(shape) for path, shape in shapes.items()})
    updates, _ = step(Muon(schedule=CONSTANT), gradient(params), params)
    cuts = {
        "in_blocks/attn/qkv/kernel": lambda u: u.transpose(0, 2, 1, 3, 4).reshape(6, 8, 8),
        "attn/out/kernel": lambda u: u.reshape(1, 8, 8),
        "image_out/conv/kernel": lambda u: u.reshape(1, 36, 8),
        "double_0/kernel": lambda u: u.transpose(2, 0, 1, 3).reshape(1, 16, 16),
    }
    for path, update in rules.by_path(updates).items():
        found = np.linalg.svd(cuts[path](np.asarray(update)), compute_uv=False) / LR
        assert BAND[0] < found.min() and found.max() < BAND[1], path


def of_optax(optimizer, params):
    """The direction of ``optimizer`` by optax.contrib.muon."""
    numbers = optax.contrib.MuonDimensionNumbers
    axes = jax.tree.map(
        lambda _, a: None if a is None else numbers(*a), params, optimizer._matrices(params)
    )
    return optax.contrib.muon(
        -1.0,
        ns_steps=optimizer.ns_steps,
        beta=optimizer.beta,
        eps=optimizer.eps,
        mu_dtype=optimizer.mu_dtype,
        adam_b1=optimizer.b1,
        adam_b2=optimizer.b2,
        adam_learning_rate=-optimizer.lr_ratio,
        muon_weight_dimension_numbers=axes,
    )


SEVERAL = {
    "qkv/kernel": (8, 3, 2, 4),
    "attn/out/kernel": (2, 4, 8),
    "blocks/fc1/kernel": (3, 8, 12),
    "fc1/kernel": (8, 12),
    "fc2/kernel": (12, 8),
    "image_out/conv/kernel": (3, 3, 4, 8),
    "fc2/bias": (8,),
    "position": (5, 8),
}


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"ns_steps": 2, "mu_dtype": "bfloat16", "lr_ratio": 0.1}], ids=str
)
def test_muon_is_that_of_optax_stacked_or_not(stacked, fields):
    params = rules.nested({path: jnp.ones(shape) for path, shape in SEVERAL.items()})
    params["frozen"] = None
    optimizer = Muon(schedule=CONSTANT, **fields)
    ours, theirs = optimizer._direction(stacked), of_optax(optimizer, params)
    states = [ours.init(params), theirs.init(params)]
    # old checkpoints are read: leaves, names and empty nodes are those of optax
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for seed in range(3):
        grads = gradient(params, seed)
        (a, states[0]), (b, states[1]) = (
            jax.jit(x.update)(grads, s, params) for x, s in zip((ours, theirs), states)
        )
        # products of at most 72 terms, each iteration up to 3.4 times as far from the last
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)
        close(states[0], states[1])


def test_the_rest_gets_adam_with_nesterov_momentum_and_its_own_length():
    """First update: momentum g, looked at one step ahead b1 g / (1 + b1) + g, over |g| + eps."""
    optimizer = Muon(schedule=CONSTANT, lr_ratio=0.1, b1=0.8, eps=0.1)
    updates, _ = step(optimizer, gradient())
    for layer, leaf in (("body", "bias"), ("head", "scale")):
        g = gradient()[layer][leaf]
        close(updates[layer][leaf], -LR * 0.1 * (0.8 / 1.8 + 1) * g / (jnp.abs(g) + 0.1))


def test_muon_leaves_frozen_parameters_out():
    frozen = {"body": {"kernel": None, "bias": PARAMS["body"]["bias"]}, "head": PARAMS["head"]}
    optimizer = Muon(schedule=CONSTANT, weight_decay=0.1)
    updates, state = step(optimizer, gradient(frozen), frozen)
    assert rules.paths(updates) == rules.paths(frozen)
    assert not [p for p in rules.paths(state) if "body/kernel" in p]
    whole, _ = step(optimizer, gradient(), PARAMS)
    assert rules.paths(whole) != rules.paths(updates)


def test_other_matrices_can_be_chosen():
    rule = ((r"^params/body/kernel$", ((0,), (1,))), (r"", None))
    (both, _), (one, _), (none, _) = (
        step(o, gradient())
        for o in (Muon(schedule=CONSTANT), Muon(schedule=CONSTANT, matrices=rule), NO_MATRICES)
    )
    close(one["body"]["kernel"], both["body"]["kernel"])
    close(one["head"]["kernel"], none["head"]["kernel"])
    assert not np.allclose(one["head"]["kernel"], both["head"]["kernel"], atol=0.1)


NO_MATRICES = Muon(schedule=CONSTANT, matrices=((r"", None),))


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("kind", [AdamW, Muon])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"b1": 1.0}, "b1, b2 = 1.0, 0.999 must lie in"),
        ({"b2": -0.1}, "b1, b2 = 0.9, -0.1 must lie in"),
        ({"weight_decay": -1.0}, "weight_decay -1.0 and clip 0.0 must be >= 0"),
        ({"clip": -1.0}, "clip -1.0 must be >= 0"),
        ({"eps": 0.0}, "eps 0.0 > 0"),
        ({"schedule": {"name": "constant"}}, "schedule.lr 0.0 must be > 0"),
        ({"schedule": {"name": "constant", "lr": 1.0, "warmup": -1}}, "schedule.warmup -1 >= 0"),
    ],
)
def test_meaningless_settings_are_refused(kind, fields, said):
    with pytest.raises(ValueError) as error:
        kind(**({"schedule": CONSTANT} | fields))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"name": "cosin", "lr": 1.0}, "config.optimizer.schedule.name: 'cosin' is unknown (did"),
        ({"name": "constant", "lr": 1.0, "final": 0.1}, "constant has no field 'final'"),
        ({"lr": 1.0}, "config.optimizer.schedule: needs a `name`"),
    ],
)
def test_a_mistaken_schedule_is_named(schedule, said):
    with pytest.raises(UserError) as error:
        AdamW(schedule=schedule).build(10)
    assert said in str(error.value)


@pytest.mark.parametrize("field", ["decay", "lr_scale", "matrices"])
def test_rules_must_cover_every_parameter(field):
    value = ((0,), (1,)) if field == "matrices" else 1.0
    optimizer = Muon(schedule=CONSTANT, **{field: ((r"kernel$", value),)})
    with pytest.raises(UserError, match=rf"optimizer\.{field} rules: .* match no rule, first: "):
        step(optimizer, gradient())

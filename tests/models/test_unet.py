"""U-Net: what reaches what, that every way of running it agrees, and that mistakes are named."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.models.embed import Patches, Tokens
from jointseg_jax.models.unet import Residual, UNet, forward_flops, gather, spread
from jointseg_jax.profiling import attention_share
from jointseg_jax.weights.convert import stack_blocks

# float32 sums in another order (2^-24 each), grown through the network with kernels of size 0.3
REORDERED = 1e-4

FIELDS = {
    "streams": {
        "image": Patches(grid=(8, 16), channels=3, patch=4),
        "mask": Patches(grid=(8, 16), channels=2, patch=4),
    },
    "time_tokens": ("image",),
    "context": Tokens(count=3, width=6),
    "width": 16,
    "depth": 2,
    "heads": 2,
    "widths": (8,),
    "units": 8,
}

# as JoDiffusion has them: pixels on the grid, label latents of a coarser one and text as tokens
OTHERS = {
    "streams": {
        "text": Tokens(count=3, width=6),
        "image": Patches(grid=(8, 16), channels=3, patch=4),
        "mask": Patches(grid=(2, 4), channels=2, patch=1),
    },
    "time_tokens": ("image", "text"),
    "context": None,
}
KINDS = {None: {}, "apart": OTHERS, "shared": OTHERS | {"share": ("mask",)}}


def build(**changes):
    return UNet(**FIELDS | changes)


def inputs(module, batch=2, seed=0):
    rng = np.random.default_rng(seed)

    def draw(s):
        values = rng.uniform(0, 1000, s.shape) if len(s.shape) == 1 else rng.normal(size=s.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(draw, module.input_shapes(batch))


def random_params(module, seed=1):
    """Parameters away from their initial values 0 and 1."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), **module.input_shapes())["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), shapes)


@functools.cache
def prepared(others=None):
    module = build(**KINDS[others])
    return module, random_params(module), inputs(module)


@functools.partial(jax.jit, static_argnums=0)
def forward(module, params, given):
    return module.apply({"params": params}, **given)[0]


@functools.partial(jax.jit, static_argnums=0)
def slopes(module, params, given):
    """Gradients of a sum that no symmetry makes vanish."""

    def loss(params):
        outputs, _ = module.apply({"params": params}, **given)
        return sum(jnp.sum(jnp.sin(3 * y)) for y in outputs.values())

    return jax.grad(loss)(params)


def test_gather_and_spread_are_inverse():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    assert gather(x).shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(gather(x)[0, 0, 0, :3], x[0, 0, 0])
    np.testing.assert_array_equal(spread(gather(x)), x)


def test_a_new_residual_block_changes_nothing():
    block, rng = Residual("float32"), np.random.default_rng(0)
    x, c = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 4, 4, 8), (2, 16)))
    started = jax.jit(block.init_with_output)
    np.testing.assert_array_equal(started(jax.random.key(0), x, c)[0], x)


@pytest.mark.parametrize("others", KINDS)
def test_predictions_have_the_shapes_of_the_streams(others):
    module, params, given = prepared(others)
    outputs = forward(module, params, given)
    assert {k: v.shape for k, v in outputs.items()} == {
        k: v.shape for k, v in given["latents"].items()
    }
    assert all(v.dtype == jnp.float32 for v in outputs.values())


@pytest.mark.parametrize("others", KINDS)
@pytest.mark.parametrize("part", ["image", "mask", "time", "text"])
def test_every_input_reaches_the_cells_of_all_predictions(part, others):
    module, params, given = prepared(others)
    other = jax.tree.map(lambda x: x, given)
    if part == "time":
        other["times"]["image"] = given["times"]["image"] + 100
    elif part == "text" and not others:
        other["text"] = given["text"] + 1
    else:  # one corner, one word
        first = (slice(None), *(0,) * (given["latents"][part].ndim - 2))
        other["latents"][part] = given["latents"][part].at[first].add(1.0)
    before, after = forward(module, params, given), forward(module, params, other)
    for name in before:
        moved = np.any(np.asarray(before[name] != after[name]), axis=-1)  # [b, h, w] or [b, n]
        assert np.mean(moved) > 0.8, name  # of the last ReLUs of a cell all may be off


def test_estimates_are_read_and_zeros_where_there_are_none():
    module = build(self_condition=True)
    params, given = random_params(module), inputs(module)
    assert set(given["estimates"]) == {"image", "mask"}
    zeros = {k: jnp.zeros_like(v) for k, v in given["estimates"].items()}
    with_none = forward(module, params, {k: v for k, v in given.items() if k != "estimates"})
    for name, want in forward(module, params, given | {"estimates": zeros}).items():
        np.testing.assert_array_equal(with_none[name], want)
    for name, moved in forward(module, params, given).items():
        assert np.mean(np.any(np.asarray(moved != with_none[name]), axis=-1)) > 0.8
    with pytest.raises(ValueError, match=r"estimates.*self_condition"):
        module.apply({"params": params}, **given | {"estimates": {"image": zeros["mask"]}})
    plain, _, without = prepared()
    with pytest.raises(ValueError, match=r"estimates.*self_condition"):
        plain.apply({"params": params}, **without, estimates=zeros)


def test_rows_do_not_see_each_other():
    module, params, given = prepared()
    other = jax.tree.map(lambda x: x.at[1].add(1.0), given)
    got, want = forward(module, params, other), forward(module, params, given)
    for name in got:
        np.testing.assert_array_equal(got[name][0], want[name][0])
        assert np.abs(got[name][1] - want[name][1]).max() > REORDERED


def test_another_size_resizes_the_positions():
    module, params, given = prepared()
    latents = {k: jnp.concatenate([v, v], axis=1) for k, v in given["latents"].items()}
    outputs = forward(module, params, given | {"latents": latents})
    assert outputs["image"].shape == (2, 16, 16, 3)


@pytest.mark.thorough
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["none", "full", "attn_out"])
def test_scan_and_remat_change_no_gradient(scan, remat):
    module, params, given = prepared()
    other = module.clone(scan=scan, remat=remat, depth=4)
    module = module.clone(depth=4)
    params = random_params(module)
    want = slopes(module, params, given)
    got = slopes(other, stack_blocks(params) if scan else params, given)
    want = stack_blocks(want) if scan else want
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=REORDERED * max(1.0, float(np.abs(b).max()))
        ),
        got,
        want,
    )


@pytest.mark.thorough
def test_bfloat16_is_near():
    module, params, given = prepared()
    small = jax.tree.map(lambda x: x / 3, params)
    want = forward(module, small, given)
    got = forward(module.clone(dtype="bfloat16"), small, given)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=0.05)  # 8 bits of mantissa


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("mask", [(32, 8), (4, 1)], ids=["on the grid", "tokens"])
def test_forward_flops_are_those_xla_counts(mask, self_condition):
    image = Patches(grid=(32, 32), channels=3, patch=8)
    mask = Patches(grid=(mask[0], mask[0]), channels=4, patch=mask[1])
    streams = {"image": image, "mask": mask}
    fields = {"widths": (32, 48), "width": 64, "units": 32, "time_mlp": True}
    module = build(streams=streams, self_condition=self_condition, **fields)
    params = jax.eval_shape(module.init, jax.random.key(0), **module.input_shapes())["params"]
    lowered = forward.lower(module, params, module.input_shapes(1))
    counted = lowered.compile().cost_analysis()["flops"]
    # XLA also counts norms and activations
    assert 0.999 < counted / forward_flops(module) < 1.06
    assert 0 < attention_share(types.SimpleNamespace(denoiser=module)) < 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"widths": (8, 8)}, "streams: one or more with patch 8 = 2^(levels + 1), widths=(8, 8)"),
        ({"widths": ()}, "widths and units: at least 1"),
        ({"units": 0}, "widths and units: at least 1"),
        ({"add_features": (("image", "mask"),)}, "add_features: empty"),
        ({"share": ("mask",)}, "share: coarser streams with the grid"),
        (OTHERS | {"share": ("text",)}, "share: coarser streams with the grid"),
        (
            {"streams": {**FIELDS["streams"], "mask": Patches(grid=(8, 8), channels=2, patch=4)}},
            "streams: those with patch 4 on one grid",
        ),
        (
            {"streams": {"image": Patches(grid=(8, 8), channels=2, patch=4, conv=True)}},
            "streams: without conv, tanh and units",
        ),
        (
            {"streams": {"image": Patches(grid=(8, 8), channels=2, patch=4, units=8)}},
            "streams: without conv, tanh and units",
        ),
        ({"streams": {"image": Tokens(count=3, width=2)}}, "streams: one or more with patch 4"),
    ],
)
def test_refusals(changes, said):
    with pytest.raises(ValueError) as refused:
        build(**changes)
    assert said in str(refused.value)

"""Meshes, places of a train state, and layouts of activations, on eight host devices."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jointseg_jax import rules, sharding
from jointseg_jax.models.embed import Patches, Tokens
from jointseg_jax.models.uvit import UViT
from jointseg_jax.training import state as states
from jointseg_jax.types import UserError

BOTH = ("data", "fsdp")


@functools.cache
def mesh(*shape):
    return sharding.make_mesh(shape or (2, 4, 1))


def module(**fields):
    return UViT(
        streams={"image": Patches(grid=(4, 4), channels=2, patch=2)},
        time_tokens=("image",),
        context=Tokens(count=3, width=8),
        **({"width": 128, "depth": 4, "heads": 2} | fields),
    )


@functools.cache
def train_state(**fields):
    """Shapes of a train state: an optimizer of tuples, averages, counters."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def create(key):
        net = module(**fields)
        inputs = {k: jax.tree.map(jnp.zeros_like, v) for k, v in net.input_shapes().items()}
        params = {"denoiser": net.init(key, **inputs)["params"]}
        return states.create(params, jax.tree.map(lambda _: True, params), optimizer)

    return jax.eval_shape(create, jax.random.key(0))


def places(state, preset, on):
    """Path -> (shape, spec)."""
    found = sharding.state_shardings(state, preset, on)
    leaves, specs = jax.tree.leaves(state), jax.tree.leaves(found)
    return {
        path: (leaf.shape, place.spec)
        for path, leaf, place in zip(rules.paths(state), leaves, specs, strict=True)
    }


# ------------------------------------------------------------------------------ meshes


def test_a_mesh_takes_all_devices_in_order():
    made = sharding.make_mesh((-1, 4, 1))
    assert dict(made.shape) == {"data": 2, "fsdp": 4, "model": 1}
    assert made.devices.ravel().tolist() == jax.devices()
    assert sharding.data_parallel(made) == 8
    assert dict(sharding.make_mesh((1, 1, 2), jax.devices()[:2]).shape)["model"] == 2
    rows = sharding.batch_sharding(made).shard_shape((16, 3))
    assert rows == (2, 3) and sharding.replicated(made).shard_shape((16, 3)) == (16, 3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 1, 1), r"its product must be the number of devices, 8; for example \(8, 1, 1\)"),
        ((-1, 3, 1), "its product must be the number of devices, 8"),
        ((4, 1, 1), "its product must be the number of devices, 8"),
        ((-1, -1, 1), "one of them may be -1"),
        ((8, 1), r"config.mesh = \(8, 1\): give three sizes \('data', 'fsdp', 'model'\)"),
        ((0, 8, 1), "give three sizes"),
        ((-2, 4, 1), "give three sizes"),
    ],
)
def test_meshes_that_do_not_fit_are_named(shape, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(shape)


# ------------------------------------------------------------------------------ states


def test_replicate_keeps_a_whole_copy_everywhere():
    assert {spec for _, spec in places(train_state(), "replicate", mesh()).values()} == {P()}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("preset", "split", "axes"),
    [("zero1", ("opt/", "ema/"), BOTH), ("fsdp", ("params/", "opt/", "ema/"), ("fsdp",))],
)
def test_presets_split_large_tensors_of_their_parts_once(preset, split, axes, scan):
    found = places(train_state(scan=scan), preset, mesh())
    parts = {BOTH: 8, ("fsdp",): 4}[axes]
    sharded = 0
    for path, (shape, spec) in found.items():
        size = functools.reduce(lambda a, b: a * b, shape, 1)
        if not path.startswith(split) or size < sharding.SMALL:
            assert spec == P(), path
            continue
        axis = [i for i, entry in enumerate(spec) if entry is not None]
        assert len(axis) == 1 and spec[axis[0]] in (axes, axes[0]), (path, spec)
        layers = 1 if scan and "_blocks/" in path else 0
        assert axis[0] >= layers, f"{path}: the scanned layers are split"
        divisible = [n for n in shape[layers:] if n % parts == 0]
        assert shape[axis[0]] == max(divisible), (path, shape, spec)
        sharded += 1
    assert sharded >= 2 * len(split)  # at least fc1 and fc2


@pytest.mark.parametrize("scan", [False, True])
def test_heads_and_hidden_units_go_over_the_model_axis(scan):
    found = places(train_state(scan=scan), "fsdp+model", mesh(2, 2, 2))
    block = "params/denoiser/out_blocks/" + ("" if scan else "0/")
    layers = (None,) if scan else ()
    want = {
        "attn/qkv/kernel": ("fsdp", None, "model", None),
        "attn/out/kernel": ("model", None, "fsdp"),
        "mlp/fc1/kernel": ("fsdp", "model"),
        "mlp/fc1/bias": ("model",),
        "mlp/fc2/kernel": ("model", "fsdp"),
        "mlp/fc2/bias": None,
    }
    for name, spec in want.items():
        assert found[block + name][1] == (P(*layers, *spec) if spec else P()), name
    moments = [
        spec for path, (_, spec) in found.items() if path.endswith("mid_block/attn/qkv/kernel")
    ]
    assert len(set(moments)) == 1 and len(moments) > 3  # of parameters, both moments, averages
    with pytest.raises(UserError, match=r"2 does not divide into 4 parts; change config\.mesh"):
        places(train_state(scan=scan), "fsdp+model", mesh(1, 2, 4))


def test_every_device_holds_its_part_of_a_placed_state():
    kernel = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    state = {"params": {"kernel": kernel}, "opt": {"kernel": kernel}, "step": kernel}
    found = sharding.state_shardings(state, "fsdp", mesh())
    placed = jax.device_put(jax.tree.map(lambda s: jnp.zeros(s.shape), state), found)
    shards = jax.tree.map(lambda a: a.addressable_shards[0].data.shape, placed)
    assert shards["params"]["kernel"] == shards["opt"]["kernel"] == (128, 256)
    assert shards["step"] == (512, 256)


def test_what_does_not_divide_or_is_small_is_replicated():
    state = {
        "odd": jax.ShapeDtypeStruct((333, 333), jnp.float32),
        "small": jax.ShapeDtypeStruct((8, 8), jnp.float32),
        "even": jax.ShapeDtypeStruct((333, 512), jnp.float32),
    }
    specs = {k: spec for k, (_, spec) in places(state, ((r"", "fsdp"),), mesh()).items()}
    assert specs == {"odd": P(), "small": P(), "even": P(None, "fsdp")}
    alone = places(state, ((r"", "fsdp"),), mesh(8, 1, 1))
    assert {spec for _, spec in alone.values()} == {P()}  # fsdp has one part


def test_the_layers_of_scanned_blocks_are_never_split():
    leaf = jax.ShapeDtypeStruct((512, 64, 8), jnp.float32)  # many layers of a narrow kernel
    state = {"out_blocks": {"kernel": leaf, "0": {"kernel": leaf}}}
    specs = {k: spec for k, (_, spec) in places(state, ((r"", "fsdp"),), mesh()).items()}
    assert specs["out_blocks/kernel"] == P(None, "fsdp", None)
    assert specs["out_blocks/0/kernel"] == P("fsdp", None, None)  # unrolled


def test_an_explicit_spec_may_come_from_json():
    state = {"kernel": jax.ShapeDtypeStruct((512, 256), jnp.float32)}
    for spec in ((BOTH, None), [["data", "fsdp"], None]):
        assert places(state, ((r"", spec),), mesh())["kernel"][1] == P(BOTH, None)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (
            "zero3",
            "config.sharding = 'zero3' is unknown; one of: replicate, zero1, fsdp, fsdp+model.",
        ),
        (((r"", "split"),), "params/kernel: tactic 'split' is none of replicate, fsdp, zero."),
        (((r"^opt/", "zero"),), "sharding rules: 1 leaves match no rule, first: params/kernel."),
    ],
)
def test_mistaken_rules_are_named(preset, message):
    state = {"params": {"kernel": jax.ShapeDtypeStruct((512, 256), jnp.float32)}}
    with pytest.raises(UserError) as error:
        sharding.state_shardings(state, preset, mesh())
    assert message in str(error.value)


# ------------------------------------------------------------------------- activations


def test_constrain_checks_its_names_without_a_mesh():
    x = jnp.zeros((2, 3, 4))
    assert sharding.constrain(x, "batch", "tokens", "width") is x
    with pytest.raises(ValueError, match="axis 'token' is unknown; the names are batch, tokens"):
        sharding.constrain(x, "batch", "token", "width")
    with pytest.raises(ValueError, match=r"2 names .* for an array of shape \(2, 3, 4\)"):
        sharding.constrain(x, "batch", "tokens")


def test_constrain_splits_the_batch_over_the_data_axes():
    with jax.set_mesh(mesh()):
        pinned = jax.jit(lambda x: sharding.constrain(x + 1, "batch", "width"))
        y = pinned(jnp.zeros((8, 4)))
    assert y.sharding.shard_shape(y.shape) == (1, 4)


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize(("scan", "blocks"), [(False, 5), (True, 3)])
def test_a_network_pins_its_tokens_and_what_each_block_makes_of_them(scan, blocks):
    net = module(width=8, scan=scan)
    inputs = {k: jax.tree.map(jnp.zeros_like, v) for k, v in net.input_shapes(8).items()}
    variables = jax.eval_shape(net.init, jax.random.key(0), **inputs)

    def pins(apply):
        return jax.jit(apply).lower(variables, inputs).as_text().count("sdy.sharding_constraint")

    forward = lambda variables, inputs: net.apply(variables, **inputs)  # noqa: E731
    assert pins(forward) == 0
    with jax.set_mesh(mesh()):
        # a scanned half is one block in the program
        assert pins(lambda v, x: forward(v, x)) == 1 + blocks

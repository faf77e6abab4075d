"""U-ViT: every way of running it gives the same numbers, and mistakes are named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.models.embed import Patches, Tokens
from jointseg_jax.models.uvit import REMAT, UViT, forward_flops, uvit
from jointseg_jax.weights.convert import stack_blocks, unstack_blocks

# float32 sums in another order (2^-24 each), grown through five blocks with kernels of size 0.3
REORDERED = 1e-4

IMAGE = Patches(grid=(4, 4), channels=2, patch=2, conv=True)
MASK = Patches(grid=(4, 4), channels=3, patch=2, conv=True, tanh=True)
TEXT = Tokens(count=3, width=6, inner=4)

PDM = {
    "streams": {"image": IMAGE, "mask": MASK},
    "context": Tokens(count=3, width=6),
    "time_tokens": ("image",),
}
JOINT = {
    "streams": {"text": TEXT, "clip": Tokens(count=1, width=5), "image": IMAGE, "mask": MASK},
    "time_tokens": ("image", "text"),
    "data_types": 2,
    "norm": "post",
}


def build(fields=PDM, **changes):
    return UViT(**({"width": 16, "depth": 2, "heads": 2} | fields | changes))


def inputs(module, batch=2, seed=0):
    """Standard normal latents and text, times within 0..1000, the lowest class and type."""
    rng = np.random.default_rng(seed)

    def draw(s):
        if s.dtype == jnp.int32:
            return jnp.zeros(s.shape, jnp.int32)
        values = rng.uniform(0, 1000, s.shape) if len(s.shape) == 1 else rng.normal(size=s.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(draw, module.input_shapes(batch))


def random_params(module, seed=1):
    """Parameters away from their initial values 0 and 1, drawn by numpy: no compilation."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), **module.input_shapes())["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), shapes)


@functools.cache
def prepared(fields, depth=2):
    """A module, random parameters and inputs; made once per kind of module."""
    module = build({"pdm": PDM, "joint": JOINT}[fields], depth=depth)
    return module, random_params(module), inputs(module)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(module, params, given, taps=()):
    return module.apply({"params": params}, **given, taps=taps)


def forward(module, params, given):
    return apply(module, params, given)[0]


@functools.partial(jax.jit, static_argnums=0)
def slopes(module, params, given):
    """Outputs, and gradients of a sum that no symmetry makes vanish."""

    def loss(params):
        outputs, _ = module.apply({"params": params}, **given)
        return sum(jnp.sum(jnp.sin(3 * y)) for y in outputs.values()), outputs

    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return outputs, gradients


@functools.cache
def reference(fields, depth=2):
    return slopes(*prepared(fields, depth))


def assert_trees_close(got, want, tolerance):
    """Each leaf within ``tolerance`` of the wanted one, relative to its largest value."""

    def check(path, a, b):
        scale = max(1.0, float(np.abs(b).max()))
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=where)

    jax.tree_util.tree_map_with_path(check, got, want)


# --- scan, remat, taps ---------------------------------------------------------------------------


DEEP = 4
"""Two blocks in each half: enough to notice an exchanged order."""


@pytest.mark.thorough
@pytest.mark.parametrize(
    "scan,remat",
    [(True, "attn_out"), *((True, r) for r in REMAT if r != "attn_out"), (False, "attn_out")],
)
@pytest.mark.parametrize("fields", ["pdm", "joint"])  # pre-norm and post-norm
def test_scan_and_remat_change_no_output_and_no_gradient(fields, scan, remat):
    module, params, given = prepared(fields, DEEP)
    outputs, gradients = reference(fields, DEEP)
    other = module.clone(scan=scan, remat=remat)
    got, got_gradients = slopes(other, stack_blocks(params) if scan else params, given)
    assert_trees_close(got, outputs, REORDERED)
    got_gradients = unstack_blocks(got_gradients) if scan else got_gradients
    assert_trees_close(got_gradients, gradients, REORDERED)


def test_scan_makes_the_stacked_tree():
    module, params, given = prepared("joint", DEEP)
    init = functools.partial(module.clone(scan=True).init, **given)
    scanned = jax.eval_shape(init, jax.random.key(0))["params"]
    assert jax.tree.map(jnp.shape, scanned) == jax.tree.map(jnp.shape, stack_blocks(params))
    assert scanned["in_blocks"]["attn"]["qkv"]["kernel"].shape == (2, 16, 3, 2, 8)


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_stack_and_unstack_are_inverse(kind):
    params = jax.tree.map(kind, prepared("joint", DEEP)[1])
    back = unstack_blocks(stack_blocks(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert {type(p) for p in jax.tree.leaves(back)} == {type(p) for p in jax.tree.leaves(params)}


@pytest.mark.thorough
@pytest.mark.parametrize("scan", [False, True])
def test_taps_follow_the_blocks(scan):
    module, params, given = prepared("joint", DEEP)
    names = tuple(module.tap_names())
    halves = [[f"{half}_blocks/{i}" for i in range(2)] for half in ("in", "out")]
    assert names == ("tokens", *halves[0], "mid_block", *halves[1], "norm")
    _, want = apply(module, params, given, names)
    assert set(want) == set(names)
    assert {x.shape for x in want.values()} == {(2, module.spans()["mask"].stop, 16)}
    # each block makes something else of its input
    assert len({float(x[0, 0, 0]) for x in want.values()}) == len(names)
    if scan:
        params, module = stack_blocks(params), module.clone(scan=True)
    # what is not asked for is not returned
    asked = (*halves[1], "norm", halves[0][1])
    _, got = apply(module, params, given, asked)
    assert set(got) == set(asked)
    assert_trees_close(got, {n: want[n] for n in asked}, REORDERED)


def test_a_tap_is_where_its_stream_is():
    """Tokens of the clip stream are its projection plus its position."""
    module, params, given = prepared("joint")
    _, tapped = apply(module, params, given, ("tokens",))
    part = jax.tree.map(np.asarray, params["clip_in"])
    want = given["latents"]["clip"][:, 0] @ part["project"]["kernel"]
    want = np.asarray(want) + part["project"]["bias"] + part["position"][0]
    got = tapped["tokens"][:, module.spans()["clip"]]
    assert_trees_close(got[:, 0], want, REORDERED)


def test_unknown_tap_lists_the_names():
    module, params, given = prepared("pdm")
    with pytest.raises(ValueError, match=r"no tap \['out_blocks/1'\].*in_blocks/0, mid_block"):
        apply(module, params, given, ("tokens", "out_blocks/1"))


# --- what the network computes -------------------------------------------------------------------


def test_the_order_of_streams_changes_no_prediction():
    module, params, given = prepared("joint")
    other = module.clone(streams=module.streams[::-1], time_tokens=("text", "image"))
    assert list(other.spans())[-1] == "text"
    got, want = forward(other, params, given), forward(module, params, given)
    assert_trees_close(got, want, REORDERED)


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("fields", ["pdm", "joint"])
def test_every_prediction_reads_every_input(fields):
    module, params, given = prepared(fields)
    base = forward(module, params, given)
    leaves, treedef = jax.tree.flatten(given)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(given)]
    silent = {f"['times']['{n}']" for n, _ in module.streams if n not in module.time_tokens}
    assert silent < set(paths)
    for i, path in enumerate(paths):
        changed = jax.tree.unflatten(treedef, [x + (i == j) for j, x in enumerate(leaves)])
        got = forward(module, params, changed)
        moved = {k for k in base if np.abs(got[k] - base[k]).max() > 1e-5}
        assert moved == (set() if path in silent else set(base)), path


@pytest.mark.thorough
def test_without_skips_there_are_no_joins():
    module = build(skip=False, scan=True)
    given, params = inputs(module), random_params(module)
    assert "join" not in params["out_blocks"]
    assert "join" in prepared("pdm")[1]["out_blocks"]["0"]
    got = forward(module, params, given)
    want = forward(module.clone(scan=False), unstack_blocks(params), given)
    assert_trees_close(got, want, REORDERED)


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize("depth,blocks", [(1, 1), (2, 3), (3, 3)])
@pytest.mark.parametrize("scan", [False, True])
def test_small_depths(depth, blocks, scan):
    module = build(depth=depth, scan=scan)
    given = module.input_shapes(2)
    init = module.init_with_output
    (outputs, _), variables = jax.eval_shape(init, jax.random.key(0), **given)
    assert outputs == given["latents"]
    params = variables["params"]
    assert ("in_blocks" in params) == ("out_blocks" in params) == (blocks > 1)


@pytest.mark.thorough
def test_another_grid_is_the_module_of_that_grid_with_resized_positions():
    module, params, given = prepared("pdm")
    tall = Patches(grid=(8, 2), channels=2, patch=2, conv=True)
    native = build(PDM | {"streams": {"image": tall, "mask": MASK}})
    given = given | {"latents": given["latents"] | {"image": inputs(native)["latents"]["image"]}}
    table = params["image_in"]["position"]
    resized = jax.image.resize(table, (4, 1, 16), "bilinear", antialias=False)
    moved = params | {"image_in": params["image_in"] | {"position": resized}}
    got = forward(module, params, given)
    assert got["image"].shape == (2, 8, 2, 2)
    assert_trees_close(got, forward(native, moved, given), REORDERED)


def test_class_tokens():
    fields = {"streams": {"image": IMAGE}, "time_tokens": ("image",), "classes": 3}
    module = build(fields, depth=1)
    given, params = inputs(module), random_params(module)
    assert list(module.spans()) == ["class_token", "time_image", "image"]
    first = forward(module, params, given)["image"]
    second = forward(module, params, given | {"class_id": jnp.array([0, 2])})["image"]
    assert (np.abs(first - second).max((1, 2, 3)) > 1e-5).tolist() == [False, True]


def test_data_type_is_the_last_one_when_not_said():
    module, params, given = prepared("joint")
    last = forward(module, params, given | {"data_type": jnp.array([1, 1])})
    unsaid = forward(module, params, {k: v for k, v in given.items() if k != "data_type"})
    assert_trees_close(unsaid, last, REORDERED)
    assert np.abs(last["image"] - forward(module, params, given)["image"]).max() > 1e-3


@pytest.mark.thorough
def test_one_time_may_stand_for_all_rows():
    module, params, given = prepared("joint")
    rows = {"image": jnp.full(2, 7.0), "text": jnp.full(2, 3.0)}
    one = {"image": 7, "text": jnp.float32(3.0)}
    got, want = (forward(module, params, given | {"times": t}) for t in (one, rows))
    assert_trees_close(got, want, REORDERED)


# --- parameters ----------------------------------------------------------------------------------


def count(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), **module.input_shapes())
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


LATENT = Patches(grid=(64, 64), channels=4, patch=2)
ONE_BILLION = {"width": 1536, "depth": 30, "heads": 24, "norm": "post", "data_types": 2}
UNIDIFFUSER = {
    "text": Tokens(count=77, width=64),
    "clip": Tokens(count=1, width=512),
    "image": LATENT,
}
JODIFFUSION = UNIDIFFUSER | {"text": Tokens(count=77, width=768, inner=64), "mask": LATENT}


@pytest.mark.thorough
def test_published_parameter_counts():
    """U-ViT-S/2 (COCO) and Deep, UniDiffuser v1, JoDiffusion less its 26,112 idle ones, PDM."""
    small = {
        "streams": {"image": Patches(grid=(32, 32), channels=4, patch=2, conv=True)},
        "context": Tokens(count=77, width=768),
        "time_tokens": ("image",),
        "width": 512,
        "heads": 8,
    }
    assert count(UViT(**small, depth=12, scan=True)) == 44_692_644
    assert count(UViT(**small, depth=12)) == 44_692_644
    assert count(UViT(**small, depth=16, scan=True)) == 58_345_636
    two = {"streams": UNIDIFFUSER, "time_tokens": ("image", "text")} | ONE_BILLION
    assert count(UViT(**two, scan=True)) == 952_509_520
    jodiffusion = UViT(**(two | {"streams": JODIFFUSION}), scan=True)
    assert count(jodiffusion) == 954_258_336 - 26_112
    assert jodiffusion.spans()["mask"].stop == 2129
    mask = Patches(grid=(32, 32), channels=8, patch=2, conv=True, tanh=True)
    pdm = small | {"streams": small["streams"] | {"mask": mask}}
    idle = 512 * 8 * 2 * 2 + 512  # mask_embed_0 of the reference, which nothing uses
    assert count(UViT(**pdm, depth=12, scan=True)) == 44_874_508 - idle


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("fields", ["pdm", "joint"])
def test_a_gradient_reaches_every_parameter(fields):
    _, gradients = reference(fields)
    for path, slope in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(slope).all() and np.abs(slope).max() > 1e-4, jax.tree_util.keystr(path)


@pytest.mark.thorough
def test_initial_values():
    """Norms 1 and 0, biases 0, everything else drawn; a fresh network predicts something."""
    module = build(PDM, depth=2, time_mlp=True, qkv_bias=True)
    given = inputs(module)
    (outputs, _), variables = jax.jit(module.init_with_output)(jax.random.key(0), **given)
    assert all(np.abs(y).max() > 1e-3 for y in outputs.values())
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        name = jax.tree_util.keystr(path)
        convolution = "conv" in name or ("_in']['project" in name and "context" not in name)
        if "scale" in name:
            np.testing.assert_array_equal(leaf, 1.0, err_msg=name)
        elif "bias" in name and not convolution:
            np.testing.assert_array_equal(leaf, 0.0, err_msg=name)
        else:
            assert np.unique(leaf).size > 0.98 * leaf.size, name


@pytest.mark.thorough
@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16_keeps_float32_parameters_and_predictions(scan):
    module, params, given = prepared("joint")
    half = module.clone(dtype="bfloat16", scan=scan)
    shapes = jax.eval_shape(functools.partial(half.init, **given), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    params = stack_blocks(params) if scan else params
    got, tapped = apply(half, params, given, ("mid_block",))
    want = forward(module, prepared("joint")[1], given)
    assert tapped["mid_block"].dtype == jnp.bfloat16
    for name, y in got.items():
        assert y.dtype == jnp.float32
        # some thirty roundings of 2^-9 each that mostly cancel
        error = np.sqrt(np.mean((y - want[name]) ** 2) / np.mean(want[name] ** 2))
        assert 1e-4 < error < 0.05, (name, error)


# --- cost ----------------------------------------------------------------------------------------


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize(
    "sizes", [None, {"image": (8, 16), "mask": (16, 4)}], ids=["native", "other"]
)
@pytest.mark.parametrize(
    ("edge", "changes"),
    [
        ({"conv": True}, {}),
        ({"units": 32}, {"time_mlp": True, "skip": False, "mlp_ratio": 2}),
    ],
)
def test_forward_flops_are_those_xla_counts(edge, changes, sizes):
    square = Patches(grid=(16, 16), channels=3, patch=2, **edge)
    fields = JOINT if changes else PDM
    fields = fields | {"streams": fields["streams"] | {"image": square, "mask": square}}
    module = build(fields, width=128, depth=3, **changes)
    given = module.input_shapes(1)
    for name, (h, w) in (sizes or {}).items():
        given["latents"][name] = jax.ShapeDtypeStruct((1, h, w, 3), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), **module.input_shapes(1))
    lowered = jax.jit(module.apply).lower(params, **given)
    counted = lowered.cost_analysis()["flops"]
    # XLA also counts norms, GELU, softmax and the resize (a few % at width 128), and leaves out
    # the 3x3 products that fall on padding (under 0.2% of the whole)
    assert 0.999 < counted / forward_flops(module, sizes) < 1.08


def test_flops_of_the_one_billion_network():
    """4.06 TFLOP of Linear layers and 0.86 of attention at 512 pixels (measured elsewhere)."""
    module = UViT(streams=JODIFFUSION, time_tokens=("image", "text"), **ONE_BILLION)
    np.testing.assert_allclose(forward_flops(module) / 1e12, 4.92, atol=0.02)


# --- mesh ----------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("scan", [False, True])
def test_tokens_are_pinned_once_and_after_each_block_with_the_same_numbers_on_a_mesh(scan):
    module, params, given = prepared("pdm")
    given = jax.tree.map(lambda x: jnp.concatenate([x] * 4), given)
    want = forward(module, params, given)
    if scan:
        params, module = stack_blocks(params), module.clone(scan=True)

    def run(params, given):
        return module.apply({"params": params}, **given)[0]

    assert constraints(jax.jit(run).lower(params, given)) == 0
    kinds = (jax.sharding.AxisType.Auto,) * 2
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=kinds)):
        assert constraints(jax.jit(run).lower(params, given)) == 1 + 3
        got = jax.jit(run)(params, given)
        # one row for initialisation cannot be split, and need not be
        jax.eval_shape(module.init, jax.random.key(0), **inputs(module, batch=1))
    assert_trees_close(got, want, REORDERED)


def constraints(lowered):
    return lowered.as_text().count("sdy.sharding_constraint")


# --- construction and mistakes -------------------------------------------------------------------


def test_plain_mappings_build_the_same_module():
    module = uvit(
        streams={
            "text": {"kind": "tokens", "count": 3, "width": 6, "inner": 4},
            "image": {"kind": "patches", "grid": [4, 4], "channels": 2, "patch": 2, "conv": True},
        },
        context={"kind": "tokens", "count": 3, "width": 6},
        time_tokens=["image"],
        width=16,
        depth=4,
        heads=2,
        dtype="bfloat16",
    )
    same = UViT(
        streams=(("text", TEXT), ("image", IMAGE)),
        context=Tokens(count=3, width=6),
        time_tokens=("image",),
        width=16,
        depth=4,
        heads=2,
        dtype=jnp.bfloat16,
    )
    assert module == same and hash(module) == hash(same)
    assert module != same.clone(streams=same.streams[::-1])


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"time_tokens": ()}, "time_tokens: one or more of the streams ['image', 'mask']"),
        ({"time_tokens": ("text",)}, "given ('text',)"),
        ({"width": 18, "heads": 4}, "multiple of heads=4; given 18"),
        ({"width": 15, "heads": 3}, "width: even and a multiple of heads=3; given 15"),
        ({"depth": 0}, "depth: at least 1; given 0"),
        ({"norm": "rms"}, "norm: one of pre, post; given 'rms'"),
        ({"remat": "all"}, "remat: one of none, full, dots, attn_out; given 'all'"),
        (
            {"attention": "flash"},
            "attention: one of auto, xla, packed, splash, cudnn; given 'flash'",
        ),
        ({"attention": "cudnn"}, "cudnn needs dtype bfloat16 or float16; given dtype=float32"),
        ({"context": IMAGE}, "context: tokens or None"),
        ({"streams": {}}, "streams: one or more different identifiers"),
        ({"streams": {"context": IMAGE}, "time_tokens": ("context",)}, "given ['context']"),
        ({"streams": {"image": {"kind": "tokens", "count": 1}}}, "streams.image"),
        ({"depth": 0, "norm": "rms"}, "depth: at least 1; given 0; norm: one of"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        build(PDM, **changes)
    assert message in str(error.value)


def changed(given, **changes):
    latents = {**given["latents"], **changes.pop("latents", {})}
    latents = {n: z for n, z in latents.items() if z is not None}
    return {**given, **changes, "latents": latents}


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"latents": {"mask": None}}, "latents lack ['mask'] and have []"),
        ({"latents": {"depth": jnp.zeros((2, 4, 4, 1))}}, "have ['depth']"),
        (
            {"latents": {"mask": jnp.zeros((2, 4, 4, 5))}},
            "stream 'mask' has shape (2, 4, 4, 5), want (batch, height, width, 3)",
        ),
        (
            {"latents": {"image": jnp.zeros((2, 4, 5, 2))}},
            "stream 'image': Patches: 4x5 latent cells cannot be cut into patches of 2x2",
        ),
        ({"latents": {"image": jnp.zeros((3, 4, 4, 2))}}, "differ in batch size"),
        ({"times": {"mask": jnp.zeros(2)}}, "times are ['mask'] and lack ['image']"),
        ({"times": {"image": jnp.zeros(3)}}, "times['image'] has shape (3,), want () or (2,)"),
        ({"text": None}, "text has shape None, want (2, 3, 6); change the input or `context`"),
        ({"text": jnp.zeros((2, 4, 6))}, "text has shape (2, 4, 6), want (2, 3, 6)"),
        ({"class_id": jnp.zeros(2, jnp.int32)}, "class_id has shape (2,), want None"),
        ({"data_type": jnp.zeros(2, jnp.int32)}, "data_type has shape (2,), want None"),
    ],
)
def test_bad_inputs_are_named(changes, message):
    module, params, given = prepared("pdm")
    with pytest.raises(ValueError) as error:
        apply(module, params, changed(given, **changes))
    assert message in str(error.value)


def test_bad_token_stream_is_named():
    module, params, given = prepared("joint")
    with pytest.raises(ValueError, match=r"stream 'clip' has shape \(2, 2, 5\), want \(batch, 1,"):
        module.apply({"params": params}, **changed(given, latents={"clip": jnp.zeros((2, 2, 5))}))

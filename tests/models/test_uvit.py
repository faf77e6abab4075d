"""U-ViT: every way of running it gives the same numbers, and mistakes are named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.models.streams import Patches, Tokens
from jointseg_jax.models.uvit import REMAT, UViT, forward_flops, uvit
from jointseg_jax.weights.convert import stack_blocks, unstack_blocks

# float32 sums in another order, through five blocks
REORDERED = 2e-6

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
    return UViT(**({"width": 16, "depth": 4, "heads": 2} | fields | changes))


def inputs(module, batch=2, seed=0):
    """Standard normal latents and text, times within 0..1000, the lowest class and type."""
    shapes = module.input_shapes(batch)
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def draw(key, s):
        if s.dtype == jnp.int32:
            return jnp.zeros(s.shape, jnp.int32)
        if len(s.shape) == 1:
            return jax.random.uniform(key, s.shape, maxval=1000.0)
        return jax.random.normal(key, s.shape)

    return jax.tree.unflatten(treedef, [draw(k, s) for k, s in zip(keys, leaves)])


def randomised(params, seed=1):
    """Every parameter away from its special initial value (0 or 1), at a visible size."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [p + 0.2 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves)]
    return jax.tree.unflatten(treedef, noisy)


@functools.cache
def prepared(fields):
    """A module, inputs and random parameters; made once per kind of module."""
    module = build({"pdm": PDM, "joint": JOINT}[fields])
    given = inputs(module)
    return module, given, randomised(jax.jit(module.init)(jax.random.key(2), **given)["params"])


def loss_and_outputs(module, given):
    def loss(params):
        outputs, _ = module.apply({"params": params}, **given)
        return sum(jnp.sum(jnp.sin(3 * y)) for y in outputs.values()), outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def reference(fields):
    module, given, params = prepared(fields)
    (_, outputs), gradients = loss_and_outputs(module, given)(params)
    return outputs, gradients


def assert_trees_close(got, want, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


# --- scan, remat, taps ---------------------------------------------------------------------------


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("fields", ["pdm", "joint"])  # pre-norm and post-norm
def test_scan_and_remat_change_no_output_and_no_gradient(fields, scan, remat):
    module, given, params = prepared(fields)
    outputs, gradients = reference(fields)
    other = module.clone(scan=scan, remat=remat)
    params = stack_blocks(params) if scan else params
    (_, got), slopes = loss_and_outputs(other, given)(params)
    slopes = unstack_blocks(slopes) if scan else slopes
    assert_trees_close(got, outputs, REORDERED)
    # gradients are sums over 32 outputs and 11 tokens of numbers of order 10
    assert_trees_close(slopes, gradients, 1e-4)


def test_scan_makes_the_stacked_tree():
    module, given, params = prepared("joint")
    init = functools.partial(module.clone(scan=True).init, **given)
    scanned = jax.eval_shape(init, jax.random.key(0))["params"]
    assert jax.tree.map(jnp.shape, scanned) == jax.tree.map(jnp.shape, stack_blocks(params))
    assert scanned["in_blocks"]["attn"]["qkv"]["kernel"].shape == (2, 16, 3, 2, 8)


@pytest.mark.parametrize("convert", [lambda p: p, lambda p: jax.tree.map(np.asarray, p)])
def test_stack_and_unstack_are_inverse(convert):
    params = convert(prepared("joint")[2])
    back = unstack_blocks(stack_blocks(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert {type(p) for p in jax.tree.leaves(back)} == {type(p) for p in jax.tree.leaves(params)}


@pytest.mark.parametrize("scan", [False, True])
def test_taps_follow_the_blocks(scan):
    module, given, params = prepared("joint")
    names = module.tap_names()
    assert names == [
        "tokens",
        "in_blocks/0",
        "in_blocks/1",
        "mid_block",
        "out_blocks/0",
        "out_blocks/1",
        "norm",
    ]
    _, want = jax.jit(lambda p: module.apply({"params": p}, **given, taps=names))(params)
    assert list(want) == names
    assert {x.shape for x in want.values()} == {(2, module.spans()["mask"].stop, 16)}
    # each block makes something else of its input
    assert len({float(jnp.sum(x[0, 0])) for x in want.values()}) == len(names)
    if scan:
        params, module = stack_blocks(params), module.clone(scan=True)
    for name in names:
        _, got = jax.jit(lambda p, n=name: module.apply({"params": p}, **given, taps=[n]))(params)
        assert list(got) == [name]
        np.testing.assert_allclose(got[name], want[name], atol=REORDERED * 10, err_msg=name)


def test_a_tap_is_where_its_stream_is():
    """Tokens of the clip stream are its projection plus its position."""
    module, given, params = prepared("joint")
    _, tapped = module.apply({"params": params}, **given, taps=["tokens"])
    part = params["clip_in"]
    want = given["latents"]["clip"] @ part["project"]["kernel"] + (
        part["project"]["bias"] + part["position"]
    ).reshape(1, 1, -1)
    np.testing.assert_allclose(tapped["tokens"][:, module.spans()["clip"]], want, atol=REORDERED)


def test_unknown_tap_lists_the_names():
    module, given, params = prepared("pdm")
    with pytest.raises(ValueError, match=r"no tap \['out_blocks/2'\].*in_blocks/1, mid_block"):
        module.apply({"params": params}, **given, taps=["tokens", "out_blocks/2"])


# --- what the network computes -------------------------------------------------------------------


def test_the_order_of_streams_changes_no_prediction():
    module, given, params = prepared("joint")
    other = module.clone(streams=module.streams[::-1], time_tokens=("text", "image"))
    assert list(other.spans())[-1] == "text"
    got, _ = other.apply({"params": params}, **given)
    want, _ = module.apply({"params": params}, **given)
    assert_trees_close(got, want, REORDERED * 10)


def test_every_stream_reads_every_input():
    """Each prediction depends on each latent, each time token, the text and the data type."""
    for fields in ("pdm", "joint"):
        module, given, params = prepared(fields)
        base, _ = module.apply({"params": params}, **given)
        leaves, treedef = jax.tree.flatten(given)
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(given)]
        for i, path in enumerate(paths):
            silent = path.startswith("['times']") and path[10:-2] not in module.time_tokens
            changed = jax.tree.unflatten(treedef, [x + (i == j) for j, x in enumerate(leaves)])
            got, _ = module.apply({"params": params}, **changed)
            moved = all(np.abs(got[k] - base[k]).max() > 1e-5 for k in base)
            assert moved != silent, path


def test_without_skips_the_in_blocks_reach_the_out_blocks_only_in_line():
    module = build(skip=False, scan=True)
    given = inputs(module)
    params = jax.eval_shape(module.init, jax.random.key(0), **given)["params"]
    assert "join" not in params["out_blocks"]
    assert "join" in prepared("pdm")[2]["out_blocks"]["0"]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("scan", [False, True])
def test_small_depths(depth, scan):
    module = build(depth=depth, scan=scan)
    given = inputs(module)
    (outputs, _), variables = module.init_with_output(jax.random.key(0), **given)
    assert {k: v.shape for k, v in outputs.items()} == {
        k: v.shape for k, v in given["latents"].items()
    }
    assert ("in_blocks" in variables["params"]) == (depth > 1)


def test_another_grid_is_the_module_of_that_grid_with_resized_positions():
    module, given, params = prepared("pdm")
    latents = given["latents"] | {"image": jax.random.normal(jax.random.key(5), (2, 8, 2, 2))}
    got, _ = module.apply({"params": params}, **(given | {"latents": latents}))
    table = params["image_in"]["position"]
    resized = jax.image.resize(table, (4, 1, 16), "bilinear", antialias=False)
    native = build(
        PDM
        | {"streams": {"image": Patches(grid=(8, 2), channels=2, patch=2, conv=True), "mask": MASK}}
    )
    want, _ = native.apply(
        {"params": params | {"image_in": params["image_in"] | {"position": resized}}},
        **(given | {"latents": latents}),
    )
    assert got["image"].shape == (2, 8, 2, 2)
    assert_trees_close(got, want, REORDERED)


def test_class_and_data_type_tokens():
    module = build({"streams": {"image": IMAGE}, "time_tokens": ("image",), "classes": 3})
    given = inputs(module)
    variables = module.init(jax.random.key(0), **given)
    assert list(module.spans()) == ["class_token", "time_image", "image"]
    first, _ = module.apply(variables, **given)
    second, _ = module.apply(variables, **(given | {"class_id": jnp.array([0, 2])}))
    differs = np.abs(first["image"] - second["image"]).max((1, 2, 3)) > 1e-6
    assert differs.tolist() == [False, True]

    module, given, params = prepared("joint")
    last, _ = module.apply({"params": params}, **(given | {"data_type": jnp.array([1, 1])}))
    unsaid, _ = module.apply({"params": params}, **(given | {"data_type": None}))
    jax.tree.map(np.testing.assert_array_equal, last, unsaid)


def test_one_time_for_all_rows():
    module, given, params = prepared("joint")
    rows, _ = module.apply(
        {"params": params}, **(given | {"times": {n: jnp.full(2, 7.0) for n in ("image", "text")}})
    )
    one, _ = module.apply({"params": params}, **(given | {"times": {"image": 7, "text": 7.0}}))
    jax.tree.map(np.testing.assert_array_equal, rows, one)


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


@pytest.mark.parametrize("fields", ["pdm", "joint"])
def test_a_gradient_reaches_every_parameter(fields):
    module, given, _ = prepared(fields)
    params = jax.jit(module.init)(jax.random.key(2), **given)["params"]
    gradients = loss_and_outputs(module, given)(params)[1]
    for path, slope in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(slope).all() and np.abs(slope).max() > 1e-7, jax.tree_util.keystr(path)


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16_keeps_float32_parameters_and_predictions(scan):
    module, given, params = prepared("joint")
    half = module.clone(dtype="bfloat16", scan=scan)
    shapes = jax.eval_shape(half.init, jax.random.key(0), **given)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    params = stack_blocks(params) if scan else params
    got, tapped = half.apply({"params": params}, **given, taps=["mid_block"])
    want, _ = reference("joint")
    assert tapped["mid_block"].dtype == jnp.bfloat16
    for name, y in got.items():
        assert y.dtype == jnp.float32
        # 2^-8 per rounding, some thirty roundings of which most cancel
        error = np.sqrt(np.mean((y - want[name]) ** 2) / np.mean(want[name] ** 2))
        assert 1e-5 < error < 0.05, (name, error)


# --- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [None, {"image": (8, 16), "mask": (16, 4)}], ids=["native", "other"]
)
@pytest.mark.parametrize("changes", [{}, {"time_mlp": True, "skip": False, "mlp_ratio": 2}])
def test_forward_flops_are_those_xla_counts(changes, sizes):
    square = Patches(grid=(16, 16), channels=3, patch=2, conv=True)
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
    # the 3x3 products that fall on padding (under 0.1% of the whole)
    assert 0.999 < counted / forward_flops(module, sizes) < 1.08


def test_flops_of_the_one_billion_network():
    """4.06 TFLOP of Linear layers and 0.86 of attention at 512 pixels (measured elsewhere)."""
    module = UViT(streams=JODIFFUSION, time_tokens=("image", "text"), **ONE_BILLION)
    np.testing.assert_allclose(forward_flops(module) / 1e12, 4.92, atol=0.02)


# --- mesh ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
def test_one_constraint_per_block_and_the_same_numbers_on_a_mesh(scan):
    module, given, params = prepared("pdm")
    given = jax.tree.map(lambda x: jnp.concatenate([x] * 4), given)
    want, _ = module.apply({"params": params}, **given)
    if scan:
        params, module = stack_blocks(params), module.clone(scan=True)
    apply = jax.jit(lambda p, g: module.apply({"params": p}, **g)[0])
    assert constraints(apply.lower(params, given)) == 0
    kinds = (jax.sharding.AxisType.Auto,) * 2
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=kinds)):
        assert constraints(apply.lower(params, given)) == (3 if scan else 5)
        got = apply(params, given)
        jax.jit(module.init)(jax.random.key(0), **inputs(module, batch=1))
    assert_trees_close(got, want, REORDERED * 10)


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
        ({"attention": "flash"}, "attention: one of xla, cudnn; given 'flash'"),
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
    module, given, params = prepared("pdm")
    with pytest.raises(ValueError) as error:
        module.apply({"params": params}, **changed(given, **changes))
    assert message in str(error.value)


def test_bad_token_stream_is_named():
    module, given, params = prepared("joint")
    with pytest.raises(ValueError, match=r"stream 'clip' has shape \(2, 2, 5\), want \(batch, 1,"):
        module.apply({"params": params}, **changed(given, latents={"clip": jnp.zeros((2, 2, 5))}))

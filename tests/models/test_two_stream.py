"""Two streams: the image stream is a U-ViT of its own; what passes between the two, and when."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.models.backbone import Backbone
from jointseg_jax.models.blocks import Block, layer_norm
from jointseg_jax.models.embed import Patches, PatchesIn, PatchesOut, Tokens
from jointseg_jax.models.two_stream import TwoStream, forward_flops
from jointseg_jax.models.uvit import UViT
from jointseg_jax.rules import by_path
from jointseg_jax.weights.convert import stack_blocks, unstack_blocks

# float32 sums in another order (2^-24 each), grown through ten blocks with kernels of size 0.3
REORDERED = 1e-4

IMAGE = Patches(grid=(4, 4), channels=2, patch=2, conv=True)
MASK = Patches(grid=(4, 6), channels=3, patch=2, conv=True, tanh=True)
FIELDS = {
    "streams": {"image": IMAGE, "mask": MASK},
    "context": Tokens(count=3, width=6),
    "time_tokens": ("image",),
    "width": 16,
    "depth": 5,
    "heads": 2,
}
OPTIONS = {
    "pre": {},
    "post": {"norm": "post", "exchange_bias": True, "qkv_bias": True, "time_mlp": True},
}


def build(**changes):
    return TwoStream(**(FIELDS | changes))


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
    """Parameters away from their initial values 0 and 1, those of the exchange too."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), **module.input_shapes())["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), shapes)


@functools.cache
def prepared(options="pre", depth=FIELDS["depth"]):
    module = build(**OPTIONS[options], depth=depth)
    return module, random_params(module), inputs(module)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(module, params, given, taps=()):
    return module.apply({"params": params}, **given, taps=taps)


@functools.partial(jax.jit, static_argnums=(0, 3))
def slopes(module, params, given, names=("image", "mask")):
    """Outputs, and gradients of a sum over the named predictions that no symmetry makes vanish."""

    def loss(params):
        outputs, _ = module.apply({"params": params}, **given)
        return sum(jnp.sum(jnp.sin(3 * outputs[n])) for n in names), outputs

    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return outputs, gradients


def assert_trees_close(got, want, tolerance=REORDERED):
    """Each leaf within ``tolerance`` of the wanted one, relative to its largest value."""

    def check(path, a, b):
        scale = max(1.0, float(np.abs(b).max()))
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=where)

    jax.tree_util.tree_map_with_path(check, got, want)


def image_only(given):
    """The inputs without the map."""
    return given | {k: {"image": given[k]["image"]} for k in ("latents", "times")}


# --- the image stream ----------------------------------------------------------------------------


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_image_stream_has_the_parameters_of_a_uvit(options, scan):
    module = build(**OPTIONS[options], scan=scan, classes=3, data_types=2)
    fields = FIELDS | {"streams": {"image": IMAGE}} | OPTIONS[options]
    fields.pop("exchange_bias", None)
    alone = UViT(**fields, scan=scan, classes=3, data_types=2)
    ours, want = (
        jax.eval_shape(m.init, jax.random.key(0), **m.input_shapes())["params"]
        for m in (module, alone)
    )
    assert ours["image_stream"] == want
    assert set(ours) == {"image_stream", "map_stream", "exchange"}
    parts = {"mask_in", "in_blocks", "mid_block", "out_blocks", "mask_out"}
    assert set(ours["map_stream"]) == parts
    assert ours["map_stream"]["out_blocks"] == want["out_blocks"]


@pytest.mark.thorough
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("options", [{}, {"scan": True}, {"norm": "post"}, {"exchange_bias": True}])
def test_a_fresh_network_predicts_the_image_as_its_image_stream_alone_does(options, jit):
    """Bit for bit: what the map says is multiplied by zero, and x + 0 is x."""
    module = build(**{"depth": 2} | options)
    given = inputs(module)
    params = jax.jit(module.init)(jax.random.key(0), **given)["params"]
    alone = module.image_module()
    run = apply if jit else lambda m, p, g: m.apply({"params": p}, **g)
    got, _ = run(module, params, given)
    want, _ = run(alone, params["image_stream"], image_only(given))
    assert set(got) == {"image", "mask"} and set(want) == {"image"}
    np.testing.assert_array_equal(got["image"], want["image"])
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), params["exchange"]
    )
    got, _ = run(module, params | {"exchange": moved}, given)
    assert np.abs(got["image"] - want["image"]).max() > 1e-3


# --- the loop, written out -----------------------------------------------------------------------


def written_out(module, mistake, params, given):
    """The layers one after the other, as published; ``mistake`` is one that is easily made."""
    image, other, exchange = (params[k] for k in ("image_stream", "map_stream", "exchange"))

    def block(p, x, skip=None):
        fields = dict(norm=module.norm, join_norm=module.norm == "post", qkv_bias=module.qkv_bias)
        return Block(heads=module.heads, **fields).apply({"params": p}, x, skip)

    def zero(p, x):
        return x @ p["kernel"] + (p["bias"].reshape(1, 1, -1) if "bias" in p else 0.0)

    def norm(x):
        return layer_norm("norm", jnp.float32).apply({"params": image["norm"]}, x)

    alone = module.image_module()
    x = alone.apply({"params": image}, **image_only(given), taps=("tokens",))[1]["tokens"]
    enter = PatchesIn(MASK, module.width, jnp.float32)
    m = enter.apply({"params": other["mask_in"]}, given["latents"]["mask"])
    half = module.depth // 2
    order = [("in_blocks", str(i)) for i in range(half)]
    order += [("mid_block", None)] + [("out_blocks", str(i)) for i in range(half)]
    tokens, skips, skips_m = x.shape[1], [], []
    for part, i in order:
        b, bm, p = (t[part] if i is None else t[part][i] for t in (image, other, exchange))
        out = part == "out_blocks"
        mx = jnp.concatenate([x, m], axis=1)
        x = block(b, x, skips.pop() if out else None)
        if mistake == "map reads x after the image block":
            mx = jnp.concatenate([x, m], axis=1)
        mx = block(bm, mx, skips_m.pop() if out else None)
        dx, m = mx[:, :tokens], mx[:, tokens:]
        before, x = x, x + zero(p, dx)
        if mistake == "image tokens alone are added to":
            x = jnp.concatenate([before[:, : -IMAGE.tokens], x[:, -IMAGE.tokens :]], axis=1)
        if part == "in_blocks":
            skips_m.append(mx)
            skips.append(before if mistake == "x is pushed before the addition" else x)
    features = {"image": norm(x)[:, -IMAGE.tokens :], "mask": m}
    if mistake == "the map is normed":
        features["mask"] = norm(m)
    heads = {"image": (IMAGE, image["image_out"]), "mask": (MASK, other["mask_out"])}
    return {
        n: PatchesOut(spec).apply({"params": p}, features[n], given["latents"][n])
        for n, (spec, p) in heads.items()
    }


MISTAKES = (
    "map reads x after the image block",
    "image tokens alone are added to",
    "x is pushed before the addition",
    "the map is normed",
)


@pytest.mark.parametrize(
    ("options", "depth", "mistakes"),
    [("post", 3, ()), pytest.param("pre", 5, MISTAKES, marks=pytest.mark.thorough)],
)
def test_the_network_is_the_loop_written_out(options, depth, mistakes):
    module, params, given = prepared(options, depth)
    got, _ = apply(module, params, given)
    loop = jax.jit(written_out, static_argnums=(0, 1))
    assert_trees_close(got, loop(module, "", params, given))
    for mistake in mistakes:
        wrong = loop(module, mistake, params, given)
        error = max(float(np.abs(wrong[n] - got[n]).max()) for n in got)
        assert error > 100 * REORDERED, mistake


# --- scan, remat, taps ---------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options, changes",
    [
        ("post", {"scan": True, "remat": "full"}),
        ("pre", {"scan": True, "remat": "attn_out"}),
        ("pre", {"remat": "full"}),
    ],
)
def test_scan_and_remat_change_no_output_and_no_gradient(options, changes):
    module, params, given = prepared(options)
    outputs, gradients = slopes(module, params, given)
    scan = "scan" in changes
    other = module.clone(**changes)
    got, got_gradients = slopes(other, stack_blocks(params) if scan else params, given)
    assert_trees_close(got, outputs)
    assert_trees_close(unstack_blocks(got_gradients) if scan else got_gradients, gradients)


@pytest.mark.thorough
def test_scan_makes_the_stacked_tree():
    module, params, _ = prepared()
    other = module.clone(scan=True)
    shapes = jax.eval_shape(other.init, jax.random.key(0), **other.input_shapes())["params"]
    stacked = stack_blocks(params)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, stacked)
    assert shapes["exchange"]["out_blocks"]["kernel"].shape == (2, 16, 16)
    # entry j of the mirrored half joins in-layer j
    last = params["exchange"]["out_blocks"]["1"]["kernel"]
    np.testing.assert_array_equal(stacked["exchange"]["out_blocks"]["kernel"][0], last)
    back = unstack_blocks(stacked)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert jax.tree.structure(unstack_blocks(params)) == jax.tree.structure(params)
    assert jax.tree.structure(stack_blocks(stacked)) == jax.tree.structure(stacked)


@pytest.mark.thorough
@pytest.mark.parametrize("scan", [False, True])
def test_taps_are_the_tokens_of_either_stream(scan):
    module, params, given = prepared()
    spans = module.spans()
    assert list(spans) == ["time_image", "context", "image", "mask"]
    assert (spans["image"], spans["mask"]) == (slice(4, 8), slice(8, 14))
    if scan:
        module, params = module.clone(scan=True), stack_blocks(params)
    names = tuple(module.tap_names())
    predictions, tapped = apply(module, params, given, names)
    assert set(tapped) == set(names) and len(names) == 13
    lengths = {n: x.shape[1] for n, x in tapped.items()}
    assert lengths == {n: 14 if n.startswith("map_stream/") else 8 for n in names}
    last = tapped["map_stream/out_blocks/1"][:, spans["mask"]]
    head = {"params": params["map_stream"]["mask_out"]}
    want = PatchesOut(MASK).apply(head, last, given["latents"]["mask"])
    assert_trees_close(predictions["mask"], want)
    asked = ("map_stream/in_blocks/1", "out_blocks/0")
    _, some = apply(module, params, given, asked)
    assert_trees_close(some, {n: tapped[n] for n in asked})


@pytest.mark.thorough
def test_both_streams_end_in_the_same_padding_which_changes_nothing():
    """8 tokens of the image and 24 of both take 8 more each, once, where a kernel likes that."""
    mask = Patches(grid=(8, 8), channels=3, patch=2, conv=True)
    fields = {"streams": {"image": IMAGE, "mask": mask}, "width": 128, "depth": 3}
    plain, kernel = (build(**fields, attention=name) for name in ("xla", "packed"))
    assert [Backbone.of(m).padding(128, 8, 24) for m in (plain, kernel)] == [0, 8]
    assert Backbone.of(kernel).padding(128, 8, 25) == 0  # no number suits both
    given, taps = inputs(plain, batch=1), tuple(plain.tap_names())
    params = jax.tree.map(lambda x: x / 4, random_params(plain))  # wider, so smaller
    assert_trees_close(apply(kernel, params, given, taps), apply(plain, params, given, taps))
    assert_trees_close(slopes(kernel, params, given), slopes(plain, params, given))


# --- gradients, precision, cost ------------------------------------------------------------------


@pytest.mark.thorough
def test_at_the_start_the_image_teaches_the_exchange_and_the_map_teaches_everything():
    module, given = build(), inputs(build())
    params = jax.jit(module.init)(jax.random.key(0), **given)["params"]

    def learning(names):
        gradients = by_path(slopes(module, params, given, names)[1])
        assert all(np.isfinite(g).all() for g in gradients.values())
        return {path for path, g in gradients.items() if np.abs(g).max() > 0}

    paths = set(by_path(params))
    stream = {p for p in paths if p.startswith("image_stream/")}
    exchange = {p for p in paths if p.startswith("exchange/")}
    assert learning(("image",)) == stream | exchange  # the map stream is multiplied by zero
    # the map reads x from before each image block, and x reads nothing of it through zeros: what
    # comes after the last reading does not matter to the map
    late = ("norm/", "image_out/", "out_blocks/1/")
    unseen = {p for p in stream if p.removeprefix("image_stream/").startswith(late)}
    assert learning(("mask",)) == paths - unseen - {"exchange/out_blocks/1/kernel"}


@pytest.mark.thorough
def test_bfloat16_keeps_float32_parameters_and_predictions():
    module, params, given = prepared()
    half = module.clone(dtype="bfloat16")
    shapes = jax.eval_shape(functools.partial(half.init, **given), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    got, tapped = apply(half, params, given, ("mid_block", "map_stream/mid_block"))
    assert {x.dtype for x in tapped.values()} == {jnp.dtype("bfloat16")}
    want, _ = apply(module, params, given)
    for name, y in got.items():
        assert y.dtype == jnp.float32
        # some fifty roundings of 2^-9 each that mostly cancel
        error = np.sqrt(np.mean((y - want[name]) ** 2) / np.mean(want[name] ** 2))
        assert 1e-4 < error < 0.07, (name, error)


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("sizes", [None, {"image": (8, 16), "mask": (16, 4)}])
def test_forward_flops_are_those_xla_counts(sizes):
    square = Patches(grid=(16, 16), channels=3, patch=2, conv=True)
    module = build(streams={"image": square, "mask": square}, width=128, depth=3)
    given = module.input_shapes(1)
    for name, (h, w) in (sizes or {}).items():
        given["latents"][name] = jax.ShapeDtypeStruct((1, h, w, 3), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), **module.input_shapes(1))
    counted = jax.jit(module.apply).lower(params, **given).cost_analysis()["flops"]
    # XLA also counts norms, GELU, softmax and the resize (a few % at width 128), and leaves out
    # the 3x3 products that fall on padding (under 0.1% of the whole)
    assert 0.999 < counted / forward_flops(module, sizes) < 1.08


def count(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), **module.input_shapes())
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.thorough
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_published_parameter_count(factor):
    """The published 95.8 M are factor 1, and include idle projections and an idle embedding."""
    side, patch = 32 * factor, 2 * factor
    module = TwoStream(
        streams={
            "image": Patches(grid=(32, 32), channels=4, patch=2, conv=True),
            "mask": Patches(grid=(side, side), channels=8, patch=patch, conv=True, tanh=True),
        },
        context=Tokens(count=77, width=768),
        time_tokens=("image",),
        width=512,
        depth=12,
        heads=8,
        exchange_bias=True,
        scan=True,
    )
    assert module.spans()["mask"] == slice(334, 590)
    idle = 13 * 262_656 + (512 * 8 * 2 * 2 + 512)  # even zero-convolutions, mask_embed_0
    values = 8 * (patch**2 - 4)  # more values in a patch than with factor 1, both ways
    assert count(module) == 95_813_388 - idle + values * (512 + 512) + values
    assert count(module) - count(module.clone(exchange_bias=False)) == 13 * 512


# --- construction and mistakes -------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"streams": {"image": IMAGE}}, "streams: two, the image and then the map; given"),
        (
            {"streams": {"image": IMAGE, "mask": MASK, "edges": MASK}},
            "streams: two, the image and then the map; given",
        ),
        ({"time_tokens": ("mask",)}, "time_tokens: the first stream's, ('image',); given ('mask',"),
        ({"time_tokens": ("image", "mask")}, "time_tokens: the first stream's"),
        ({"norm": "rms"}, "norm: one of pre, post; given 'rms'"),
        ({"width": 15, "heads": 3}, "width: even and a multiple of heads=3; given 15"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        build(**changes)
    assert str(error.value).startswith("TwoStream: ") and message in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text": None}, "TwoStream: text has shape None, want (2, 3, 6)"),
        ({"taps": ("map_stream/norm",)}, "TwoStream: no tap ['map_stream/norm']; the taps are"),
        (
            {"latents": {"image": jnp.zeros((2, 4, 4, 2))}},
            "TwoStream: the streams are ['image",
        ),
    ],
)
def test_bad_inputs_are_named(changes, message):
    module, params, given = prepared()
    with pytest.raises(ValueError) as error:
        module.apply({"params": params}, **given | changes)
    assert message in str(error.value)


def test_plain_mappings_build_the_same_module():
    image = {"kind": "patches", "grid": [4, 4], "channels": 2, "patch": 2, "conv": True}
    plain = build(streams={"image": image, "mask": MASK}, time_tokens=["image"], dtype="float32")
    assert plain == build() and hash(plain) == hash(build())

"""Layouts against the reference operations, and tables against the published state dicts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.models.uvit import UViT
from jointseg_jax.types import UserError
from jointseg_jax.weights import tables
from jointseg_jax.weights.architectures import BUILDERS, uvit_fields
from jointseg_jax.weights.convert import to_ours, to_theirs

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


LAYOUTS = {
    "same": (tables.SAME, [(5,)]),
    "row": (tables.ROW, [(1, 1, 6)]),
    "linear": (tables.LINEAR, [(4, 3)]),
    "conv": (tables.CONV, [(5, 4, 3, 3)]),
    "patch": (tables.patch_layout(2), [(6, 3, 2, 2)]),
    "join": (tables.JOIN, [(4, 8)]),
    "heads": (tables.heads_layout(2), [(6, 6)]),
    "qkv": (tables.qkv_layout(2, tensors=1), [(18, 6)]),
    "qkv bias": (tables.qkv_layout(2, tensors=1), [(18,)]),
    "q, k, v": (tables.qkv_layout(2, tensors=3), [(6, 6)] * 3),
    "q, k, v bias": (tables.qkv_layout(2, tensors=3), [(6,)] * 3),
    "positions": (tables.positions_layout([(1, 4), (3, 4), (2, 3, 4)]), [(1, 10, 4)]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_exactly_invertible(name):
    layout, shapes = LAYOUTS[name]
    theirs = [draw(*s) for s in shapes]
    back = layout.theirs(*layout.ours(*theirs))
    assert len(back) == len(theirs)
    for a, b in zip(back, theirs):
        np.testing.assert_array_equal(a, b)


def test_patch_layout_is_the_strided_convolution():
    x, weight = draw(1, 3, 4, 6), draw(5, 3, 2, 2)
    (kernel,) = tables.patch_layout(2).ours(weight)
    conv = jax.lax.conv_general_dilated(jnp.asarray(x), jnp.asarray(weight), (2, 2), "VALID")
    cells = x.reshape(1, 3, 2, 2, 3, 2).transpose(0, 2, 4, 3, 5, 1).reshape(1, 6, 12)
    want = np.asarray(conv).reshape(1, 5, 6).transpose(0, 2, 1)
    # sums of 12 float32 products
    np.testing.assert_allclose(cells @ kernel, want, atol=1e-5)


def test_conv_layout_is_the_same_convolution_channels_last():
    x, weight = draw(1, 3, 4, 5), draw(2, 3, 3, 3)
    (kernel,) = tables.CONV.ours(weight)
    want = jax.lax.conv_general_dilated(jnp.asarray(x), jnp.asarray(weight), (1, 1), "SAME")
    got = jax.lax.conv_general_dilated(
        jnp.asarray(x.transpose(0, 2, 3, 1)),
        jnp.asarray(kernel),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    # sums of 27 float32 products
    np.testing.assert_allclose(got, np.asarray(want).transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("tensors", [1, 3])
def test_qkv_layout_gives_each_head_its_rows(tensors):
    x, weight = draw(6), draw(18, 6)
    rows = [weight] if tensors == 1 else np.split(weight, 3)
    (kernel,) = tables.qkv_layout(2, tensors=tensors).ours(*rows)
    got = np.einsum("d,dchk->chk", x, kernel)
    want = (weight @ x).reshape(3, 2, 3)  # (q k v), heads, size
    np.testing.assert_allclose(got, want, atol=1e-5)  # sums of 6 float32 products


def test_heads_and_join_layouts():
    y, weight = draw(2, 3), draw(6, 6)
    (kernel,) = tables.heads_layout(2).ours(weight)
    got = np.einsum("hk,hkd->d", y, kernel)
    np.testing.assert_allclose(got, weight @ y.reshape(6), atol=1e-5)
    x, skip, weight = draw(4), draw(4), draw(4, 8)
    a, b = tables.JOIN.ours(weight)
    want = weight @ np.concatenate([x, skip])
    np.testing.assert_allclose(x @ a + skip @ b, want, atol=1e-5)


ORIGINAL = {"embed_dim": 16, "depth": 4, "num_heads": 2, "img_size": 4, "in_chans": 3}
ORIGINAL |= {"patch_size": 2, "qkv_bias": True, "mlp_time_embed": True}
DIFFUSERS = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 4,
    "sample_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 2,
    "text_dim": 6,
    "inner_text_dim": 5,
    "num_text_tokens": 3,
    "clip_img_dim": 7,
    "use_data_type_embedding": True,
    "use_timestep_embedding": True,
    "attention_bias": True,
    "activation_fn": "gelu",
    "block_type": "unidiffuser",
}
JOINT_TEXT = {"text_dim": 6, "num_text_tokens": 3, "clip_img_dim": 7}
CONFIGS = {
    "uvit": ORIGINAL | {"num_classes": 5},
    "uvit_t2i": ORIGINAL | {"num_clip_token": 3, "clip_dim": 6},
    "unidiffuser": ORIGINAL | JOINT_TEXT,
    "unidiffuser_diffusers": DIFFUSERS,
    "jodiffusion": DIFFUSERS,
}


@functools.cache
def small(layout):
    """A small model with every optional part its layout knows, and its table."""
    module = UViT(**uvit_fields(layout, CONFIGS[layout]))
    return module, tables.table(layout, module)


def random_weights(table):
    return {k: draw(*shape) for k, shape in table.reference_shapes().items()}


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize("layout", CONFIGS)
def test_round_trips_with_every_option(layout):
    _, table = small(layout)
    weights = random_weights(table)
    assert tables.layout_of(weights) == layout
    assert tables.layout_of({f"module.{k}": a for k, a in weights.items()}) == layout
    back = to_theirs(to_ours(weights, table), table)
    assert set(back) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize("layout", CONFIGS)
def test_scanned_modules_have_the_same_table(layout):
    module, table = small(layout)
    assert tables.table(layout, module.clone(scan=True)).shapes == table.shapes


def test_positions_follow_the_reference_order_not_the_module_order():
    module, table = small("jodiffusion")
    weights = random_weights(table)
    turned = module.clone(streams=module.streams[::-1], time_tokens=("text", "image"))
    got = to_ours(weights, tables.table("jodiffusion", turned))
    jax.tree.map(np.testing.assert_array_equal, got, to_ours(weights, table))
    np.testing.assert_array_equal(got["time_text"]["position"], weights["pos_embed"][0, 1:2])
    clip = weights["pos_embed"][0, 5:6]  # after two times and three words
    np.testing.assert_array_equal(got["clip_in"]["position"], clip)
    mask = weights["pos_embed"][0, -4:].reshape(2, 2, 16)
    np.testing.assert_array_equal(got["mask_in"]["position"], mask)


def test_the_patch_projection_reference_keeps_and_ignores():
    _, table = small("jodiffusion")
    idle = {"transformer.pos_embed.proj.weight", "transformer.pos_embed.proj.bias"}
    assert set(table.idle) == idle
    weights = random_weights(table) | {name: draw(3) for name in idle}
    assert not idle & set(to_theirs(to_ours(weights, table), table))


def test_a_model_that_is_not_of_the_layout_is_named():
    module, _ = small("jodiffusion")
    with pytest.raises(UserError, match=r"layout 'unidiffuser' has no name for our 'mask_in/"):
        tables.table("unidiffuser", module)
    with pytest.raises(UserError, match=r"layout 'vit' is unknown; one of: uvit, uvit_t2i"):
        tables.table("vit", module)
    with pytest.raises(UserError, match=r"no tensor tells the layout.*such as \['conv_in'\]"):
        tables.layout_of({"conv_in": draw(3)})


def test_weights_of_another_depth_are_named():
    module, table = small("uvit_t2i")
    deeper = tables.table("uvit_t2i", module.clone(depth=6))
    message = r"26 missing \(in_blocks\.2\.attn\.proj\.bias \(16,\); in_blocks\.2\.attn\.proj\.weig"
    with pytest.raises(UserError, match=message):
        to_ours(random_weights(table), deeper)
    wider = tables.table("uvit_t2i", module.clone(width=32))
    with pytest.raises(UserError, match=r"pos_embed: given|context_embed\.bias: given \(16,\)"):
        to_ours(random_weights(table), wider)


PUBLISHED = {
    "uvit_t2i": (
        {
            "img_size": 32,
            "in_chans": 4,
            "patch_size": 2,
            "embed_dim": 512,
            "depth": 12,
            "num_heads": 8,
            "clip_dim": 768,
            "num_clip_token": 77,
        },
        {
            "pos_embed": (1, 334, 512),
            "patch_embed.proj.weight": (512, 4, 2, 2),
            "context_embed.weight": (512, 768),
            "in_blocks.5.norm1.weight": (512,),
            "mid_block.attn.qkv.weight": (1536, 512),
            "out_blocks.5.skip_linear.weight": (512, 1024),
            "decoder_pred.bias": (16,),
            "final_layer.weight": (4, 4, 3, 3),
        },
        44_692_644,
    ),
    "jodiffusion": (
        DIFFUSERS
        | {"num_attention_heads": 24, "attention_head_dim": 64, "num_layers": 30, "patch_size": 2}
        | {"sample_size": 64, "in_channels": 4, "out_channels": 4, "attention_bias": False}
        | {"text_dim": 768, "inner_text_dim": 64, "num_text_tokens": 77, "clip_img_dim": 512}
        | {"use_timestep_embedding": False},
        {
            "pos_embed": (1, 2128, 1536),
            "data_type_pos_embed_token": (1, 1, 1536),
            "pre_text.weight": (64, 768),
            "post_text.bias": (768,),
            "vae_label_in.proj.weight": (1536, 4, 2, 2),
            "label_out.weight": (16, 1536),
            "transformer.transformer_mid_block.attn1.to_k.weight": (1536, 1536),
            "transformer.transformer_in_blocks.14.ff.net.0.proj.weight": (6144, 1536),
            "transformer.transformer_out_blocks.14.skip.skip_linear.weight": (1536, 3072),
            "transformer.transformer_out_blocks.14.block.norm3.bias": (1536,),
            "transformer.norm_out.weight": (1536,),
        },
        954_258_336 - 26_112,
    ),
}


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_state_dicts(layout):
    config, some, total = PUBLISHED[layout]
    shapes = tables.table(layout, UViT(**uvit_fields(layout, config))).reference_shapes()
    assert {k: shapes.get(k) for k in some} == some
    assert sum(int(np.prod(s)) for s in shapes.values()) == total


@pytest.mark.parametrize(
    "layout,changes,message",
    [
        ("uvit", {"qk_scale": 0.5}, "qk_scale=0.5 is not supported; only None is"),
        ("jodiffusion", {"activation_fn": "geglu"}, "activation_fn='geglu' is not supported"),
        ("jodiffusion", {"block_type": "utransformer"}, "only 'unidiffuser' is"),
        ("jodiffusion", {"out_channels": 8}, "out_channels=8 is not supported; only 3 is"),
    ],
)
def test_switches_that_change_numbers_are_refused(layout, changes, message):
    with pytest.raises(UserError) as error:
        uvit_fields(layout, CONFIGS[layout] | changes)
    assert message in str(error.value)


def test_configs_without_a_size_are_named():
    config = {k: v for k, v in CONFIGS["uvit_t2i"].items() if k != "clip_dim"}
    with pytest.raises(UserError, match="config of layout 'uvit_t2i' lacks 'clip_dim'"):
        uvit_fields("uvit_t2i", config)
    with pytest.raises(UserError, match=f"layout 'vit' is unknown; one of: {', '.join(BUILDERS)}"):
        uvit_fields("vit", config)


def test_variants_of_the_configs():
    fields = uvit_fields(
        "uvit", CONFIGS["uvit"] | {"num_classes": -1, "conv": False, "skip": False}
    )
    module = UViT(**fields)
    assert (module.classes, module.skip, dict(module.streams)["image"].conv) == (0, False, False)
    wide = UViT(**uvit_fields("unidiffuser", CONFIGS["unidiffuser"] | {"img_size": (4, 6)}))
    assert dict(wide.streams)["image"].grid == (4, 6)
    pre = UViT(**uvit_fields("jodiffusion", CONFIGS["jodiffusion"] | {"pre_layer_norm": True}))
    assert (pre.norm, pre.join_norm) == ("pre", True)

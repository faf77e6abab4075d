"""U-ViT, UniDiffuser and JoDiffusion forward passes against reference numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.models.uvit import UViT
from jointseg_jax.weights.architectures import uvit_fields
from jointseg_jax.weights.convert import stack_blocks, to_ours, to_theirs
from jointseg_jax.weights.tables import layout_of, table

FOLDERS = (
    "uvit_t2i*",
    "!uvit_t2i_sampling*",  # holds no single forward pass
    "uvit_pixel*",
    "unidiffuser_v1*",
    "jodiffusion_uvit*",
)

SOLO = {"x": "image", "timesteps": "t_image", "context": "context", "y": "class_id"}
UNIDIFFUSER = {
    "text": "text",
    "clip_img": "clip",
    "img": "image",
    "t_img": "t_image",
    "t_text": "t_text",
    "data_type": "data_type",
}
DIFFUSERS = {
    "prompt_embeds": "text",
    "image_embeds": "clip",
    "latent_image_embeds": "image",
    "image_latents": "image",
    "label_latents": "mask",
    "timestep_img": "t_image",
    "timestep_text": "t_text",
    "data_type": "data_type",
}
INPUTS = {
    "uvit": SOLO,
    "uvit_t2i": SOLO,
    "unidiffuser": UNIDIFFUSER,
    "unidiffuser_diffusers": DIFFUSERS,
    "jodiffusion": DIFFUSERS,
}
OUTPUTS = {
    "y": "image",
    "out": "image",
    "img_out": "image",
    "clip_img_out": "clip",
    "text_out": "text",
    "text": "text",
    "image": "image",
    "clip": "clip",
    "label": "mask",
}


def arguments(module, layout, given):
    """The fixture's inputs as keyword arguments of the module."""
    ours = {INPUTS[layout][name]: jnp.asarray(a) for name, a in given.items()}
    streams = [n for n, _ in module.streams]
    call = {
        "latents": {n: to_nhwc(ours[n]) for n in streams},
        "times": {n: ours[f"t_{n}"] for n in module.time_tokens},
    }
    if module.context is not None:
        call["text"] = ours["context"]
    if module.classes:
        call["class_id"] = ours["class_id"]
    if module.data_types:
        call["data_type"] = ours["data_type"]
    return call


def to_nhwc(x):
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def to_nchw(x):
    return x.transpose(0, 3, 1, 2) if x.ndim == 4 else x


def scalar(call):
    """The call of the ``*_scalar_t`` outputs (fixture notes): one time, one type for all rows."""
    kind = {"data_type": jnp.ones_like(call["data_type"])} if "data_type" in call else {}
    return call | {"times": {"image": 7, "text": 0}} | kind


def check(case, module, params, call, suffix=""):
    with jax.default_matmul_precision("highest"):
        got, _ = jax.jit(lambda p: module.apply({"params": p}, **call))(params)
    checked = []
    for name in case.outputs:
        ours = OUTPUTS.get(name.removesuffix(suffix))
        if name.endswith(suffix) and ours in got:
            case.check(name, to_nchw(got[ours]))
            checked.append(ours)
    assert set(checked) == set(got), f"outputs {sorted(case.outputs)} do not cover {sorted(got)}"


@pytest.mark.thorough_but(8)  # each fixture once, some of them scanned
@pytest.mark.cases(*FOLDERS)
@pytest.mark.parametrize("scan", [False, True])
def test_forward(case, scan):
    weights = case.weights
    layout = layout_of(weights)
    module = UViT(**uvit_fields(layout, case.config["model"]), scan=scan)
    params = to_ours(weights, table(layout, module))
    params = stack_blocks(params) if scan else params
    given = case.inputs
    others = {n: given.pop(n) for n in list(given) if n.endswith("_other")}
    call = arguments(module, layout, given)
    check(case, module, params, call)
    if any(name.endswith("_scalar_t") for name in case.outputs):
        check(case, module, params, scalar(call), "_scalar_t")
    if others:
        given |= {name.removesuffix("_other"): a for name, a in others.items()}
        check(case, module, params, arguments(module, layout, given), "_other")


SYSTEMS = ("uvit_t2i_sampling*", "unidiffuser_guidance*", "jodiffusion_sampling*")


@pytest.mark.cases(*(p for p in FOLDERS if p[0] != "!"), *SYSTEMS)
def test_weights_round_trip_exactly(case):
    weights = case.weights
    layout = layout_of(weights)
    names = table(layout, UViT(**uvit_fields(layout, case.config["model"])))
    back = to_theirs(to_ours(weights, names), names)
    assert set(weights) - set(back) <= set(names.idle)
    assert set(back) <= set(weights)
    for name, array in back.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)


@pytest.mark.cases(*FOLDERS)
def test_parameter_count(case):
    layout = layout_of(case.weights)
    names = table(layout, UViT(**uvit_fields(layout, case.config["model"])))
    ours = sum(int(np.prod(shape)) for shape in names.shapes.values())
    idle = sum(case.weights[name].size for name in names.idle if name in case.weights)
    assert ours + idle == case.meta["num_parameters"]

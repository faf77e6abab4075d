"""Rename tables of the U-ViT family: what each reference calls our parameters, and its layout.

| layout | reference | our streams |
|---|---|---|
| ``uvit`` | U-ViT, with classes or without | image |
| ``uvit_t2i`` | U-ViT text-to-image | image (context: text) |
| ``unidiffuser`` | UniDiffuser v1, its own file | text, clip, image |
| ``unidiffuser_diffusers`` | the same in the diffusers layout | text, clip, image |
| ``jodiffusion`` | JoDiffusion | text, clip, image, mask |

Source: the state dicts of baofff/U-ViT, thu-ml/unidiffuser, diffusers and 00why00/JoDiffusion.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from einops import rearrange

from jointseg_jax.models.embed import Patches
from jointseg_jax.models.uvit import UViT
from jointseg_jax.rules import by_path
from jointseg_jax.types import AnyArray, UserError
from jointseg_jax.weights.convert import Entry, Layout, Table, Weights

SAME = Layout(ours=lambda a: [a], theirs=lambda a: [a])
ROW = Layout(ours=lambda a: [a[0]], theirs=lambda a: [a[None]])
# [out, in] <-> [in, out]
LINEAR = Layout(ours=lambda a: [a.T], theirs=lambda a: [a.T])
# [out, in, kh, kw] <-> [kh, kw, in, out]
CONV = Layout(ours=lambda a: [a.transpose(2, 3, 1, 0)], theirs=lambda a: [a.transpose(3, 2, 0, 1)])
# skip_linear of cat([x, skip]), [d, 2 d], is cut into the kernels of x and of the skip, [d, d].
JOIN = Layout(
    ours=lambda a: [a[:, : a.shape[0]].T, a[:, a.shape[0] :].T],
    theirs=lambda x, skip: [rearrange([x, skip], "k i o -> o (k i)")],
)


def patch_layout(patch: int) -> Layout:
    """A strided convolution as the Linear of a flattened patch."""
    return Layout(
        ours=lambda a: [rearrange(a, "o c p q -> (p q c) o")],
        theirs=lambda a: [rearrange(a, "(p q c) o -> o c p q", p=patch, q=patch)],
    )


def qkv_layout(heads: int, *, tensors: int) -> Layout:
    """Rows of query, key and value, in one tensor or three, weights or biases."""
    # k = 3 rows in the order (q, k, v), split over t tensors; the heads contiguous inside each
    return Layout(
        ours=lambda *rows: [
            rearrange(list(rows), "t (k h d) ... -> ... (t k) h d", h=heads, k=3 // tensors)
        ],
        theirs=lambda kernel: list(rearrange(kernel, "... (t k) h d -> t (k h d) ...", t=tensors)),
    )


def heads_layout(heads: int) -> Layout:
    """The Linear after attention, whose input is the heads side by side."""
    return Layout(
        ours=lambda a: [rearrange(a, "o (h d) -> h d o", h=heads)],
        theirs=lambda a: [rearrange(a, "h d o -> o (h d)")],
    )


def positions_layout(shapes: list[tuple[int, ...]]) -> Layout:
    """One table of positions as the parts' own, in order."""
    ends = np.cumsum([0, *(math.prod(s[:-1]) for s in shapes)]).tolist()

    def ours(table: AnyArray) -> Sequence[AnyArray]:
        return [table[0, a:b].reshape(s) for (a, b), s in zip(itertools.pairwise(ends), shapes)]

    def theirs(*parts: AnyArray) -> Sequence[AnyArray]:
        join = np.concatenate if isinstance(parts[0], np.ndarray) else jax.numpy.concatenate
        return [join([p.reshape(-1, p.shape[-1]) for p in parts])[None]]

    return Layout(ours=ours, theirs=theirs)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The names of one reference."""

    prefixes: Mapping[str, str]  # of the names of block {i}; `join`: of what out-blocks have alone
    block: Mapping[str, tuple[str, ...]]  # our module inside a block -> theirs
    edges: Mapping[str, str]  # our module outside the blocks -> theirs
    positions: tuple[str, ...]  # our position parameters in the order of ``pos_embed``
    idle: tuple[str, ...] = ()  # tensors that a file may hold and that nothing uses


PREFIXES = {
    "in_blocks": "in_blocks.{i}.",
    "mid_block": "mid_block.",
    "out_blocks": "out_blocks.{i}.",
    "join": "out_blocks.{i}.",
}
BLOCK = {
    "attn/qkv": ("attn.qkv",),
    "attn/out": ("attn.proj",),
    "mlp/fc1": ("mlp.fc1",),
    "mlp/fc2": ("mlp.fc2",),
    "join": ("skip_linear",),
}
PRE_NORMS = {"attn_norm": ("norm1",), "mlp_norm": ("norm2",)}
POST_NORMS = {"attn_norm": ("norm2",), "mlp_norm": ("norm3",), "join_norm": ("norm1",)}
IMAGE = {
    "norm": "norm",
    "image_in/project": "patch_embed.proj",
    "image_out/project": "decoder_pred",
}
TIMES = ("time_image", "time_text")

UVIT = Reference(
    prefixes=PREFIXES,
    block=BLOCK | PRE_NORMS,
    edges=IMAGE
    | {
        "image_out/conv": "final_layer",
        "time_image/fc1": "time_embed.0",
        "time_image/fc2": "time_embed.2",
        "context_in/project": "context_embed",
        "class_token": "label_emb",
    },
    positions=("class_token", "time_image", "context_in", "image_in"),
)
UNIDIFFUSER = Reference(
    prefixes=PREFIXES,
    block=BLOCK | POST_NORMS,
    edges=IMAGE
    | {
        "text_in/project": "text_embed",
        "text_out/project": "text_out",
        "clip_in/project": "clip_img_embed",
        "clip_out/project": "clip_img_out",
        "time_image/fc1": "time_img_embed.0",
        "time_image/fc2": "time_img_embed.2",
        "time_text/fc1": "time_text_embed.0",
        "time_text/fc2": "time_text_embed.2",
        "data_type": "token_embedding",
        "data_type/position": "pos_embed_token",
    },
    positions=(*TIMES, "text_in", "clip_in", "image_in"),
)
DIFFUSERS = Reference(
    prefixes={
        "in_blocks": "transformer.transformer_in_blocks.{i}.",
        "mid_block": "transformer.transformer_mid_block.",
        "out_blocks": "transformer.transformer_out_blocks.{i}.block.",
        "join": "transformer.transformer_out_blocks.{i}.skip.",
    },
    block={
        "attn/qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "attn/out": ("attn1.to_out.0",),
        "mlp/fc1": ("ff.net.0.proj",),
        "mlp/fc2": ("ff.net.2",),
        "attn_norm": ("norm1",),
        "mlp_norm": ("norm3",),
        "join": ("skip_linear",),
        "join_norm": ("norm",),
    },
    edges={
        "norm": "transformer.norm_out",
        "text_in/squeeze": "pre_text",
        "text_in/project": "text_in",
        "text_out/project": "text_out",
        "text_out/expand": "post_text",
        "clip_in/project": "clip_img_in",
        "clip_out/project": "clip_img_out",
        "image_in/project": "vae_img_in.proj",
        "image_out/project": "vae_img_out",
        "mask_in/project": "vae_label_in.proj",
        "mask_out/project": "label_out",
        "time_image/fc1": "timestep_img_embed.linear_1",
        "time_image/fc2": "timestep_img_embed.linear_2",
        "time_text/fc1": "timestep_text_embed.linear_1",
        "time_text/fc2": "timestep_text_embed.linear_2",
        "data_type": "data_type_token_embedding",
        "data_type/position": "data_type_pos_embed_token",
    },
    positions=(*TIMES, "text_in", "clip_in", "image_in", "mask_in"),
    idle=("transformer.pos_embed.proj.weight", "transformer.pos_embed.proj.bias"),
)
REFERENCES: dict[str, Reference] = {
    "uvit": UVIT,
    "uvit_t2i": UVIT,
    "unidiffuser": UNIDIFFUSER,
    "unidiffuser_diffusers": DIFFUSERS,
    "jodiffusion": DIFFUSERS,
}


def table(layout: str, module: UViT) -> Table:
    """The rename of every parameter of ``module``.

    Raises:
      UserError: an unknown layout, or a part of the module that the layout has no name for.
    """
    if layout not in REFERENCES:
        raise UserError(f"layout {layout!r} is unknown; one of: {', '.join(REFERENCES)}.")
    names, shapes = REFERENCES[layout], parameter_shapes(module)
    # One table of positions, cut in the reference's token order, whatever that of our streams; the
    # data type's position is a tensor of its own.
    positions = [f"{p}/position" for p in names.positions if f"{p}/position" in shapes]
    cut = positions_layout([shapes[p] for p in positions])
    entries = [Entry(theirs=("pos_embed",), ours=tuple(positions), layout=cut)]
    for path in shapes:
        parent, _, leaf = path.rpartition("/")
        if path in positions or parent.endswith("/join_skip"):
            continue  # moved together with another parameter
        if (theirs := _theirs(names, path if leaf == "position" else parent)) is None:
            raise UserError(
                f"layout {layout!r} has no name for our {path!r}: the model is not one of this "
                f"layout. Choose another of {', '.join(REFERENCES)}, or change the model."
            )
        entries.append(_entry(module, path, theirs))
    return Table(name=layout, entries=tuple(entries), shapes=shapes, idle=names.idle)


def parameter_shapes(module: UViT) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by path, blocks unrolled; nothing is computed."""
    unrolled = module.clone(scan=False)
    shapes = jax.eval_shape(unrolled.init, jax.random.key(0), **unrolled.input_shapes())
    return {path: value.shape for path, value in by_path(shapes["params"]).items()}


def _theirs(names: Reference, ours: str) -> tuple[str, ...] | None:
    """The reference's names of one of our modules."""
    match = re.fullmatch(r"(in_blocks|mid_block|out_blocks)/(?:(\d+)/)?(.+)", ours)
    if match is None:
        return (names.edges[ours],) if ours in names.edges else None
    half, i, inside = match.groups()
    # Of an out-block's parts, diffusers keeps the join apart from the block.
    prefix = names.prefixes["join" if inside.startswith("join") else half].format(i=i)
    return tuple(prefix + n for n in names.block[inside]) if inside in names.block else None


def _entry(module: UViT, path: str, names: tuple[str, ...]) -> Entry:
    parent, _, leaf = path.rpartition("/")
    if leaf == "position":
        return Entry(theirs=names, ours=(path,), layout=ROW)
    # Norms call their scale a weight.
    theirs = tuple(f"{name}.{'bias' if leaf == 'bias' else 'weight'}" for name in names)
    ours, layout = (path,), SAME
    if parent.endswith("attn/qkv"):
        layout = qkv_layout(module.heads, tensors=len(names))
    elif leaf == "kernel" and parent.endswith("/join"):
        ours, layout = (path, f"{parent}_skip/kernel"), JOIN
    elif leaf == "kernel":
        layout = _kernel_layout(module, parent)
    return Entry(theirs=theirs, ours=ours, layout=layout)


def _kernel_layout(module: UViT, parent: str) -> Layout:
    spec = dict(module.streams).get(parent.removesuffix("_in/project"))
    if parent.endswith("attn/out"):
        return heads_layout(module.heads)
    if parent.endswith("/conv"):
        return CONV
    return patch_layout(spec.patch) if isinstance(spec, Patches) else LINEAR


def layout_of(weights: Weights) -> str:
    """The layout a reference state dict is in, by tensors that only one of them has.

    Raises:
      UserError: none of them.
    """
    marks = {
        "vae_label_in.proj.weight": "jodiffusion",
        "vae_img_in.proj.weight": "unidiffuser_diffusers",
        "clip_img_embed.weight": "unidiffuser",
        "context_embed.weight": "uvit_t2i",
        "patch_embed.proj.weight": "uvit",
    }
    for mark, layout in marks.items():
        if mark in weights or f"module.{mark}" in weights:
            return layout
    raise UserError(
        f"weights: no tensor tells the layout; looked for {', '.join(marks)} among "
        f"{len(weights)} tensors such as {sorted(weights)[:3]}."
    )

"""U-ViT: every stream, the times and the text as tokens of one transformer with long skips.

1. tokens = [class?, times, data type?, context?, stream 1, stream 2, ...], each + its position.
2. ``depth // 2`` in-blocks, one middle block, ``depth // 2`` out-blocks; out-block ``i`` joins the
   output of in-block ``depth // 2 - 1 - i``.
3. a norm, then one head per stream gives a prediction of the stream's own shape, in float32.

Because every part owns its position parameter, the order of the parts moves tokens about but
changes no prediction.

Parameter paths: ``class_token``, ``time_<stream>``, ``data_type``, ``context_in``, ``<stream>_in``,
``in_blocks``, ``mid_block``, ``out_blocks``, ``norm``, ``<stream>_out``. Unrolled, the blocks lie
under ``in_blocks/0``, ``in_blocks/1``, ...; with ``scan`` each leaf of ``in_blocks`` has a leading
layer axis, and ``out_blocks`` is stacked mirrored (entry ``j`` joins in-block ``j``), which lets
the reversed scan read the stored skips in place. ``weights.convert`` turns one into the other.

Source: U-ViT (arXiv 2209.12152) sections 3 and 4; UniDiffuser (arXiv 2303.06555) section 4;
JoDiffusion (arXiv 2512.13014) section 3; PDM (arXiv 2412.02929) section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jointseg_jax.models.layers import ATTENTION, Block, layer_norm
from jointseg_jax.models.streams import (
    IndexToken,
    Patches,
    PatchesIn,
    PatchesOut,
    Spec,
    TimeToken,
    Tokens,
    TokensIn,
    TokensOut,
    spec_of,
)
from jointseg_jax.types import Streams

NORMS = ("pre", "post")
REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attn_out": jax.checkpoint_policies.save_only_these_names("attn_out"),
}
"""What the backward pass finds stored of each block; the rest it computes again."""

Sizes = Mapping[str, tuple[int, int]]
"""Latent height and width of patch streams that are not at their native size."""


class Stack(nn.Module):
    """Blocks ``0``, ``1``, ... one after the other; returns all their outputs too."""

    block: Any
    length: int

    @nn.compact
    def __call__(self, x: Array, skips: Sequence[Array] | None = None) -> tuple[Array, list[Array]]:
        outputs = []
        for i in range(self.length):
            x = self.block(name=str(i))(x, None if skips is None else skips[i])
            outputs.append(x)
        return x, outputs


class UViT(nn.Module):
    """The denoiser.

    Args:
      streams: ``(name, Patches | Tokens)`` pairs, or a mapping; a spec may be a plain mapping with
        ``kind`` ("patches", "tokens") and the spec's fields, as configs write it.
      time_tokens: the streams whose time label becomes a token.
      context: text that is read and not predicted.
      classes: number of classes of a class token; 0 = no such token.
      data_types: number of kinds of a data-type token; 0 = no such token.
      depth: in-blocks + out-blocks (an odd number counts the middle block).
      norm: "pre" (U-ViT) or "post" (UniDiffuser).
      join_norm: a norm after each join; None = only with ``norm="post"``.
      share: patch streams that lie on the same tokens, their embeddings summed: half the tokens for
        an image and its map, at the price of a shared width. The published networks share none.
      skip: False leaves the long skips out.
      time_mlp: Linear-SiLU-Linear on every time token.
      dtype: of the matrix products; parameters and predictions are float32.
      attention: a name of ``layers.ATTENTION``.
      scan: one compiled block per half instead of ``depth // 2``: less compile time, slower steps.
      remat: a name of ``REMAT``.
    """

    streams: Any
    time_tokens: Any
    width: int
    depth: int
    heads: int
    context: Any = None
    classes: int = 0
    data_types: int = 0
    mlp_ratio: int | float = 4
    norm: str = "pre"
    join_norm: bool | None = None
    share: Any = ()
    skip: bool = True
    qkv_bias: bool = False
    time_mlp: bool = False
    dtype: Any = "float32"
    attention: str = "xla"
    scan: bool = False
    remat: str = "none"

    def __post_init__(self):
        pairs = self.streams.items() if hasattr(self.streams, "items") else self.streams
        self.streams = tuple((n, spec_of(s, where=f"UViT: streams.{n}")) for n, s in pairs)
        self.time_tokens = tuple(self.time_tokens)
        self.share = tuple(self.share)
        if self.context is not None:
            self.context = spec_of(self.context, where="UViT: context")
        self.dtype = jnp.dtype(self.dtype)
        _check_fields(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        latents: Streams,
        times: Mapping[str, Any],
        text: Array | None = None,
        *,
        class_id: Array | None = None,
        data_type: Array | None = None,
        taps: Sequence[str] = (),
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Predicts every stream; also returns the token arrays named by ``taps``.

        Args:
          latents: exactly the streams of the module.
          times: labels 0..1000 per stream, ``[batch]`` or one number for all.
          text: ``[batch, words, width]``, exactly when there is a ``context``.
          class_id: ``[batch]`` integers, exactly when there are ``classes``.
          data_type: ``[batch]`` integers; None stands for the last kind.
          taps: names out of ``tap_names()``.
        """
        _check_call(self, latents, times, text, class_id, data_type, taps)
        parts = self._embed(latents, times, text, class_id, data_type)
        x, tapped = self._trunk(jnp.concatenate(parts, axis=1), tuple(taps))
        x = layer_norm("norm", self.dtype)(x)
        if "norm" in taps:
            tapped["norm"] = x
        spans = self.spans({n: z.shape[1:3] for n, z in latents.items()})
        return {n: self._head(n, s, x[:, spans[n]], latents[n]) for n, s in self.streams}, tapped

    def _embed(self, latents, times, text, class_id, data_type) -> list[Array]:
        batch = next(iter(latents.values())).shape[0]
        parts = []
        if self.classes:
            token = IndexToken(self.classes, self.width, self.dtype, name="class_token")
            parts.append(token(jnp.asarray(class_id)))
        for name in self.time_tokens:
            label = jnp.broadcast_to(jnp.asarray(times[name], jnp.float32), (batch,))
            token = TimeToken(self.width, self.time_mlp, self.dtype, name=f"time_{name}")
            parts.append(token(label))
        if self.data_types:
            kind = jnp.full((batch,), self.data_types - 1) if data_type is None else data_type
            token = IndexToken(self.data_types, self.width, self.dtype, name="data_type")
            parts.append(token(jnp.asarray(kind)))
        if self.context is not None:
            parts.append(TokensIn(self.context, self.width, self.dtype, name="context_in")(text))
        tokens: dict[str, Array] = {}
        for name, spec in self.streams:
            enter = PatchesIn if isinstance(spec, Patches) else TokensIn
            x = enter(spec, self.width, self.dtype, name=f"{name}_in")(latents[name])
            home = self.share[0] if name in self.share else name
            tokens[home] = tokens[home] + x if home in tokens else x
        return [*parts, *tokens.values()]

    def _head(self, name: str, spec: Spec, tokens: Array, like: Array) -> Array:
        if isinstance(spec, Tokens):
            return TokensOut(spec, name=f"{name}_out")(tokens)
        return PatchesOut(spec, spec.cells(like.shape[1:3]), name=f"{name}_out")(tokens)

    def _trunk(self, x: Array, taps: tuple[str, ...]) -> tuple[Array, dict[str, Array]]:
        half = self.depth // 2
        tapped = {"tokens": x}
        inputs, outputs = (any(t.startswith(kind) for t in taps) for kind in ("in_", "out_"))
        x, skips = self._blocks("in_blocks", x, None, keep=self.skip or inputs)
        tapped |= {f"in_blocks/{i}": skips[i] for i in range(half) if f"in_blocks/{i}" in taps}
        x = tapped["mid_block"] = self._block(prevent_cse=True)(name="mid_block")(x, None)
        x, ys = self._blocks("out_blocks", x, skips if self.skip else None, keep=outputs)
        for i in range(half):
            if f"out_blocks/{i}" in taps:
                tapped[f"out_blocks/{i}"] = ys[half - 1 - i if self.scan else i]
        return x, {name: tapped[name] for name in taps if name != "norm"}

    def _blocks(self, name: str, x: Array, skips: Any, *, keep: bool) -> tuple[Array, Any]:
        """One half of the blocks; the kept outputs lie in the order of the parameters."""
        length, mirrored = self.depth // 2, name == "out_blocks"
        if length == 0:
            return x, []
        if not self.scan:
            skips = skips[::-1] if skips is not None else None
            return Stack(self._block(prevent_cse=True), length, name=name)(x, skips)

        def step(block, x, skip):
            y = block(x, skip)
            return y, y if keep else None

        scanned = nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=length,
            reverse=mirrored,
        )
        return scanned(self._block(prevent_cse=False)(name=name), x, skips)

    def _block(self, *, prevent_cse: bool) -> functools.partial:
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=prevent_cse)
        return functools.partial(
            block,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            norm=self.norm,
            join_norm=self.norm == "post" if self.join_norm is None else self.join_norm,
            qkv_bias=self.qkv_bias,
            dtype=self.dtype,
            attention=self.attention,
        )

    @nn.nowrap
    def spans(self, sizes: Sizes | None = None) -> dict[str, slice]:
        """Where each part lies among the tokens, in order; ``sizes`` as in ``Sizes``."""
        counts = {"class_token": 1} if self.classes else {}
        counts |= {f"time_{name}": 1 for name in self.time_tokens}
        counts |= {"data_type": 1} if self.data_types else {}
        counts |= {"context": self.context.count} if self.context is not None else {}
        for name, spec in self.streams:
            at_native = isinstance(spec, Tokens) or name not in (sizes or {})
            counts[name] = spec.tokens if at_native else int(np.prod(spec.cells(sizes[name])))
        own = {n: 0 if n in self.share[1:] else c for n, c in counts.items()}
        ends = dict(zip(own, np.cumsum(list(own.values())).tolist()))
        ends |= {n: ends[self.share[0]] for n in self.share}
        return {n: slice(ends[n] - c, ends[n]) for n, c in counts.items()}

    @nn.nowrap
    def tap_names(self) -> list[str]:
        """What ``taps`` may name: the tokens before, after each block, and after the norm."""
        halves = [[f"{h}_blocks/{i}" for i in range(self.depth // 2)] for h in ("in", "out")]
        return ["tokens", *halves[0], "mid_block", *halves[1], "norm"]

    @nn.nowrap
    def input_shapes(self, batch: int = 1) -> dict[str, Any]:
        """Keyword arguments of ``__call__`` as ``ShapeDtypeStruct``, all at native sizes."""
        row = functools.partial(jax.ShapeDtypeStruct, (batch,))
        real = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        shapes: dict[str, Any] = {
            "latents": {n: real((batch, *spec.shape)) for n, spec in self.streams},
            "times": {n: row(jnp.float32) for n, _ in self.streams},
        }
        if self.context is not None:
            shapes["text"] = real((batch, *self.context.shape))
        if self.classes:
            shapes["class_id"] = row(jnp.int32)
        if self.data_types:
            shapes["data_type"] = row(jnp.int32)
        return shapes


uvit = UViT
"""The constructor that configs name; it takes their plain mappings as they are."""


def forward_flops(module: UViT, sizes: Sizes | None = None) -> int:
    """Matrix-product FLOPs (2 per multiply-add) of one sample's forward pass, for MFU.

    Recomputation is not counted, nor norms, softmax, activations and the resize of positions.
    """
    d, half = module.width, module.depth // 2
    spans = module.spans(sizes)
    n = max(span.stop for span in spans.values())
    blocks, hidden = 2 * half + 1, int(d * module.mlp_ratio)
    per_token = blocks * (4 * d * d + 2 * d * hidden) + (half * 2 * d * d if module.skip else 0)
    total = n * per_token + blocks * 2 * n * n * d
    if module.time_mlp:
        total += len(module.time_tokens) * 8 * d * d
    if module.context is not None:
        total += module.context.products(d, module.context.count)
    for name, spec in module.streams:
        count = spans[name].stop - spans[name].start
        total += 2 * spec.products(d, count)
        if isinstance(spec, Patches) and spec.conv:
            total += count * spec.patch**2 * 9 * spec.channels**2
    return 2 * total


def _check_fields(module: UViT) -> None:
    names = [n for n, _ in module.streams]
    reserved = {"class_token", "data_type", "context", *(f"time_{n}" for n in names)}
    step = 2 if module.heads % 2 else 1
    bad = []

    def require(holds: bool, text: str) -> None:
        bad.extend([] if holds else [text])

    good = all(isinstance(n, str) and n.isidentifier() and n not in reserved for n in names)
    require(
        bool(names) and good and len(set(names)) == len(names),
        f"streams: one or more different identifiers, none of {sorted(reserved)}; given {names}",
    )
    times = module.time_tokens
    require(
        bool(times) and set(times) <= set(names),
        f"time_tokens: one or more of the streams {names}; given {times}",
    )
    require(
        module.context is None or isinstance(module.context, Tokens),
        f"context: tokens or None; given {module.context}",
    )
    require(
        module.heads > 0 and module.width > 0 and module.width % (step * module.heads) == 0,
        f"width: even and a multiple of heads={module.heads}; given {module.width}",
    )
    require(module.depth >= 1, f"depth: at least 1; given {module.depth}")
    grids = {n: s.cells(s.grid) for n, s in module.streams if isinstance(s, Patches)}
    order = [n for n in grids if n in module.share]
    cells = {grids[n] for n in order}
    require(
        not module.share or (list(module.share) == order and len(order) > 1 and len(cells) == 1),
        "share: two or more patch streams with the same rows and columns of patches, in the order "
        f"of the streams; given {module.share}",
    )
    choices = {"norm": NORMS, "attention": tuple(ATTENTION), "remat": tuple(REMAT)}
    for field, allowed in choices.items():
        value = getattr(module, field)
        require(value in allowed, f"{field}: one of {', '.join(allowed)}; given {value!r}")
    require(
        module.attention != "cudnn" or module.dtype in (jnp.bfloat16, jnp.float16),
        f"attention: cudnn needs dtype bfloat16 or float16; given dtype={module.dtype}",
    )
    if bad:
        raise ValueError("UViT: " + "; ".join(bad) + ".")


def _check_call(module: UViT, latents, times, text, class_id, data_type, taps) -> None:
    specs = dict(module.streams)
    missing, unknown = sorted(set(specs) - set(latents)), sorted(set(latents) - set(specs))
    if missing or unknown:
        raise ValueError(
            f"UViT: the streams are {list(specs)}; latents lack {missing} and have {unknown} "
            "besides; change the latents or `streams`."
        )
    for name, spec in specs.items():
        spec.check(latents[name].shape, where=f"UViT: stream {name!r}")
    batches = {n: z.shape[0] for n, z in latents.items()}
    batch = next(iter(batches.values()))
    if set(batches.values()) != {batch}:
        raise ValueError(f"UViT: the streams differ in batch size: {batches}.")
    grids = {n: specs[n].cells(latents[n].shape[1:3]) for n in module.share}
    if len(set(grids.values())) > 1:
        raise ValueError(f"UViT: streams that share tokens differ in their patches: {grids}.")
    absent = [n for n in module.time_tokens if n not in times]
    if absent:
        raise ValueError(f"UViT: times are {sorted(times)} and lack {absent} (`time_tokens`).")
    for name in module.time_tokens:
        _check_shape(f"times[{name!r}]", times[name], (), (batch,))
    _check_shape("class_id", class_id, (batch,) if module.classes else None)
    _check_shape("data_type", data_type, None, *([(batch,)] if module.data_types else []))
    words = None if module.context is None else (batch, *module.context.shape)
    _check_shape("text", text, words)
    strange = [t for t in taps if t not in module.tap_names()]
    if strange:
        raise ValueError(f"UViT: no tap {strange}; the taps are {', '.join(module.tap_names())}.")


def _check_shape(what: str, value: Any, *wanted: tuple[int, ...] | None) -> None:
    shape = None if value is None else jnp.shape(value)
    if shape not in wanted:
        field = {"class_id": "classes", "data_type": "data_types", "text": "context"}.get(what)
        raise ValueError(
            f"UViT: {what} has shape {shape}, want {' or '.join(map(str, wanted))}"
            + (f"; change the input or `{field}`." if field else ".")
        )

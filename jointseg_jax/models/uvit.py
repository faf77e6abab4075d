"""U-ViT: every stream, the times and the text as tokens of one transformer with long skips.

1. tokens = [class?, times, data type?, context?, stream 1, stream 2, ...], each + its position.
2. the blocks of ``trunk``; out-block ``i`` joins the output of in-block ``depth // 2 - 1 - i``.
3. a norm; ``add_features`` adds one stream's tokens to another's; then one head per stream gives a
   prediction of the stream's own shape, in float32.

Because every part owns its position parameter, the order of the parts moves tokens about but
changes no prediction.

Parameter paths: ``class_token``, ``time_<stream>``, ``data_type``, ``context_in``, ``<stream>_in``,
``in_blocks``, ``mid_block``, ``out_blocks``, ``norm``, ``<stream>_out``.

Source: U-ViT (arXiv 2209.12152) sections 3 and 4; UniDiffuser (arXiv 2303.06555) section 4;
JoDiffusion (arXiv 2512.13014) section 3; PDM (arXiv 2412.02929) section 3, of which
``add_features`` is the mode with given maps.
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

from jointseg_jax.models.blocks import layer_norm
from jointseg_jax.models.checks import check_call, check_fields, extent
from jointseg_jax.models.embed import (
    IndexToken,
    Patches,
    TimeToken,
    head_products,
    spec_of,
    way_in,
    way_out,
)
from jointseg_jax.models.trunk import REMAT as REMAT
from jointseg_jax.models.trunk import Layers, Trunk
from jointseg_jax.sharding import constrain
from jointseg_jax.types import Streams

Sizes = Mapping[str, tuple[int, int]]
"""Latent height and width of patch streams that are not at their native size."""


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
      add_features: (from, to) pairs of streams with equally many tokens: those of ``from`` are
        added to those of ``to`` before the head of ``to``.
      skip: False leaves the long skips out.
      time_mlp: Linear-SiLU-Linear on every time token.
      dtype: of the matrix products; parameters and predictions are float32.
      attention: a name of ``attention.ATTENTION``.
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
    add_features: Any = ()
    skip: bool = True
    qkv_bias: bool = False
    time_mlp: bool = False
    dtype: Any = "float32"
    attention: str = "auto"
    scan: bool = False
    remat: str = "none"

    def __post_init__(self):
        normalise_fields(self)
        self.share = tuple(self.share)
        grids = {n: s.cells(s.grid) for n, s in self.streams if isinstance(s, Patches)}
        order = [n for n in grids if n in self.share]
        cells = {grids[n] for n in order}
        check_fields(
            self,
            (
                not self.share
                or (list(self.share) == order and len(order) > 1 and len(cells) == 1),
                "share: two or more patch streams with the same rows and columns of patches, in "
                f"the order of the streams; given {self.share}",
            ),
        )
        super().__post_init__()

    def setup(self):
        trunk, index = Trunk.of(self), functools.partial(IndexToken, width=self.width)
        if self.classes:
            self.class_token = index(self.classes, dtype=self.dtype)
        self.times_in = {
            n: TimeToken(self.width, self.time_mlp, self.dtype, name=f"time_{n}")
            for n in self.time_tokens
        }
        if self.data_types:
            self.data_type = index(self.data_types, dtype=self.dtype)
        if self.context is not None:
            self.context_in = way_in("context", self.context, self.width, self.dtype)
        self.ways_in = {n: way_in(n, s, self.width, self.dtype) for n, s in self.streams}
        if trunk.half:
            self.in_blocks, self.out_blocks = trunk.blocks(), trunk.blocks()
        self.mid_block = trunk.block()()
        self.last_norm = layer_norm("norm", self.dtype)
        self.ways_out = {n: way_out(n, s) for n, s in self.streams}

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
        check_call(self, latents, times, text, class_id, data_type, taps)
        trunk = Trunk.of(self)
        tokens = self.embed(latents, times, text, class_id, data_type)
        within = [t for t in taps if t in trunk.names]
        count = tokens.shape[1]
        more = 0 if self.is_initializing() else trunk.padding(self.width, count)
        padded = jnp.pad(tokens, ((0, 0), (0, more), (0, 0))) if more else tokens
        step = functools.partial(_block, count=count)
        x, tapped = trunk.run(step, padded, self.layers(), within)
        if more:
            x, tapped = jax.tree.map(lambda y: y[:, :count], (x, tapped))
        x = self.last_norm(x)
        tapped |= {n: a for n, a in {"tokens": tokens, "norm": x}.items() if n in taps}
        features = with_added(self.add_features, self.features(x, latents))
        return self.predict(features, latents), tapped

    def embed(
        self,
        latents: Streams,
        times: Mapping[str, Any],
        text: Array | None,
        class_id: Array | None,
        data_type: Array | None,
    ) -> Array:
        """All tokens, with their positions."""
        batch = next(iter(latents.values())).shape[0]
        parts = []
        if self.classes:
            parts.append(self.class_token(jnp.asarray(class_id)))
        for name in self.time_tokens:
            label = jnp.broadcast_to(jnp.asarray(times[name], jnp.float32), (batch,))
            parts.append(self.times_in[name](label))
        if self.data_types:
            kind = jnp.full((batch,), self.data_types - 1) if data_type is None else data_type
            parts.append(self.data_type(jnp.asarray(kind)))
        if self.context is not None:
            parts.append(self.context_in(text))
        tokens: dict[str, Array] = {}
        for name, _ in self.streams:
            x = self.ways_in[name](latents[name])
            home = self.share[0] if name in self.share else name
            tokens[home] = tokens[home] + x if home in tokens else x
        joined = jnp.concatenate([*parts, *tokens.values()], axis=1)
        return joined if self.is_initializing() else constrain(joined, "batch", "tokens", "width")

    def layers(self) -> Layers:
        """The blocks, as ``Trunk.run`` takes them."""
        if self.depth == 1:
            return Layers((), self.mid_block, ())
        halves = (self.in_blocks, self.out_blocks)
        inputs, outputs = halves if self.scan else (half.all for half in halves)
        return Layers(inputs, self.mid_block, outputs)

    def features(self, x: Array, latents: Streams) -> dict[str, Array]:
        """Each stream's part of the normed tokens."""
        spans = self.spans({n: z.shape[1:3] for n, z in latents.items()})
        return {n: x[:, spans[n]] for n, _ in self.streams}

    def predict(self, features: Mapping[str, Array], latents: Streams) -> dict[str, Array]:
        """Each stream's head on its features."""
        return {n: self.ways_out[n](features[n], latents[n]) for n, _ in self.streams}

    @nn.nowrap
    def spans(self, sizes: Sizes | None = None) -> dict[str, slice]:
        """Where each part lies among the tokens, in order; ``sizes`` as in ``Sizes``."""
        counts = {"class_token": 1} if self.classes else {}
        counts |= {f"time_{name}": 1 for name in self.time_tokens}
        counts |= {"data_type": 1} if self.data_types else {}
        counts |= {"context": self.context.count} if self.context is not None else {}
        sizes = sizes or {}
        counts |= {n: int(np.prod(extent(spec, sizes.get(n)))) for n, spec in self.streams}
        own = {n: 0 if n in self.share[1:] else c for n, c in counts.items()}
        ends = dict(zip(own, np.cumsum(list(own.values())).tolist()))
        ends |= {n: ends[self.share[0]] for n in self.share}
        return {n: slice(ends[n] - c, ends[n]) for n, c in counts.items()}

    @nn.nowrap
    def tap_names(self) -> list[str]:
        """What ``taps`` may name: the tokens before, after each block, and after the norm."""
        return ["tokens", *Trunk.of(self).names, "norm"]

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


def _block(block: Any, x: Array, skip: Array | None, count: int) -> tuple[Array, Array]:
    """One layer; what it leaves is its output. Tokens from ``count`` on are padding."""
    x = block(x, skip, count)
    return x, x


def normalise_fields(module: nn.Module) -> None:
    """Turns a denoiser's fields, as configs write them, into specs, tuples and dtypes."""
    where, given = type(module).__name__, module.streams
    pairs = given.items() if hasattr(given, "items") else given
    module.streams = tuple((n, spec_of(s, where=f"{where}: streams.{n}")) for n, s in pairs)
    module.time_tokens = tuple(module.time_tokens)
    module.add_features = tuple(map(tuple, module.add_features))
    if module.context is not None:
        module.context = spec_of(module.context, where=f"{where}: context")
    module.dtype = jnp.dtype(module.dtype)


def with_added(pairs: Sequence[tuple[str, str]], features: Mapping[str, Array]) -> dict[str, Array]:
    """The features of every stream, those of ``a`` added to those of ``b`` for each (a, b)."""
    return {n: sum((features[a] for a, b in pairs if b == n), x) for n, x in features.items()}


def forward_flops(module: UViT, sizes: Sizes | None = None) -> int:
    """Matrix-product FLOPs (2 per multiply-add) of one sample's forward pass, for MFU.

    Recomputation is not counted, nor norms, softmax, activations and the resize of positions.
    """
    (tokens,) = lengths(module, sizes)
    return 2 * (Trunk.of(module).products(module.width, tokens) + edge_products(module, sizes))


def lengths(module: UViT, sizes: Sizes | None = None) -> tuple[int, ...]:
    """Numbers of tokens that attend to each other."""
    return (max(span.stop for span in module.spans(sizes).values()),)


def edge_products(module: UViT, sizes: Sizes | None = None) -> int:
    """Multiply-adds of everything but the blocks."""
    d, spans = module.width, module.spans(sizes)
    total = len(module.time_tokens) * 8 * d * d if module.time_mlp else 0
    if module.context is not None:
        total += module.context.products(d, module.context.count)
    streams = {n: (spec, spans[n].stop - spans[n].start) for n, spec in module.streams}
    return total + sum(head_products(spec, d, count) for spec, count in streams.values())

"""Two streams: a complete U-ViT for the image, a second U for the map, and an exchange between.

``x`` = the image stream's tokens (class?, times, data type?, context?, image); ``m`` = the map's
own, without time or text. At every layer ``i``:

1. ``y = B_map_i(concat(m, x)[, skip_y])`` with ``x`` from before the image block;
2. ``x = B_image_i(x[, skip_x]) + P_i(y[tokens of m:])``, ``m = y[:tokens of m]``;
3. an in-layer keeps ``x`` (after the addition) and all of ``y`` as the skips of its out-layer.

The image's head reads the normed ``x``, the map's head ``m`` as it is, without a norm. ``P_i``
starts at zero, so that a fresh network predicts the image as its image stream alone does.

Parameter paths: ``image_stream`` holds exactly what a ``UViT`` of the image alone would;
``map_stream`` has ``<map>_in``, ``in_blocks``, ``mid_block``, ``out_blocks``, ``<map>_out``;
``exchange`` has ``in_blocks``, ``mid_block``, ``out_blocks``. All three are stacked with ``scan``,
as ``backbone`` says.

Source: PDM (arXiv 2412.02929) section 3.3; what is read, added and passed on when, its code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jointseg_jax.models.backbone import Backbone, Half, UBlocks
from jointseg_jax.models.embed import Spec, embed, head, head_products
from jointseg_jax.models.uvit import (
    Denoiser,
    Inputs,
    Predictions,
    Rule,
    Sizes,
    UViT,
    edge_products,
    with_added,
)

MAP = "map_stream/"
"""Prefix of the taps of the map stream."""

Pair = tuple[Array, Array]
"""Of the image stream and the map stream."""


class MapStream(nn.Module):
    """The second stream's own parts."""

    stream: str  # its name
    spec: Spec
    width: int
    backbone: Backbone

    def setup(self):
        self.embed = embed(self.stream, self.spec, self.width, self.backbone.dtype)
        if self.backbone.half:
            self.in_blocks, self.out_blocks = self.backbone.blocks(), self.backbone.blocks()
        self.mid_block = self.backbone.block()()
        self.head = head(self.stream, self.spec)


class Exchange(nn.Module):
    """The projections ``P_i`` from the map stream to the image stream, zero at first."""

    width: int
    bias: bool
    backbone: Backbone

    def setup(self):
        settings = {"use_bias": self.bias, "dtype": self.backbone.dtype}
        start = nn.initializers.zeros
        make = functools.partial(nn.Dense, self.width, kernel_init=start, **settings)
        if self.backbone.half:
            self.in_blocks, self.out_blocks = map(self.backbone.stacked, (make, make))
        self.mid_block = make()


class Layer(nn.Module):
    """The blocks of both streams and the projection between them."""

    image: nn.Module
    map: nn.Module
    exchange: nn.Module

    def __call__(self, state: Pair, skips: Pair | None, count: int) -> tuple[Pair, Pair]:
        """Tokens of ``x`` from ``count`` on are padding."""
        x, m = state  # [b, n (+ padding), d], [b, own, d]
        skip_x, skip_y = (None, None) if skips is None else skips
        own = m.shape[1]
        # (1) y = B_map(concat(m, x), skip_y). Attention does not know the order of tokens: with x
        # last, both streams end in the same padding.
        y = self.map(jnp.concatenate([m, x], axis=1), skip_y, own + count)
        # (2) x = B_image(x, skip_x) + P(y[tokens of m:])
        x = self.image(x, skip_x, count) + self.exchange(y[:, own:])
        return (x, y[:, :own]), (x, y)  # (3) x and all of y are kept


class TwoStream(Denoiser):
    """The denoiser of an image and a map, each with weights of its own.

    ``streams`` are the image, then the map; ``time_tokens`` the image alone: the map stream reads
    its token of time. Class, data type and context are tokens of the image stream.
    ``add_features=(("mask", "image"),)`` adds the map's features to the image's before its head.
    """

    exchange_bias: bool = False
    """A bias in every projection ``P_i``, as in the released code; the paper has none."""

    @nn.nowrap
    def own_rules(self) -> tuple[Rule, ...]:
        """Returns the rules of ``streams`` and ``time_tokens``."""
        names = tuple(n for n, _ in self.streams)
        times = f"time_tokens: the first stream's, {names[:1]}; given {self.time_tokens}"
        return (
            (len(names) == 2, f"streams: two, the image and then the map; given {names}"),
            (self.time_tokens == names[:1], times),
        )

    def setup(self):
        backbone, (_, (name, spec)) = Backbone.of(self), self.specs.items()
        self.image_stream = self.image_module()
        self.map_stream = MapStream(name, spec, self.width, backbone)
        self.exchange = Exchange(self.width, self.exchange_bias, backbone)
        parts = (self.image_stream, self.map_stream, self.exchange)
        if backbone.half:
            self.in_layers = self._paired(part.in_blocks for part in parts)
            self.out_layers = self._paired(part.out_blocks for part in parts)
        self.mid_layer = Layer(*(part.mid_block for part in parts))

    @nn.nowrap
    def _paired(self, halves: Iterable[nn.Module]) -> Half:
        """The layers of one half made of the streams' blocks, as ``Backbone.run`` takes them."""
        if self.scan:
            return Layer(*halves)
        return [Layer(*blocks) for blocks in zip(*(half.blocks for half in halves))]

    @nn.nowrap
    def run(self, given: Inputs, taps: Sequence[str]) -> Predictions:
        """The call, of inputs that fit."""
        backbone, (image, name), latents = Backbone.of(self), self.specs, given.latents
        own = {image: latents[image]}
        x = self.image_stream.embed(given._replace(latents=own))  # [b, n, width]
        m = self.map_stream.embed(latents[name])  # [b, first, width]
        tapped = {"tokens": x, MAP + "tokens": jnp.concatenate([x, m], axis=1)}
        within = [n for n in backbone.names if n in taps or MAP + n in taps]
        halves = (self.in_layers, self.out_layers) if backbone.half else ((), ())
        blocks = UBlocks(halves[0], self.mid_layer, halves[1])
        count, first = x.shape[1], m.shape[1]
        # one number of padding for both attentions, over x and over [m, x]: x ends both
        more = 0 if self.is_initializing() else backbone.padding(self.width, count, first + count)
        if more:
            x = jnp.pad(x, ((0, 0), (0, more), (0, 0)))

        def step(layer: nn.Module, state: Pair, skips: Pair | None) -> tuple[Pair, Pair]:
            return layer(state, skips, count)

        (x, m), kept = backbone.run(step, (x, m), blocks, within)
        for n, (of_image, of_map) in kept.items():
            # taps of the map stream are in the order of ``spans``: [x, m], without padding
            parts = [of_map[:, first : first + count], of_map[:, :first]]
            tapped |= {n: of_image[:, :count], MAP + n: jnp.concatenate(parts, axis=1)}
        tapped["norm"] = x = self.image_stream.last_norm(x[:, :count])
        features = with_added(self.add_features, self.image_stream.features(x, own) | {name: m})
        predictions = self.image_stream.predict({image: features[image]}, own)
        predictions[name] = self.map_stream.head(features[name], latents[name])
        return predictions, {n: tapped[n] for n in taps}

    @nn.nowrap
    def image_module(self) -> UViT:
        """Returns the image stream as a ``UViT`` of its own, whose parameters fit under it."""
        apart = ("streams", "add_features", "name", "parent")
        names = [f.name for f in dataclasses.fields(Denoiser) if f.name not in apart]
        fields = {n: getattr(self, n) for n in names}
        # parent=None: made within setup it would become a submodule where it is made
        return UViT(streams=tuple(self.specs.items())[:1], **fields, parent=None)

    @nn.nowrap
    def spans(self, sizes: Sizes | None = None) -> dict[str, slice]:
        """Returns where each part lies among the map stream's tokens, the image's first."""
        spans = self.image_module().spans(sizes)
        _, (name, spec) = self.specs.items()
        start = max(span.stop for span in spans.values())
        count = int(np.prod(spec.extent((sizes or {}).get(name))))
        return spans | {name: slice(start, start + count)}

    @nn.nowrap
    def tap_names(self) -> list[str]:
        """Returns the image stream's, and after ``map_stream/`` those of all the map's tokens."""
        blocks = ["tokens", *Backbone.of(self).names]
        return [*blocks, "norm", *(MAP + n for n in blocks)]


def lengths(module: TwoStream, sizes: Sizes | None = None) -> tuple[int, ...]:
    """Returns the numbers of tokens that attend to each other: image stream, map stream."""
    _, name = module.specs
    span = module.spans(sizes)[name]
    return span.start, span.stop


def forward_flops(module: TwoStream, sizes: Sizes | None = None) -> int:
    """Returns matrix-product FLOPs of one sample's forward pass, counted as for ``UViT``."""
    backbone, d = Backbone.of(module), module.width
    _, (name, spec) = module.specs.items()
    span = module.spans(sizes)[name]
    blocks = backbone.products(d, span.start) + backbone.products(d, span.stop)
    exchange = (2 * backbone.half + 1) * span.start * d * d  # P_i, on every token of the image's
    edges = edge_products(module.image_module(), sizes)
    edges += head_products(spec, d, span.stop - span.start)
    return 2 * (blocks + exchange + edges)

"""Two streams: a complete U-ViT for the image, a second U for the map, and an exchange between.

1. ``x`` = the image stream's tokens (class?, times, data type?, context?, image);
   ``m`` = the map's own, without time or text.
2. At every layer ``i``: ``y = B_map_i(concat(m, x)[, skip_y])`` with ``x`` from before the image
   block; ``x = B_image_i(x[, skip_x])``; then ``x = x + P_i(y[tokens of m:])`` over all tokens of
   the image stream, and ``m = y[:tokens of m]``. Attention does not know the order of tokens, and
   with ``x`` last both end in the same padding.
3. An in-layer leaves ``x`` (after the addition) and all of ``y`` as the skips of its out-layer.
4. The image's head reads the normed ``x``, the map's head ``m`` as it is, without a norm.

``P_i`` starts at zero, so that a fresh network predicts the image as its image stream alone does.

Parameter paths: ``image_stream`` holds exactly what a ``UViT`` of the image alone would;
``map_stream`` has ``<map>_in``, ``in_blocks``, ``mid_block``, ``out_blocks``, ``<map>_out``;
``exchange`` has ``in_blocks``, ``mid_block``, ``out_blocks``. All three are stacked with ``scan``,
as ``trunk`` says.

Source: PDM (arXiv 2412.02929) section 3.3; what is read, added and pushed when, its released code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jointseg_jax.models.checks import check_call, check_fields, extent
from jointseg_jax.models.embed import Spec, head_products, way_in, way_out
from jointseg_jax.models.trunk import Layers, Trunk
from jointseg_jax.models.uvit import Sizes, UViT, edge_products, normalise_fields, with_added
from jointseg_jax.types import Streams

MAP = "map_stream/"
"""What stands before the taps of the map stream."""


class MapStream(nn.Module):
    """The second stream's own parts."""

    stream: str
    spec: Spec
    width: int
    trunk: Trunk

    def setup(self):
        self.enter = way_in(self.stream, self.spec, self.width, self.trunk.dtype)
        if self.trunk.half:
            self.in_blocks, self.out_blocks = self.trunk.blocks(), self.trunk.blocks()
        self.mid_block = self.trunk.block()()
        self.leave = way_out(self.stream, self.spec)


class Exchange(nn.Module):
    """What the image stream takes of the map stream after each block, nothing at first."""

    width: int
    bias: bool
    trunk: Trunk

    def setup(self):
        make = functools.partial(
            nn.Dense,
            self.width,
            use_bias=self.bias,
            dtype=self.trunk.dtype,
            kernel_init=nn.initializers.zeros,
        )
        if self.trunk.half:
            self.in_blocks, self.out_blocks = self.trunk.stacked(make), self.trunk.stacked(make)
        self.mid_block = make()


class Layer(nn.Module):
    """The blocks of both streams and the projection between them.  Source: the module's 2 and 3."""

    image: nn.Module
    map: nn.Module
    exchange: nn.Module

    def __call__(
        self, state: tuple[Array, Array], skips: tuple[Array, Array] | None, count: int
    ) -> Any:
        """Tokens of ``x`` from ``count`` on are padding."""
        x, m = state
        skip_x, skip_y = (None, None) if skips is None else skips
        own = m.shape[1]
        y = self.map(jnp.concatenate([m, x], axis=1), skip_y, own + count)
        x = self.image(x, skip_x, count) + self.exchange(y[:, own:])
        return (x, y[:, :own]), (x, y)


class TwoStream(nn.Module):
    """The denoiser of an image and a map, each with weights of its own.

    Args:
      streams: the image, then the map, as ``UViT`` takes them.
      time_tokens: the image alone; the map stream reads the image stream's time token.
      exchange_bias: a bias in every projection from the map stream to the image stream, as in the
        released code; the paper has none.
      add_features: ``(("mask", "image"),)`` adds the map's features to the image's before its head.

    The other fields are those of ``UViT`` and hold for both streams; class, data type and context
    are tokens of the image stream.
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
    add_features: Any = ()
    skip: bool = True
    qkv_bias: bool = False
    time_mlp: bool = False
    dtype: Any = "float32"
    attention: str = "auto"
    scan: bool = False
    remat: str = "none"
    exchange_bias: bool = False
    share: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        normalise_fields(self)
        names = tuple(n for n, _ in self.streams)
        check_fields(
            self,
            (len(names) == 2, f"streams: two, the image and then the map; given {names}"),
            (
                self.time_tokens == names[:1],
                f"time_tokens: the first stream's, {names[:1]}; given {self.time_tokens}",
            ),
        )
        super().__post_init__()

    def setup(self):
        trunk = Trunk.of(self)
        self.image_stream = self.image_module()
        self.map_stream = MapStream(*self.streams[1], self.width, trunk)
        self.exchange = Exchange(self.width, self.exchange_bias, trunk)
        parts = (self.image_stream, self.map_stream, self.exchange)
        if trunk.half:
            self.in_layers = self._paired(part.in_blocks for part in parts)
            self.out_layers = self._paired(part.out_blocks for part in parts)
        self.mid_layer = Layer(*(part.mid_block for part in parts))

    @nn.nowrap
    def _paired(self, halves: Any) -> Layer | list[Layer]:
        """The layers of one half out of the streams' blocks, as ``Trunk.run`` takes them."""
        if self.scan:
            return Layer(*halves)
        return [Layer(*blocks) for blocks in zip(*(half.all for half in halves))]

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
        """Predicts both streams; the arguments are those of ``UViT.__call__``."""
        check_call(self, latents, times, text, class_id, data_type, taps)
        trunk, (image, name) = Trunk.of(self), [n for n, _ in self.streams]
        own = {image: latents[image]}
        x = self.image_stream.embed(own, times, text, class_id, data_type)
        m = self.map_stream.enter(latents[name])
        tapped = {"tokens": x, MAP + "tokens": jnp.concatenate([x, m], axis=1)}
        within = [n for n in trunk.names if n in taps or MAP + n in taps]
        halves = (self.in_layers, self.out_layers) if trunk.half else ((), ())
        layers = Layers(halves[0], self.mid_layer, halves[1])
        count, first = x.shape[1], m.shape[1]
        more = 0 if self.is_initializing() else trunk.padding(self.width, count, first + count)
        if more:
            x = jnp.pad(x, ((0, 0), (0, more), (0, 0)))
        (x, m), left = trunk.run(functools.partial(_layer, count=count), (x, m), layers, within)
        for n, (of_image, of_map) in left.items():
            parts = [of_map[:, first : first + count], of_map[:, :first]]
            tapped |= {n: of_image[:, :count], MAP + n: jnp.concatenate(parts, axis=1)}
        tapped["norm"] = x = self.image_stream.last_norm(x[:, :count])
        features = with_added(self.add_features, self.image_stream.features(x, own) | {name: m})
        predictions = self.image_stream.predict({image: features[image]}, own)
        predictions[name] = self.map_stream.leave(features[name], latents[name])
        return predictions, {n: tapped[n] for n in taps}

    @nn.nowrap
    def image_module(self) -> UViT:
        """The image stream as a ``UViT`` of its own, whose parameters fit under it."""
        apart = ("streams", "share", "add_features", "name", "parent")
        names = [f.name for f in dataclasses.fields(UViT) if f.name not in apart]
        fields = {n: getattr(self, n) for n in names}
        return UViT(streams=self.streams[:1], **fields, parent=None)

    @nn.nowrap
    def spans(self, sizes: Sizes | None = None) -> dict[str, slice]:
        """Where each part lies among the map stream's tokens, which begin with the image's."""
        spans = self.image_module().spans(sizes)
        name, spec = self.streams[1]
        start = max(span.stop for span in spans.values())
        count = int(np.prod(extent(spec, (sizes or {}).get(name))))
        return spans | {name: slice(start, start + count)}

    @nn.nowrap
    def tap_names(self) -> list[str]:
        """Those of the image stream, and before them ``map_stream/`` all tokens of the map's."""
        blocks = ["tokens", *Trunk.of(self).names]
        return [*blocks, "norm", *(MAP + n for n in blocks)]

    @nn.nowrap
    def input_shapes(self, batch: int = 1) -> dict[str, Any]:
        """Keyword arguments of ``__call__`` as ``ShapeDtypeStruct``, all at native sizes."""
        shapes = self.image_module().input_shapes(batch)
        name, spec = self.streams[1]
        shapes["latents"][name] = jax.ShapeDtypeStruct((batch, *spec.shape), jnp.float32)
        shapes["times"][name] = jax.ShapeDtypeStruct((batch,), jnp.float32)
        return shapes


def _layer(layer: Layer, state: tuple, skips: tuple | None, count: int) -> Any:
    return layer(state, skips, count)


def lengths(module: TwoStream, sizes: Sizes | None = None) -> tuple[int, ...]:
    """Numbers of tokens that attend to each other, image stream and map stream."""
    span = module.spans(sizes)[module.streams[1][0]]
    return span.start, span.stop


def forward_flops(module: TwoStream, sizes: Sizes | None = None) -> int:
    """Matrix-product FLOPs of one sample's forward pass, counted as for ``UViT``."""
    trunk, d, image = Trunk.of(module), module.width, module.image_module()
    name, spec = module.streams[1]
    span = module.spans(sizes)[name]
    blocks = trunk.products(d, span.start) + trunk.products(d, span.stop)
    exchange = (2 * trunk.half + 1) * span.start * d * d
    edges = edge_products(image, sizes) + head_products(spec, d, span.stop - span.start)
    return 2 * (blocks + exchange + edges)

"""A U-Net whose middle is a U-ViT: for small pictures, where outlines matter and time is short.

``x`` = the streams in patches of ``2^(levels + 1)`` side by side, ``[b, h, w, channels]``; all
others (latents of a coarser grid, sequences) are tokens as in ``uvit``, those in ``share`` on the
tokens of the grid. ``c`` = the time tokens + the mean word.

1. stem: 2 x 2 cells to channels, a 3 x 3 convolution, a residual block; then once more for each
   further width, and at last 2 x 2 cells to one token.
2. the U-ViT of ``uvit``: tokens = [class?, times, data type?, context?, grid].
3. head: each token to 2 x 2 cells, joined with the stem's output of that size, a residual block;
   and so on up to the cells, where the head of ``embed`` (4) sees the noisy cells of all streams.
4. with ``self_condition`` the network reads, beside ``x``, an estimate of its data: the network's
   own answer to the step before, or zeros. What it has decided it need not find again in the noise.
5. residual block: ``x + conv(relu(conv(norm(x) (1 + scale(c)) + shift(c))))``.

Outside the U-ViT only modulations and the last layer have a bias, and a block has one norm: on a
CPU the sums over all cells in their gradients take longer than the products.

Parameter paths: those of ``uvit``, with ``stem`` and ``head`` in place of ``<stream>_in`` and
``<stream>_out`` of the streams in ``x``.

Source: U-Net with time-modulated residual blocks, Dhariwal & Nichol 2021 (arXiv 2105.05233);
a transformer in its middle, Hoogeboom et al. 2023 (arXiv 2301.11093); 4, analog bits, Chen et al.
2022 (arXiv 2208.04202) section 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jointseg_jax.models.backbone import REMAT, Backbone
from jointseg_jax.models.blocks import NORM_EPSILON, linear, normal
from jointseg_jax.models.embed import (
    Patches,
    conv,
    embed,
    head,
    head_products,
    predict_cells,
    resize_position,
)
from jointseg_jax.models.uvit import Inputs, Predictions, Rule, Sizes, UViT, lengths
from jointseg_jax.sharding import constrain

Grid = Float[Array, "batch _ _ _"]
Condition = Float[Array, "batch width"]


def gather(x: Grid) -> Grid:
    """2 x 2 cells to the channels of one, at half the size."""
    return rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=2, q=2)


def spread(x: Grid) -> Grid:
    """Inverse of ``gather``."""
    return rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=2, q=2)


class Residual(nn.Module):
    """A residual block of two convolutions, modulated by the condition."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Grid, condition: Condition) -> Grid:
        width = x.shape[-1]
        film = linear(2 * width, "film", self.dtype)(nn.relu(condition))  # [b, 2 width]
        scale, shift = jnp.split(film[:, None, None], 2, axis=-1)
        # (5) x + conv(relu(conv(norm(x) (1 + scale) + shift))); the norm's own are scale and shift
        norm = nn.LayerNorm(NORM_EPSILON, self.dtype, use_bias=False, use_scale=False)
        h = nn.relu(conv(width, "conv_1", self.dtype)(norm(x) * (1 + scale) + shift))
        x = x + conv(width, "conv_2", self.dtype, zero=True)(h)
        return x if self.is_initializing() else constrain(x, "batch", "tokens", "tokens", "width")


class Stem(nn.Module):
    """Streams to a grid of tokens, and what the head joins again."""

    widths: tuple[int, ...]
    width: int  # of a token
    cells: tuple[int, int]  # rows and columns of tokens at the native size
    dtype: DTypeLike
    block: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Grid, condition: Condition) -> tuple[Grid, list[Grid]]:
        skips = []
        for i, width in enumerate(self.widths):
            x = conv(width, f"conv_{i}", self.dtype)(gather(x))  # [b, h / 2^(i + 1), .., width]
            x = self.block(self.dtype, name=f"block_{i}")(x, condition)
            skips.append(x)
        x = linear(self.width, "project", self.dtype, bias=False)(gather(x))
        position = self.param("position", normal, (*self.cells, self.width))
        cells = (x.shape[1], x.shape[2])
        return x + resize_position(position, cells)[None].astype(self.dtype), skips


class Head(nn.Module):
    """A grid of tokens to the predictions of all streams, side by side, in float32."""

    units: int  # hidden units of every cell
    channels: int  # of all streams
    dtype: DTypeLike
    block: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Grid, skips: Sequence[Grid], noisy: Grid, condition: Condition) -> Grid:
        for i, skip in reversed(list(enumerate(skips))):
            width = skip.shape[-1]
            x = spread(linear(4 * width, f"up_{i}", self.dtype, bias=False)(x))
            x = x + linear(width, f"join_{i}", self.dtype, bias=False)(skip)
            x = self.block(self.dtype, name=f"block_{i}")(x, condition)
        x = spread(linear(4 * self.units, "up", self.dtype, bias=False)(x))  # [b, h, w, units]
        return predict_cells(x, noisy, self.channels, self.dtype)


class UNet(UViT):
    """The denoiser of streams on one grid, which meet in every cell; any others are tokens."""

    widths: Sequence[int] = (64,)
    """Channels of the convolutional levels, at a half, a quarter, ... of the grid; the tokens come
    after the last, so that the ``patch`` of a stream on the grid is ``2^(levels + 1)``."""
    units: int = 32
    """Hidden units of every cell's own head."""
    self_condition: bool = False
    """An estimate of the data is read beside the streams of the grid."""

    def __post_init__(self):
        self.widths = tuple(self.widths)
        super().__post_init__()

    @property
    def grids(self) -> dict[str, Patches]:
        """The streams on the grid, by name."""
        side = 2 ** (len(self.widths) + 1)
        specs = self.specs.items()
        return {n: s for n, s in specs if isinstance(s, Patches) and s.patch == side}

    @property
    def together(self) -> tuple[str, ...]:
        """The streams on the tokens of the grid."""
        return (*self.grids, *self.share)

    @property
    def estimated(self) -> tuple[str, ...]:
        """The streams on the grid, with ``self_condition``."""
        return tuple(self.grids) if self.self_condition else ()

    @nn.nowrap
    def own_rules(self) -> tuple[Rule, ...]:
        """Returns the rules of streams, ``share``, ``add_features`` and the levels."""
        grids = self.grids.values()
        side = 2 ** (len(self.widths) + 1)
        alike = len({s.grid for s in grids}) < 2
        plain = not any(s.conv or s.tanh or s.units for s in grids)
        cells = {n: s.extent() for n, s in self.specs.items() if isinstance(s, Patches)}
        on = {cells[n] for n in self.grids}
        shared = not any(n in self.grids or cells.get(n) not in on for n in self.share)
        levels = bool(self.widths) and min(*self.widths, self.units) >= 1
        given = f"given {self.share} and tokens {cells}"
        text = f"streams: one or more with patch {side} = 2^(levels + 1), widths={self.widths}"
        return (
            (bool(grids), f"{text}; given {dict(self.streams)}"),
            (alike, f"streams: those with patch {side} on one grid; given {dict(self.streams)}"),
            (plain, "streams: without conv, tanh and units, for all meet in one head"),
            (shared, f"share: coarser streams with the grid's rows and columns of tokens; {given}"),
            (
                not self.add_features,
                "add_features: empty, for streams on the grid share every cell",
            ),
            (levels, f"widths and units: at least 1; given {self.widths}, {self.units}"),
        )

    def setup_edges(self) -> None:
        """Makes stem and head, and embeddings and heads of the streams that are tokens."""
        spec, block = next(iter(self.grids.values())), Residual
        if self.remat != "none":
            block = nn.remat(Residual, policy=REMAT[self.remat])
        self.stem = Stem(tuple(self.widths), self.width, spec.extent(), self.dtype, block)
        channels = sum(spec.channels for spec in self.grids.values())
        self.head = Head(self.units, channels, self.dtype, block)
        others = {n: s for n, s in self.specs.items() if n not in self.grids}
        self.embeds = {n: embed(n, s, self.width, self.dtype) for n, s in others.items()}
        self.stream_heads = {n: head(n, s) for n, s in others.items()}
        if self.context is not None:
            self.context_mean = linear(self.width, "context_mean", self.dtype, bias=False)

    @nn.nowrap
    def run(self, given: Inputs, taps: Sequence[str]) -> Predictions:
        """The call, of inputs that fit."""
        parts, latents, grids = self.conditions(given), given.latents, self.grids
        seen, estimates = [latents[n] for n in grids], given.estimates or {}
        # (4) and the estimates, zeros where there is none
        seen += [estimates.get(n, jnp.zeros_like(latents[n])) for n in self.estimated]
        noisy = jnp.concatenate(seen, axis=-1).astype(self.dtype)  # [b, h, w, c] or twice c
        times = jnp.concatenate([parts[f"time_{n}"] for n in self.time_tokens], axis=1)
        condition = times.sum(axis=1)  # [b, width]
        if "context" in parts:
            condition = condition + self.context_mean(parts["context"].mean(axis=1))
        grid, skips = self.stem(noisy, condition)  # [b, rows, columns, width]
        tokens = rearrange(grid, "b r s d -> b (r s) d")
        for name in self.share:
            tokens = tokens + self.embeds[name](latents[name])
        for name in self.specs:
            if name == self.together[0]:  # where ``spans`` has all of them
                parts[name] = tokens
            elif name not in self.together:
                parts[name] = self.embeds[name](latents[name])
        x, tapped = self.transform(jnp.concatenate([*parts.values()], axis=1), taps)
        features = self.features(x, latents)
        cells = features[self.together[0]].reshape(grid.shape)
        out = self.head(cells, skips, noisy, condition)  # [b, h, w, channels of all]
        ends = np.cumsum([spec.channels for spec in grids.values()])[:-1].tolist()
        predictions = dict(zip(grids, jnp.split(out, ends, axis=-1)))
        others = {n: self.stream_heads[n](features[n], latents[n]) for n in self.embeds}
        return predictions | others, tapped


def forward_flops(module: UNet, sizes: Sizes | None = None) -> int:
    """Returns matrix-product FLOPs of one sample's forward pass, counted as for ``UViT``."""
    d, (tokens,) = module.width, lengths(module, sizes)
    channels = sum(spec.channels for spec in module.grids.values())
    seen = 2 * channels if module.self_condition else channels
    name, spec = next(iter(module.grids.items()))
    spans = module.spans(sizes)
    rows, columns = spec.extent((sizes or {}).get(name))
    total = len(module.time_tokens) * 8 * d * d if module.time_mlp else 0
    if module.context is not None:
        total += module.context.products(d, module.context.count) + d * d
    for other in module.specs.keys() - module.grids.keys():
        count = spans[other].stop - spans[other].start
        total += head_products(module.specs[other], d, count)
    below = d
    for i, width in reversed(list(enumerate(module.widths))):
        rows, columns = 2 * rows, 2 * columns  # (3) of the grid that level i has
        taps = (3 * rows - 2) * (3 * columns - 2)  # of a convolution: none on the zeros around
        ins = module.widths[i - 1] if i else seen
        total += taps * width * (4 * ins + 4 * width)  # stem, two residual blocks
        total += rows * columns * width * (width + below)  # join, up
        total += 4 * d * width  # film of two blocks
        below = width
    cells, last = rows * columns, module.widths[-1]
    total += math.prod(spec.extent((sizes or {}).get(name))) * 4 * last * d  # to tokens
    total += cells * 4 * below * module.units  # to cells
    total += (6 * rows - 2) * (6 * columns - 2) * seen * module.units  # in every cell
    total += 4 * cells * module.units * (module.units + channels)
    return 2 * (Backbone.of(module).products(d, tokens) + total)

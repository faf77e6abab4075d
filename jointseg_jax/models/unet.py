"""A U-Net whose middle is a U-ViT: for small pictures, where outlines matter and time is short.

``x`` = all streams side by side, ``[b, h, w, channels]``; ``c`` = the time tokens + the mean word.

1. stem: 2 x 2 cells to channels, a 3 x 3 convolution, a residual block; then once more for each
   further width, and at last 2 x 2 cells to one token.
2. the U-ViT of ``uvit``: tokens = [class?, times, data type?, context?, grid].
3. head: each token to 2 x 2 cells, joined with the stem's output of that size, a residual block;
   and so on up to the cells, where ``prediction = W relu(U relu(up(h) + V x))``, V a 3 x 3
   convolution: every cell sees its own noisy value and its neighbours'.
4. residual block: ``x + conv(relu(conv(norm(x) (1 + scale(c)) + shift(c))))``.

Outside the U-ViT only modulations and the last layer have a bias, and a block has one norm: on a
CPU the sums over all cells in their gradients take longer than the products.

Parameter paths: those of ``uvit`` without ``<stream>_in`` and ``<stream>_out``; ``stem``, ``head``.

Source: U-Net with time-modulated residual blocks, Dhariwal & Nichol 2021 (arXiv 2105.05233);
a transformer in its middle, Hoogeboom et al. 2023 (arXiv 2301.11093).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jointseg_jax.models.backbone import REMAT, Backbone
from jointseg_jax.models.blocks import NORM_EPSILON, linear, normal
from jointseg_jax.models.embed import Patches, resize_position
from jointseg_jax.models.uvit import Inputs, Predictions, Rule, Sizes, UViT, lengths
from jointseg_jax.sharding import constrain

Grid = Float[Array, "batch _ _ _"]
Condition = Float[Array, "batch width"]


def conv(features: int, name: str, dtype: DTypeLike, *, zero: bool = False) -> nn.Conv:
    """Returns a 3 x 3 convolution without bias; ``zero`` starts a residual block as identity."""
    start = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
    return nn.Conv(
        features, (3, 3), padding=1, use_bias=False, dtype=dtype, kernel_init=start, name=name
    )


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
        # (4) x + conv(relu(conv(norm(x) (1 + scale) + shift))); the norm's own are scale and shift
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
        # (3) W relu(U relu(up(h) + V x)): twice, for a cell has to choose between its neighbours
        h = nn.relu(x + conv(self.units, "conv_cell", self.dtype)(noisy))
        h = nn.relu(linear(self.units, "cell", self.dtype, bias=False)(h))
        return linear(noisy.shape[-1], "project", jnp.float32)(h)


class UNet(UViT):
    """The denoiser of streams on one grid, which meet in every cell."""

    widths: Sequence[int] = (64,)
    """Channels of the convolutional levels, at a half, a quarter, ... of the grid; the tokens come
    after the last, so that a stream's ``patch`` is ``2^(levels + 1)``."""
    units: int = 32
    """Hidden units of every cell's own head."""

    def __post_init__(self):
        self.widths = tuple(self.widths)
        super().__post_init__()

    @property
    def together(self) -> tuple[str, ...]:
        """All streams."""
        return tuple(self.specs)

    @nn.nowrap
    def own_rules(self) -> tuple[Rule, ...]:
        """Returns the rules of streams, ``share``, ``add_features`` and the levels."""
        grids = [s for s in self.specs.values() if isinstance(s, Patches)]
        looks = {(s.grid, s.patch, s.conv, s.tanh) for s in grids}
        alike = len(grids) == len(self.specs) and len(looks) == 1
        plain = not any(s.conv or s.tanh for s in grids)
        side = 2 ** (len(self.widths) + 1)
        fits = all(s.patch == side for s in grids)
        apart = not self.share and not self.add_features
        levels = bool(self.widths) and min(*self.widths, self.units) >= 1
        return (
            (alike, f"streams: on one grid with one patch; given {dict(self.streams)}"),
            (plain, "streams: without conv and tanh, for all meet in one head"),
            (fits, f"patch: {side} = 2^(levels + 1) with widths={self.widths}"),
            (apart, "share and add_features: empty, for all streams share every cell"),
            (levels, f"widths and units: at least 1; given {self.widths}, {self.units}"),
        )

    def setup_edges(self) -> None:
        """Makes stem and head."""
        spec, block = next(iter(self.grids.values())), Residual
        if self.remat != "none":
            block = nn.remat(Residual, policy=REMAT[self.remat])
        self.stem = Stem(tuple(self.widths), self.width, spec.extent(), self.dtype, block)
        self.head = Head(self.units, self.dtype, block)
        if self.context is not None:
            self.context_mean = linear(self.width, "context_mean", self.dtype, bias=False)

    @nn.nowrap
    def run(self, given: Inputs, taps: Sequence[str]) -> Predictions:
        """The call, of inputs that fit."""
        parts = self.conditions(given)
        noisy = jnp.concatenate([given.latents[n] for n in self.specs], axis=-1)  # [b, h, w, c]
        noisy = noisy.astype(self.dtype)
        times = jnp.concatenate([parts[f"time_{n}"] for n in self.time_tokens], axis=1)
        condition = times.sum(axis=1)  # [b, width]
        if "context" in parts:
            condition = condition + self.context_mean(parts["context"].mean(axis=1))
        grid, skips = self.stem(noisy, condition)
        cells = grid.shape[1:3]
        tokens = [*parts.values(), rearrange(grid, "b r s d -> b (r s) d")]
        x, tapped = self.transform(jnp.concatenate(tokens, axis=1), taps)
        x = x[:, -math.prod(cells) :].reshape(-1, *cells, self.width)
        out = self.head(x, skips, noisy, condition)  # [b, h, w, channels of all]
        ends = np.cumsum([spec.channels for spec in self.grids.values()])[:-1].tolist()
        return dict(zip(self.specs, jnp.split(out, ends, axis=-1))), tapped

    @property
    def grids(self) -> dict[str, Patches]:
        """The streams by name."""
        return cast(dict[str, Patches], self.specs)  # by ``own_rules``


def forward_flops(module: UNet, sizes: Sizes | None = None) -> int:
    """Returns matrix-product FLOPs of one sample's forward pass, counted as for ``UViT``."""
    d, (tokens,) = module.width, lengths(module, sizes)
    channels = sum(spec.channels for spec in module.grids.values())
    name, spec = next(iter(module.grids.items()))
    rows, columns = spec.extent((sizes or {}).get(name))
    total = len(module.time_tokens) * 8 * d * d if module.time_mlp else 0
    if module.context is not None:
        total += module.context.products(d, module.context.count) + d * d
    below = d
    for i, width in reversed(list(enumerate(module.widths))):
        rows, columns = 2 * rows, 2 * columns  # (3) of the grid that level i has
        taps = (3 * rows - 2) * (3 * columns - 2)  # of a convolution: none on the zeros around
        ins = module.widths[i - 1] if i else channels
        total += taps * width * (4 * ins + 4 * width)  # stem, two residual blocks
        total += rows * columns * width * (width + below)  # join, up
        total += 4 * d * width  # film of two blocks
        below = width
    cells, last = rows * columns, module.widths[-1]
    total += math.prod(spec.extent((sizes or {}).get(name))) * 4 * last * d  # to tokens
    total += cells * 4 * below * module.units  # to cells
    total += (6 * rows - 2) * (6 * columns - 2) * channels * module.units  # in every cell
    total += 4 * cells * module.units * (module.units + channels)
    return 2 * (Backbone.of(module).products(d, tokens) + total)

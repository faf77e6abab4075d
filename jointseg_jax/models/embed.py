"""Streams as tokens: what a stream is made of, its embedding, and its head.

1. ``sinusoid(t) = [cos(t f), sin(t f)]``, ``f_i = 10000^(-i / half)``, ``half = width / 2``.
2. patches are flattened as (row, column, channel), channel fastest, on both sides; a strided
   convolution is then a Linear.
3. every part carries its own position parameter; that of a patch grid is ``[rows, columns, width]``
   and is resized bilinearly to the grid at hand.

4. a patch head is one Linear, or with ``units`` in every cell ``W relu(U relu(up(h) + V x))`` of
   its token's part ``up(h)`` and the noisy latents ``x``, V a 3 x 3 convolution: sharp outlines and
   clean surfaces need no work of the tokens (not in the papers, whose patches are small).

The sinusoid and the predictions are float32 whatever ``dtype``. Initial values: Linear and
positions normal(0.02), bias 0; the patch Linear and ``conv`` torch's convolution default,
``U(-1/sqrt(fan_in), 1/sqrt(fan_in))`` for kernel and bias; tables normal(1), torch's default.

Source: U-ViT (arXiv 2209.12152) section 3; UniDiffuser (arXiv 2303.06555) appendix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jointseg_jax.models.blocks import linear, normal
from jointseg_jax.types import require_values

MAX_PERIOD = 10_000.0


def torch_inits(fan_in: int) -> dict[str, Any]:
    """Returns torch's defaults for a kernel and a bias, uniform within ``1 / sqrt(fan_in)``."""

    def bias(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * fan_in**-0.5

    # variance 1/3 of the fan-in's inverse: uniform within sqrt(3 * 1/3 / fan_in)
    kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return {"kernel_init": kernel, "bias_init": bias}


@dataclass(frozen=True, kw_only=True)
class Patches:
    """A stream of latents on a grid, ``[batch, height, width, channels]``, in square patches."""

    grid: Sequence[int]  # native height and width in latent cells; others get resized positions
    channels: int
    patch: int  # side of a patch in latent cells
    conv: bool = False  # a 3x3 convolution after the patches are put together again
    tanh: bool = False  # squashes the output into (-1, 1)
    units: int = 0  # hidden units of a head in every cell, which sees the noisy cells; 0 = none

    def __post_init__(self):
        object.__setattr__(self, "grid", tuple(self.grid))
        good = len(self.grid) == 2 and min(*self.grid, self.channels, self.patch) >= 1
        good = good and self.units >= 0
        given = {name: getattr(self, name) for name in ("grid", "channels", "patch", "units")}
        rule = "grid is (height, width), units at least 0 and all others at least 1."
        require_values("Patches", good, rule, **given)
        self.extent()

    def extent(self, size: Sequence[int] | None = None) -> tuple[int, int]:
        """Returns rows and columns of patches in a latent of this height and width, or natively.

        Raises:
          ValueError: patches do not divide it.
        """
        size = self.grid if size is None else size
        if size[0] % self.patch or size[1] % self.patch:
            raise ValueError(
                f"Patches: {size[0]}x{size[1]} latent cells cannot be cut into patches of "
                f"{self.patch}x{self.patch}; change the grid or the patch of this stream."
            )
        return size[0] // self.patch, size[1] // self.patch

    @property
    def tokens(self) -> int:
        """Tokens at the native size."""
        return math.prod(self.extent())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample at the native size."""
        return (*self.grid, self.channels)

    def products(self, width: int, count: int) -> int:
        """Returns multiply-adds between ``count`` tokens and their patches, one way."""
        return count * self.patch**2 * self.channels * width

    def check(self, shape: tuple[int, ...], *, where: str) -> None:
        """Raises ValueError if a batch of this shape is not one of this stream's latents."""
        if len(shape) != 4 or shape[3] != self.channels:
            raise ValueError(
                f"{where} has shape {shape}, want (batch, height, width, {self.channels}); "
                "change its spec or its codec."
            )
        try:
            self.extent(shape[1:3])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A stream (or context) that is a sequence of vectors already, ``[batch, count, width]``."""

    count: int  # length of the sequence
    width: int  # size of one vector
    inner: int = 0  # size of a linear bottleneck in the embedding and in the head; 0 = none

    def __post_init__(self):
        good = min(self.count, self.width) >= 1 and self.inner >= 0
        rule = "count and width are at least 1, inner at least 0."
        require_values("Tokens", good, rule, **asdict(self))

    def extent(self, size: Sequence[int] | None = None) -> tuple[int, ...]:
        """Returns the number of tokens; ``size`` is for grids."""
        del size
        return (self.count,)

    @property
    def tokens(self) -> int:
        return self.count

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.count, self.width)

    def products(self, width: int, count: int) -> int:
        """Returns multiply-adds between ``count`` tokens and their vectors, one way."""
        if self.inner:
            return count * self.inner * (self.width + width)
        return count * self.width * width

    def check(self, shape: tuple[int, ...], *, where: str) -> None:
        """Raises ValueError if a batch of this shape is not one of this stream's vectors."""
        if len(shape) != 3 or shape[1:] != self.shape:
            raise ValueError(
                f"{where} has shape {shape}, want (batch, {self.count}, {self.width}); "
                "change its spec or its codec."
            )


Spec = Patches | Tokens
SPECS: dict[str, type] = {"patches": Patches, "tokens": Tokens}


def spec_of(value: object, *, where: str) -> Spec:
    """Returns the spec that ``{"kind": "patches", ...}`` describes; a spec is returned as is.

    Raises:
      ValueError: no mapping, an unknown kind, or fields that it refuses; begins with ``where``.
    """
    if isinstance(value, Spec):
        return value
    items = getattr(value, "items", None)  # not Mapping: ml_collections' ConfigDict is none
    if items is None:
        raise ValueError(f"{where}: {value!r} is neither a spec nor a mapping with a `kind`.")
    fields = dict(items())
    kind = fields.pop("kind", None)
    if kind not in SPECS:
        raise ValueError(f"{where}: kind is {kind!r}; it must be one of: {', '.join(SPECS)}.")
    try:
        return SPECS[kind](**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def sinusoid(t: Float[Array, " batch"], width: int) -> Float[Array, "batch width"]:
    """Returns cosines, then sines, of a time label at geometrically spaced frequencies."""
    half = width // 2
    # (1) f_i = 10000^(-i / half); float32 whatever the dtype: bfloat16 cannot tell 999 from 1000
    frequencies = jnp.exp(-jnp.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]  # [b, width / 2]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def patchify(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n d"]:
    """Cuts a grid into row-major patches, each flattened with the channel fastest."""
    return rearrange(x, "b (r p) (s q) c -> b (r s) (p q c)", p=patch, q=patch)


def unpatchify(
    x: Float[Array, "b n d"], cells: tuple[int, int], patch: int
) -> Float[Array, "b h w c"]:
    """Inverse of ``patchify``."""
    return rearrange(x, "b (r s) (p q c) -> b (r p) (s q) c", r=cells[0], p=patch, q=patch)


def resize_position(
    position: Float[Array, "rows columns width"], cells: tuple[int, int]
) -> Float[Array, "new_rows new_columns width"]:
    """Resizes bilinearly with half-pixel centres, without antialiasing."""
    if position.shape[:2] == cells:  # no resize in the program at the native size
        return position
    return jax.image.resize(position, (*cells, position.shape[2]), "bilinear", antialias=False)


class TimeToken(nn.Module):
    """A time label as one token, optionally through Linear-SiLU-Linear."""

    width: int
    mlp: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, t: Float[Array, " batch"]) -> Float[Array, "batch 1 width"]:
        x = sinusoid(t, self.width).astype(self.dtype)  # [b, width]
        if self.mlp:
            x = nn.silu(linear(4 * self.width, "fc1", self.dtype)(x))
            x = linear(self.width, "fc2", self.dtype)(x)
        position = self.param("position", normal, (1, self.width))
        return x[:, None] + position[None].astype(self.dtype)  # [b, 1, width]


class IndexToken(nn.Module):
    """An integer (class, data type) as one token of a trained table."""

    size: int  # rows of the table
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, index: Int[Array, " batch"]) -> Float[Array, "batch 1 width"]:
        table = self.param("embedding", nn.initializers.normal(1.0), (self.size, self.width))
        position = self.param("position", normal, (1, self.width))
        # jnp.take gives NaN for an index outside the table: loud, where clamping would be silent
        return (jnp.take(table, index, axis=0)[:, None] + position[None]).astype(self.dtype)


class TokensIn(nn.Module):
    """Vectors to tokens."""

    spec: Tokens
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch count d"]) -> Float[Array, "batch count width"]:
        x = x.astype(self.dtype)
        if self.spec.inner:
            x = linear(self.spec.inner, "squeeze", self.dtype)(x)  # [b, n, inner]
        position = self.param("position", normal, (self.spec.count, self.width))
        return linear(self.width, "project", self.dtype)(x) + position[None].astype(self.dtype)


class TokensOut(nn.Module):
    """Tokens to vectors, in float32."""

    spec: Tokens

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch count width"], noisy: Float[Array, "batch count d"]
    ) -> Float[Array, "batch count d"]:
        del noisy  # the signature of PatchesOut; sequences are always of the native size
        x = linear(self.spec.inner or self.spec.width, "project", jnp.float32)(x)
        return linear(self.spec.width, "expand", jnp.float32)(x) if self.spec.inner else x


class PatchesIn(nn.Module):
    """A grid of latents to tokens, with positions resized to the grid's size."""

    spec: Patches
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch tokens width"]:
        fan_in = self.spec.patch**2 * self.spec.channels
        project = nn.Dense(self.width, dtype=self.dtype, name="project", **torch_inits(fan_in))
        native = (*self.spec.extent(), self.width)
        position = self.param("position", normal, native)  # [rows, columns, width]
        position = resize_position(position, self.spec.extent(x.shape[1:3]))
        # (2) a convolution whose stride is its size, as a Linear of flattened patches
        tokens = project(patchify(x.astype(self.dtype), self.spec.patch))  # [b, n, width]
        return tokens + position.reshape(1, -1, self.width).astype(self.dtype)


def conv(features: int, name: str, dtype: DTypeLike, *, zero: bool = False) -> nn.Conv:
    """Returns a 3 x 3 convolution without bias; ``zero`` starts a residual block as identity."""
    start = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
    return nn.Conv(
        features, (3, 3), padding=1, use_bias=False, dtype=dtype, kernel_init=start, name=name
    )


def predict_cells(
    x: Float[Array, "batch h w units"],
    noisy: Float[Array, "batch h w seen"],
    channels: int,
    dtype: DTypeLike,
) -> Float[Array, "batch h w {channels}"]:
    """The head in every cell, of the module that calls it: ``conv_cell``, ``cell``, ``project``."""
    units = x.shape[-1]
    # (4) W relu(U relu(up(h) + V x)): twice, for a cell has to choose between its neighbours
    h = nn.relu(x + conv(units, "conv_cell", dtype)(noisy))
    h = nn.relu(linear(units, "cell", dtype, bias=False)(h))
    return linear(channels, "project", jnp.float32)(h)


class PatchesOut(nn.Module):
    """Tokens to a grid of latents of the size of the ``noisy`` ones, in float32."""

    spec: Patches

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], noisy: Float[Array, "batch h w c"]
    ) -> Float[Array, "batch h w c"]:
        c, p, cells = self.spec.channels, self.spec.patch, self.spec.extent(noisy.shape[1:3])
        if self.spec.units:
            up = linear(p * p * self.spec.units, "up", x.dtype, bias=False)(x)
            x = predict_cells(unpatchify(up, cells, p), noisy.astype(x.dtype), c, x.dtype)
        else:
            x = linear(p * p * c, "project", jnp.float32)(x)  # [b, n, patch**2 * c]
            x = unpatchify(x, cells, p)  # [b, h, w, c]
        if self.spec.conv:
            x = nn.Conv(c, (3, 3), padding=1, name="conv", **torch_inits(9 * c))(x)
        return jnp.tanh(x) if self.spec.tanh else x


def embed(name: str, spec: Spec, width: int, dtype: DTypeLike) -> PatchesIn | TokensIn:
    """Returns the module that turns a stream (or context) into tokens."""
    if isinstance(spec, Patches):
        return PatchesIn(spec, width, dtype, name=f"{name}_in")
    return TokensIn(spec, width, dtype, name=f"{name}_in")


def head(name: str, spec: Spec) -> PatchesOut | TokensOut:
    """Returns a stream's head: called with its tokens and the noisy latents."""
    if isinstance(spec, Patches):
        return PatchesOut(spec, name=f"{name}_out")
    return TokensOut(spec, name=f"{name}_out")


def head_products(spec: Spec, width: int, count: int) -> int:
    """Returns the multiply-adds of a stream's embedding and head, ``count`` tokens long."""
    both = 2 * spec.products(width, count)
    if isinstance(spec, Patches):
        cells, c = count * spec.patch**2, spec.channels
        if spec.units:
            both += cells * (spec.units * (width + 10 * c + spec.units) - c * width)
        both += cells * 9 * c**2 if spec.conv else 0
    return both

"""Streams as tokens: what a stream is made of, the way in, and the way out.

1. ``sinusoid(t) = [cos(t f), sin(t f)]``, ``f_i = 10000^(-i / half)``, ``half = width / 2``.
2. patches are flattened as (row, column, channel), channel fastest, on both sides; a strided
   convolution is then a Linear.
3. every part carries its own position parameter; that of a patch grid is ``[rows, columns, width]``
   and is resized bilinearly to the grid at hand.

The sinusoid and the way out are float32 whatever ``dtype``. Initial values: Linear and positions
normal(0.02), bias 0; the patch Linear and the 3x3 convolution torch's convolution default,
``U(-1/sqrt(fan_in), 1/sqrt(fan_in))`` for kernel and bias; tables normal(1), torch's default.

Source: U-ViT (arXiv 2209.12152) section 3; UniDiffuser (arXiv 2303.06555) appendix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jointseg_jax.models.blocks import linear, normal

MAX_PERIOD = 10_000.0

torch_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in: int) -> Callable:
    """Torch's default initial bias, uniform within ``1 / sqrt(fan_in)``."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * fan_in**-0.5

    return init


@dataclass(frozen=True, kw_only=True)
class Patches:
    """A stream of latents on a grid, cut into square patches.

    Args:
      grid: native height and width in latent cells; other sizes get resized positions.
      conv: a 3x3 convolution after the patches are put together again.
      tanh: squashes the output into (-1, 1).
    """

    grid: Sequence[int]
    channels: int
    patch: int
    conv: bool = False
    tanh: bool = False

    def __post_init__(self):
        object.__setattr__(self, "grid", tuple(self.grid))
        if len(self.grid) != 2 or min(*self.grid, self.channels, self.patch) < 1:
            raise ValueError(
                f"Patches: grid={self.grid}, channels={self.channels}, patch={self.patch}; "
                "grid is (height, width) and all numbers are at least 1."
            )
        self.cells(self.grid)

    def cells(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in a latent of this height and width."""
        if size[0] % self.patch or size[1] % self.patch:
            raise ValueError(
                f"Patches: {size[0]}x{size[1]} latent cells cannot be cut into patches of "
                f"{self.patch}x{self.patch}; change the grid or the patch of this stream."
            )
        return size[0] // self.patch, size[1] // self.patch

    @property
    def tokens(self) -> int:
        """Tokens at the native size."""
        rows, columns = self.cells(self.grid)
        return rows * columns

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample at the native size."""
        return (*self.grid, self.channels)

    def products(self, width: int, count: int) -> int:
        """Multiply-adds between ``count`` tokens and their patches, one way."""
        return count * self.patch**2 * self.channels * width

    def check(self, shape: tuple[int, ...], *, where: str) -> None:
        """Refuses a batch of latents that this stream cannot be."""
        if len(shape) != 4 or shape[3] != self.channels:
            raise ValueError(
                f"{where} has shape {shape}, want (batch, height, width, {self.channels}); "
                "change its spec or its codec."
            )
        try:
            self.cells(shape[1:3])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A stream (or context) that is a sequence of vectors already.

    Args:
      count: length of the sequence.
      width: size of one vector.
      inner: size of a linear bottleneck on the way in and on the way out; 0 = none.
    """

    count: int
    width: int
    inner: int = 0

    def __post_init__(self):
        if min(self.count, self.width) < 1 or self.inner < 0:
            raise ValueError(
                f"Tokens: count={self.count}, width={self.width}, inner={self.inner}; "
                "count and width are at least 1, inner at least 0."
            )

    @property
    def tokens(self) -> int:
        return self.count

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.count, self.width)

    def products(self, width: int, count: int) -> int:
        """Multiply-adds between ``count`` tokens and their vectors, one way."""
        if self.inner:
            return count * self.inner * (self.width + width)
        return count * self.width * width

    def check(self, shape: tuple[int, ...], *, where: str) -> None:
        """Refuses a batch of vectors that this stream cannot be."""
        if len(shape) != 3 or shape[1:] != self.shape:
            raise ValueError(
                f"{where} has shape {shape}, want (batch, {self.count}, {self.width}); "
                "change its spec or its codec."
            )


Spec = Patches | Tokens
SPECS: dict[str, type] = {"patches": Patches, "tokens": Tokens}


def spec_of(value: Any, *, where: str) -> Spec:
    """``{"kind": "patches", ...}`` (or a spec, returned as is) as a spec."""
    if isinstance(value, Spec):
        return value
    if not hasattr(value, "items"):
        raise ValueError(f"{where}: {value!r} is neither a spec nor a mapping with a `kind`.")
    fields = dict(value.items())
    kind = fields.pop("kind", None)
    if kind not in SPECS:
        raise ValueError(f"{where}: kind is {kind!r}; it must be one of: {', '.join(SPECS)}.")
    try:
        return SPECS[kind](**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def sinusoid(t: Float[Array, batch], width: int) -> Float[Array, "batch width"]:
    """Cosines, then sines, of a time label at geometrically spaced frequencies."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
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
    """Bilinear, half-pixel centres, no antialiasing; the table itself at its native size."""
    if position.shape[:2] == cells:
        return position
    return jax.image.resize(position, (*cells, position.shape[2]), "bilinear", antialias=False)


class TimeToken(nn.Module):
    """A time label as one token, optionally through Linear-SiLU-Linear."""

    width: int
    mlp: bool
    dtype: Any

    @nn.compact
    def __call__(self, t: Float[Array, batch]) -> Float[Array, "batch one width"]:
        x = sinusoid(t, self.width).astype(self.dtype)
        if self.mlp:
            x = nn.silu(linear(4 * self.width, "fc1", self.dtype)(x))
            x = linear(self.width, "fc2", self.dtype)(x)
        position = self.param("position", normal, (1, self.width))
        return x[:, None] + position[None].astype(self.dtype)


class IndexToken(nn.Module):
    """An integer (class, data type) as one token of a trained table."""

    size: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, index: Int[Array, batch]) -> Float[Array, "batch one width"]:
        table = self.param("embedding", nn.initializers.normal(1.0), (self.size, self.width))
        position = self.param("position", normal, (1, self.width))
        # jnp.take answers NaN for an index outside the table: loud, where clamping would be silent
        return (jnp.take(table, index, axis=0)[:, None] + position[None]).astype(self.dtype)


class TokensIn(nn.Module):
    """Vectors to tokens."""

    spec: Tokens
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch count d"]) -> Float[Array, "batch count width"]:
        x = x.astype(self.dtype)
        if self.spec.inner:
            x = linear(self.spec.inner, "squeeze", self.dtype)(x)
        position = self.param("position", normal, (self.spec.count, self.width))
        return linear(self.width, "project", self.dtype)(x) + position[None].astype(self.dtype)


class TokensOut(nn.Module):
    """Tokens to vectors, in float32."""

    spec: Tokens

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch count width"], like: Float[Array, "batch count d"]
    ) -> Float[Array, "batch count d"]:
        del like  # always of the native size
        x = linear(self.spec.inner or self.spec.width, "project", jnp.float32)(x)
        return linear(self.spec.width, "expand", jnp.float32)(x) if self.spec.inner else x


class PatchesIn(nn.Module):
    """A grid of latents to tokens, with positions resized to the grid's size."""

    spec: Patches
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch tokens width"]:
        fan_in = self.spec.patch**2 * self.spec.channels
        project = nn.Dense(
            self.width,
            dtype=self.dtype,
            kernel_init=torch_kernel,
            bias_init=torch_bias(fan_in),
            name="project",
        )
        native = self.spec.cells(self.spec.grid)
        position = self.param("position", normal, (*native, self.width))
        position = resize_position(position, self.spec.cells(x.shape[1:3]))
        tokens = project(patchify(x.astype(self.dtype), self.spec.patch))
        return tokens + position.reshape(1, -1, self.width).astype(self.dtype)


class PatchesOut(nn.Module):
    """Tokens to a grid of latents of the size of ``like``, in float32."""

    spec: Patches

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], like: Float[Array, "batch h w c"]
    ) -> Float[Array, "batch h w c"]:
        c = self.spec.channels
        x = linear(self.spec.patch**2 * c, "project", jnp.float32)(x)
        x = unpatchify(x, self.spec.cells(like.shape[1:3]), self.spec.patch)
        if self.spec.conv:
            kernel_init, bias_init = torch_kernel, torch_bias(9 * c)
            x = nn.Conv(
                c, (3, 3), padding=1, kernel_init=kernel_init, bias_init=bias_init, name="conv"
            )(x)
        return jnp.tanh(x) if self.spec.tanh else x


def way_in(name: str, spec: Spec, width: int, dtype: Any) -> PatchesIn | TokensIn:
    """The module that turns a stream (or context) into tokens."""
    enter = PatchesIn if isinstance(spec, Patches) else TokensIn
    return enter(spec, width, dtype, name=f"{name}_in")


def way_out(name: str, spec: Spec) -> PatchesOut | TokensOut:
    """The head of a stream: called with its tokens and an array of the prediction's shape."""
    leave = PatchesOut if isinstance(spec, Patches) else TokensOut
    return leave(spec, name=f"{name}_out")


def head_products(spec: Spec, width: int, count: int) -> int:
    """Multiply-adds of a stream's way in and way out, ``count`` tokens long."""
    conv = isinstance(spec, Patches) and spec.conv
    both = 2 * spec.products(width, count)
    return both + (count * spec.patch**2 * 9 * spec.channels**2 if conv else 0)

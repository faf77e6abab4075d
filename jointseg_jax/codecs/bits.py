"""Label maps as analog bits: each id becomes a corner of a cube, and a few numbers per pixel.

1. bit_i(code) = (code >> i) & 1, i = 0 .. bits-1 (``order="lsb"``; ``"msb"`` reverses the axis).
2. analog: x = (2 bit - 1) scale, so a codeword is a corner of [-scale, scale]^bits.
3. threshold: bit_i = x_i > 0; snap: the codeword c with the least |x - c|^2, that is the greatest
   x.c - |c|^2 / 2.
4. confidence: the posterior probability of the codeword read, if x is a codeword (all equally
   likely a priori) plus Gaussian noise of standard deviation ``noise * scale``:
   softmax over codewords of (x.c - |c|^2 / 2) / (noise scale)^2. Under "threshold" the codewords
   are all corners (and the origin where it stands for something), whose sum has a closed form:
   log sum_corners exp(x.c / s) = sum_i log(2 cosh(x_i scale / s)). It is 0 where the bits read
   spell no valid id.

What VOID (not annotated) and label 0 become; "origin" is analog 0 in every channel:

| void | background | labels | VOID | ids that need a corner |
|---|---|---|---|---|
| "code" (PDM: 0 is void) | "code" | label + 1 | code 0 | classes + 1 |
| "zero" | "code" | label | origin | classes |
| "forbid" | "code" | label | NaN: no VOID may come here | classes |
| "code" | "zero" | label, 0 at the origin | code 0 | classes |
| "forbid" | "zero" (JoDiffusion) | label mod 2^bits, 0 at the origin | NaN | classes - 1 |

Both at the origin would be ambiguous and is refused. What is read back: the origin wins under
"threshold" where it is nearer than every corner (mean |x_i| < scale / 2); bits that spell no id
become VOID; "snap" always returns an id that exists. Noise below ``scale`` in every channel
(``scale / 2`` where the origin is in use) never changes a threshold reading.

Pooling to 1 / pool of the size: "min" (smallest id present, VOID only where nothing else is),
"mode" (most frequent id, the smaller one of equals, VOID as before) and "parity_min" (plain
minimum with VOID smallest, so that one VOID pixel erases its window, as in the original).

Source: Chen et al., Analog Bits (2208.04202), section 3; pix2seq ``int2bits`` (LSB first);
PDM, section 3.1 (8 bits, MSB first, min pooling, 0 = void); JoDiffusion ``EncodeBitMap``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Float, Int, Int32, Key

from jointseg_jax.codecs.batched_map import map_rows
from jointseg_jax.codecs.pixels import cells
from jointseg_jax.types import VOID, Array

AnyArray = Array | np.ndarray
Order = Literal["lsb", "msb"]


def analog(
    codes: Int[AnyArray, "..."], bits: int, order: Order = "lsb", scale: float = 1.0
) -> Float[AnyArray, "... bits"]:
    """The lowest ``bits`` bits of each code as +-scale in a new last axis; numpy stays numpy."""
    ones = (codes[..., None] >> _shifts(bits, order, codes.ndim)) & 1
    return (2 * ones - 1).astype(np.float32) * np.float32(scale)


def integers(values: Float[AnyArray, "... bits"], order: Order = "lsb") -> Int32[AnyArray, "..."]:
    """The code whose bits are ``values > 0`` (exactly 0 reads as bit 0); numpy stays numpy."""
    ones = (values > 0).astype(np.int32)
    return (ones << _shifts(values.shape[-1], order, values.ndim - 1)).sum(-1, dtype=np.int32)


def _shifts(bits: int, order: Order, leading_axes: int) -> np.ndarray:
    shifts = np.arange(bits, dtype=np.int32)[:: 1 if order == "lsb" else -1]
    return shifts.reshape((1,) * leading_axes + (bits,))


def bits_for(codes: int) -> int:
    """The bits that tell this many codes apart, at least 1."""
    return max(1, (codes - 1).bit_length())


@dataclass(frozen=True, kw_only=True)
class Bits:
    """Labels as analog bits; the tables of the module docstring say what each field does.

    ``noise`` only shapes the confidence: the assumed error of a reading, in units of ``scale``.
    """

    classes: int
    bits: int | None = None
    order: Order = "lsb"
    void: Literal["code", "zero", "forbid"] = "code"
    background: Literal["code", "zero"] = "code"
    pool: int = 1
    pooling: Literal["min", "mode", "parity_min"] = "min"
    decoding: Literal["threshold", "snap"] = "threshold"
    scale: float = 1.0
    noise: float = 0.5
    kind: ClassVar[str] = "labels"

    def __post_init__(self) -> None:
        _one_of("order", self.order, ("lsb", "msb"))
        _one_of("void", self.void, ("code", "zero", "forbid"))
        _one_of("background", self.background, ("code", "zero"))
        _one_of("pooling", self.pooling, ("min", "mode", "parity_min"))
        _one_of("decoding", self.decoding, ("threshold", "snap"))
        _holds("classes", self.classes, self.classes >= 1, "at least 1")
        _holds("pool", self.pool, self.pool >= 1, "at least 1")
        _holds("scale", self.scale, self.scale > 0, "positive")
        _holds("noise", self.noise, self.noise > 0, "positive")
        if self.void == self.background == "zero":
            raise ValueError(
                'bits codec: void = "zero" and background = "zero" were given; both would be '
                'analog 0 and could not be told apart. Set one of them to "code".'
            )
        enough = self.channels <= 16 and self._corners <= 2**self.channels
        least = bits_for(self._corners)
        what = f"large enough for {self._corners} codes and at most 16; {least} are enough"
        _holds("bits", self.channels, enough, what)

    @property
    def channels(self) -> int:
        """Bits per cell."""
        return bits_for(self._corners) if self.bits is None else self.bits

    @property
    def _corners(self) -> int:
        return self.classes + (self.void == "code") - (self.background == "zero")

    @property
    def _at_origin(self) -> int | None:
        if self.void == "zero":
            return VOID
        return 0 if self.background == "zero" else None

    @property
    def _offset(self) -> int:
        return 1 if self.void == "code" and self.background == "code" else 0

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """No parameters."""
        return {}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Cells of ``pool`` pixels a side, one channel per bit."""
        return (*cells("bits codec", size, self.pool), self.channels)

    def encode(
        self,
        params: Mapping[str, Any],
        labels: Int[AnyArray, "batch height width"],
        *,
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch rows columns bits"]:
        """The codewords of the pooled map."""
        cells("bits codec", labels.shape[1:], self.pool)
        labels = pooled(jnp.asarray(labels, jnp.int32), self.pool, self.pooling)
        words = self._codewords(labels)
        if self.void == "forbid":
            words = jnp.where((labels == VOID)[..., None], jnp.nan, words)
        return words

    def decode(
        self, params: Mapping[str, Any], latents: Float[AnyArray, "batch rows columns bits"]
    ) -> Int32[Array, "batch height width"]:
        """The ids read, each repeated over its ``pool`` x ``pool`` pixels."""
        return self.decode_with_confidence(params, latents)[0]

    def decode_with_confidence(
        self, params: Mapping[str, Any], latents: Float[AnyArray, "batch rows columns bits"]
    ) -> tuple[Int32[Array, "batch height width"], Float[Array, "batch height width"]]:
        """The ids read, and the probability of each under the noise model (line 4 above)."""
        x = jnp.asarray(latents, jnp.float32)
        labels, confidence = self._threshold(x) if self.decoding == "threshold" else self._snap(x)
        return enlarged(labels, self.pool), enlarged(confidence, self.pool)

    def _codewords(self, labels: AnyArray) -> AnyArray:
        # VOID + offset is code 0 in both of the "code" rows of the table (-1 + 1, and masked to 0).
        codes = labels + self._offset
        if self.background == "zero":
            codes = codes * (labels != VOID)
        words = analog(codes, self.channels, self.order, self.scale)
        if self._at_origin is not None:
            words = words * (labels != self._at_origin).astype(np.float32)[..., None]
        return words

    @cached_property
    def _codebook(self) -> tuple[np.ndarray, np.ndarray]:
        ids = np.arange(self.classes, dtype=np.int32)
        if self.void != "forbid":
            ids = np.append(ids, np.int32(VOID))
        return ids, self._codewords(ids)

    def _threshold(self, x: Array) -> tuple[Array, Array]:
        codes = integers(x, self.order)
        if self.background == "zero":
            # 0 spells VOID, or 2^bits where exactly so many classes use up every corner.
            last = 2**self.channels if self.classes - 1 == 2**self.channels else VOID
            labels = jnp.where(codes == 0, last, codes)
        else:
            labels = codes - self._offset
        valid = (labels < self.classes) & ((labels >= 0) | (self.void == "code"))
        labels = jnp.where(valid, labels, VOID)
        reach = x * (self.scale / self._variance)
        score = jnp.abs(reach).sum(-1)
        total = jnp.logaddexp(reach, -reach).sum(-1)
        if self._at_origin is not None:
            half = 0.5 * self.channels * self.scale**2 / self._variance
            origin = jnp.abs(x).mean(-1) < 0.5 * self.scale
            labels, valid = jnp.where(origin, self._at_origin, labels), valid | origin
            score = jnp.where(origin, half, score)
            total = jnp.logaddexp(total, half)
        return labels, jnp.where(valid, jnp.exp(score - total), 0.0)

    def _snap(self, x: Array) -> tuple[Array, Array]:
        ids, words = self._codebook
        norms = 0.5 * np.square(words).sum(-1)

        def read(rows: Array) -> tuple[Array, Array]:
            dots = jnp.einsum("bhwn,kn->bhwk", rows, words, precision=jax.lax.Precision.HIGHEST)
            scores = (dots - norms.reshape(1, 1, 1, -1)) / self._variance
            best = jnp.argmax(scores, axis=-1)
            confidence = jnp.exp(scores.max(-1) - jax.nn.logsumexp(scores, axis=-1))
            return jnp.where(best == self.classes, VOID, best).astype(jnp.int32), confidence

        return map_rows(read, x, values_per_row=x.shape[1] * x.shape[2] * len(ids))

    @property
    def _variance(self) -> float:
        return (self.noise * self.scale) ** 2


def pooled(
    labels: Int32[Array, "batch height width"],
    pool: int,
    pooling: Literal["min", "mode", "parity_min"],
) -> Int32[Array, "batch rows columns"]:
    """One label per ``pool`` x ``pool`` window, by the rule the module docstring names."""
    if pool == 1:
        return labels
    windows = rearrange(labels, "b (h y) (w x) -> b h w (y x)", y=pool, x=pool)
    if pooling == "parity_min":
        return windows.min(-1)
    if pooling == "mode":
        return _mode(windows)
    beyond = jnp.iinfo(jnp.int32).max
    least = jnp.where(windows == VOID, beyond, windows).min(-1)
    return jnp.where(least == beyond, VOID, least)


def _mode(windows: Int32[Array, "batch rows columns window"]) -> Int32[Array, "batch rows columns"]:
    counts = (windows[..., None] == windows[..., None, :]).sum(-1) * (windows != VOID)
    most = counts.max(-1, keepdims=True)
    # VOID counts 0, so it is a candidate only where the whole window is VOID; ties: the smallest.
    return jnp.where(counts == most, windows, jnp.iinfo(jnp.int32).max).min(-1)


def enlarged(values: Array, pool: int) -> Array:
    """Repeats the value of each cell over its ``pool`` x ``pool`` pixels."""
    if pool == 1:
        return values
    return repeat(values, "b h w -> b (h y) (w x)", y=pool, x=pool)


def _one_of(name: str, given: str, known: tuple[str, ...]) -> None:
    _holds(name, repr(given), given in known, "one of " + ", ".join(map(repr, known)))


def _holds(name: str, given: Any, good: bool, what: str) -> None:
    if not good:
        raise ValueError(
            f"bits codec: {name} = {given}; it must be {what}. Change the codec config."
        )

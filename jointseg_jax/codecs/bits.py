"""Label maps as analog bits: each id becomes a corner of a cube, and a few numbers per pixel.

1. bit_i(code) = (code >> i) & 1, i = 0 .. bits-1 (``order="lsb"``; ``"msb"`` reverses the axis).
2. analog: x = (2 bit - 1) scale, so a codeword is a corner of [-scale, scale]^bits.
3. threshold: bit_i = x_i > 0; snap: the codeword c with the least |x - c|^2, that is the greatest
   x.c - |c|^2 / 2.
4. confidence: the posterior probability of the codeword read, if x is a codeword (all equally
   likely a priori) plus Gaussian noise of standard deviation ``noise * scale``:
   softmax over codewords of (x.c - |c|^2 / 2) / (noise scale)^2. It is 0 where the bits read spell
   no valid id.

What VOID (not annotated) and label 0 become; "origin" is analog 0 in every channel:

| void | background | labels | VOID | ids that need a corner |
|---|---|---|---|---|
| "code" (PDM: 0 is void) | "code" | label + 1 | code 0 | classes + 1 |
| "zero" | "code" | label | origin | classes |
| "forbid" | "code" | label | NaN: no VOID may come here | classes |
| "code" | "zero" | label, 0 at the origin | code 0 | classes |
| "forbid" | "zero" (JoDiffusion) | label mod 2^bits, 0 at the origin | NaN | classes - 1 |

Both at the origin would be ambiguous and is refused. Noise below ``scale`` in every channel
(``scale / 2`` where the origin is in use) never changes a threshold reading.

``PanopticBits`` puts the bits of an instance number after those of the label. Numbers run in raster
order (``data/segments.py``), so that what a number means can be learnt; which of two equal things
has which number must not depend on anything that the picture does not show.

Source: Chen et al., Analog Bits (2208.04202), section 3; pix2seq ``int2bits`` (LSB first);
PDM, section 3.1 (8 bits, MSB first, min pooling, 0 = void); JoDiffusion ``EncodeBitMap``;
Chen et al., A Generalist Framework for Panoptic Segmentation (2210.06366), 3.1 (8 + 8 bits).
"""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Float, Int, Int32

from jointseg_jax.codecs.batched_map import map_rows
from jointseg_jax.codecs.codec import (
    CHANGE,
    AnyLatents,
    Confidence,
    Fixed,
    Keys,
    Kind,
    LabelMaps,
    Labels,
    LatentMaps,
    Reading,
)
from jointseg_jax.codecs.pixels import cells
from jointseg_jax.types import VOID, AnyArray, Array, ArrayT, Params, require, require_one_of

Panoptic = Int[AnyArray, "batch height width 2"]
Order = Literal["lsb", "msb"]
Pooling = Literal["min", "mode", "parity_min"]


def analog(
    codes: Int[ArrayT, "..."], bits: int, order: Order = "lsb", scale: float = 1.0
) -> Float[ArrayT, "... bits"]:
    """The lowest ``bits`` bits of each code as +-scale in a new last axis; numpy stays numpy."""
    ones = (codes[..., None] >> _shifts(bits, order, codes.ndim)) & 1
    # (2) x = (2 bit - 1) scale
    return (2 * ones - 1).astype(np.float32) * np.float32(scale)


def integers(values: Float[ArrayT, "... bits"], order: Order = "lsb") -> Int32[ArrayT, "..."]:
    """The code whose bits are ``values > 0`` (exactly 0 reads as bit 0); numpy stays numpy."""
    ones = (values > 0).astype(np.int32)
    powers = ones << _shifts(values.shape[-1], order, values.ndim - 1)
    return cast(ArrayT, powers.sum(-1, dtype=np.int32))


def _shifts(bits: int, order: Order, leading_axes: int) -> np.ndarray:
    shifts = np.arange(bits, dtype=np.int32)[:: 1 if order == "lsb" else -1]
    return shifts.reshape((1,) * leading_axes + (bits,))  # [1, ..., 1, bits]


def bits_for(codes: int) -> int:
    """The number of bits that ``codes`` different codes need, at least 1."""
    return max(1, (codes - 1).bit_length())


@dataclass(frozen=True, kw_only=True)
class LabelBits(Fixed):
    """How labels become bits."""

    classes: int
    bits: int | None = None  # channels; None: as few as the codes need
    order: Order = "lsb"  # of the channels: least or most significant bit first
    void: Literal["code", "zero", "forbid"] = "code"  # VOID is code 0, the origin, or NaN
    background: Literal["code", "zero"] = "code"  # label 0 has a code, or is the origin
    pool: int = 1  # pixels per cell along each side
    pooling: Pooling = "min"  # how a cell's label is chosen: ``pooled``
    decoding: Literal["threshold", "snap"] = "threshold"
    """"threshold" reads bit by bit, and VOID where the bits spell no id; "snap" reads the nearest
    codeword, always an id that exists."""
    scale: float = 1.0  # of the analog values
    noise: float = 0.5  # assumed error of a reading, in units of scale: for the confidence only


@dataclass(frozen=True, kw_only=True)
class Bits(LabelBits):
    """Label maps as analog bits, one codeword per cell of ``pool`` x ``pool`` pixels."""

    kind: ClassVar[Kind] = "labels"

    def __post_init__(self) -> None:
        require_one_of("bits codec: order", self.order, ("lsb", "msb"), CHANGE)
        require_one_of("bits codec: void", self.void, ("code", "zero", "forbid"), CHANGE)
        require_one_of("bits codec: background", self.background, ("code", "zero"), CHANGE)
        require_one_of("bits codec: pooling", self.pooling, ("min", "mode", "parity_min"), CHANGE)
        require_one_of("bits codec: decoding", self.decoding, ("threshold", "snap"), CHANGE)
        require("bits codec: classes", self.classes, self.classes >= 1, "at least 1", CHANGE)
        require("bits codec: pool", self.pool, self.pool >= 1, "at least 1", CHANGE)
        require("bits codec: scale", self.scale, self.scale > 0, "positive", CHANGE)
        require("bits codec: noise", self.noise, self.noise > 0, "positive", CHANGE)
        if self.void == self.background == "zero":
            raise ValueError(
                'bits codec: void = "zero" and background = "zero" were given; both would be '
                'analog 0 and could not be told apart. Set one of them to "code".'
            )
        enough = self.channels <= 16 and self._corners <= 2**self.channels
        least = bits_for(self._corners)
        rule = f"large enough for {self._corners} codes and at most 16; {least} are enough"
        require("bits codec: bits", self.channels, enough, rule, CHANGE)

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

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Cells of ``pool`` pixels a side, one channel per bit."""
        return (*cells("bits codec", size, self.pool), self.channels)

    def encode(self, params: Params, labels: LabelMaps, *, keys: Keys | None = None) -> LatentMaps:
        """The codewords of the pooled map."""
        cells("bits codec", labels.shape[1:], self.pool)
        pooled_labels = pooled(jnp.asarray(labels, jnp.int32), self.pool, self.pooling)
        words = self._codewords(pooled_labels)  # [b, h / pool, w / pool, bits]
        if self.void == "forbid":
            # NaN instead of an error: values cannot raise under jit, and no loss hides a NaN.
            words = jnp.where((pooled_labels == VOID)[..., None], jnp.nan, words)
        return words

    def decode(self, params: Params, latents: AnyLatents) -> Labels:
        """The ids read, each repeated over its ``pool`` x ``pool`` pixels."""
        return self.decode_with_confidence(params, latents)[0]

    def decode_with_confidence(self, params: Params, latents: AnyLatents) -> Reading:
        """The ids read, and the posterior probability of each under the noise model."""
        x = jnp.asarray(latents, jnp.float32)
        labels, confidence = self._threshold(x) if self.decoding == "threshold" else self._snap(x)
        return enlarged(labels, self.pool), enlarged(confidence, self.pool)

    def _codewords(self, labels: ArrayT) -> ArrayT:
        # VOID + offset is code 0 in both of the "code" rows of the table (-1 + 1, and masked to 0).
        codes = labels + self._offset
        if self.background == "zero":
            codes = codes * (labels != VOID)
        words = analog(codes, self.channels, self.order, self.scale)
        if self._at_origin is not None:
            words = words * (labels != self._at_origin).astype(np.float32)[..., None]
        return cast(ArrayT, words)

    @cached_property
    def _codebook(self) -> tuple[np.ndarray, np.ndarray]:
        ids = np.arange(self.classes, dtype=np.int32)
        if self.void != "forbid":
            ids = np.append(ids, np.int32(VOID))
        return ids, self._codewords(ids)  # [k], [k, bits]

    def _threshold(self, x: Array) -> tuple[Array, Array]:
        codes = integers(x, self.order)  # [b, h, w]
        if self.background == "zero":
            # 0 spells VOID, or 2^bits where exactly that many classes use up every corner.
            last = 2**self.channels if self.classes - 1 == 2**self.channels else VOID
            labels = jnp.where(codes == 0, last, codes)
        else:
            labels = codes - self._offset
        valid = (labels < self.classes) & ((labels >= 0) | (self.void == "code"))
        labels = jnp.where(valid, labels, VOID)
        # (4) over all corners, whose sum has a closed form (s = (noise scale)^2):
        # log sum_corners exp(x.c / s) = sum_i log(2 cosh(x_i scale / s)); |c|^2 is the same in all
        reach = x * (self.scale / self._variance)  # [b, h, w, bits]
        score = jnp.abs(reach).sum(-1)  # x.c / s of the corner that was read
        total = jnp.logaddexp(reach, -reach).sum(-1)
        if self._at_origin is not None:
            # The origin has |c| = 0: instead of lowering every corner by |c|^2 / 2s, it is raised.
            half = 0.5 * self.channels * self.scale**2 / self._variance
            # It wins where it is nearer than every corner.
            origin = jnp.abs(x).mean(-1) < 0.5 * self.scale
            labels, valid = jnp.where(origin, self._at_origin, labels), valid | origin
            score = jnp.where(origin, half, score)
            total = jnp.logaddexp(total, half)
        return labels, jnp.where(valid, jnp.exp(score - total), 0.0)

    def _snap(self, x: Array) -> tuple[Array, Array]:
        ids, words = self._codebook
        norms = 0.5 * np.square(words).sum(-1)  # [k]

        def read(rows: Array) -> tuple[Array, Array]:
            # Exact products: a bfloat16 pass could prefer a codeword that is farther.
            dots = jnp.einsum("bhwn,kn->bhwk", rows, words, precision=jax.lax.Precision.HIGHEST)
            # (3), (4): (x.c - |c|^2 / 2) / (noise scale)^2
            scores = (dots - norms.reshape(1, 1, 1, -1)) / self._variance  # [b, h, w, k]
            best = jnp.argmax(scores, axis=-1)
            confidence = jnp.exp(scores.max(-1) - jax.nn.logsumexp(scores, axis=-1))
            return jnp.where(best == self.classes, VOID, best).astype(jnp.int32), confidence

        return map_rows(read, x, values_per_row=x.shape[1] * x.shape[2] * len(ids))

    @property
    def _variance(self) -> float:
        return (self.noise * self.scale) ** 2


def pooled(labels: Labels, pool: int, pooling: Pooling) -> Int32[Array, "batch rows columns"]:
    """One label per ``pool`` x ``pool`` window.

    Args:
      pooling: "min" takes the smallest id present, "mode" the most frequent one (the smaller of
        equals), both VOID only where nothing else is; "parity_min" is the plain minimum with VOID
        smallest, so that one VOID pixel erases its window, as in PDM's original.
    """
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
    # [b, h, w, window]: how often each pixel's label occurs in its window
    counts = (windows[..., None] == windows[..., None, :]).sum(-1) * (windows != VOID)
    most = counts.max(-1, keepdims=True)
    # VOID counts 0, so it is a candidate only where the whole window is VOID; ties: the smallest.
    return jnp.where(counts == most, windows, jnp.iinfo(jnp.int32).max).min(-1)


def enlarged(values: Array, pool: int) -> Array:
    """Repeats the value of each cell over its ``pool`` x ``pool`` pixels."""
    if pool == 1:
        return values
    return repeat(values, "b h w -> b (h y) (w x)", y=pool, x=pool)


@dataclass(frozen=True, kw_only=True)
class PanopticBits(LabelBits):
    """Maps of (label, segment) as analog bits: the label's as in ``Bits``, then the segment's.

    A segment is a number within the image, or 0 for no instance (stuff, VOID). Its bits have the
    label's order and scale, but no origin and no snapping: every code is a segment.
    """

    instance_bits: int = 8  # tell segments 1 .. 2^instance_bits - 1 of one image apart
    labels: Bits = field(init=False, repr=False, compare=False)  # the codec of the labels
    kind: ClassVar[Kind] = "panoptic"

    def __post_init__(self) -> None:
        few = 1 <= self.instance_bits <= 15
        rule = "1 to 15 (segments travel as int16)"
        require("panoptic bits codec: instance_bits", self.instance_bits, few, rule, CHANGE)
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Bits)}
        object.__setattr__(self, "labels", Bits(**own))

    @property
    def channels(self) -> int:
        """Bits per cell."""
        return self.labels.channels + self.instance_bits

    @property
    def instances(self) -> int:
        """The highest segment."""
        return 2**self.instance_bits - 1

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Cells of ``pool`` pixels a side, one channel per bit."""
        return (*self.labels.latent_shape(size)[:2], self.channels)

    def encode(self, params: Params, values: Panoptic, *, keys: Keys | None = None) -> LatentMaps:
        """The codewords of the pooled map; a segment beyond the last one is coded as 0."""
        labels, segments = jnp.moveaxis(jnp.asarray(values, jnp.int32), -1, 0)
        words = self.labels.encode(params, labels)  # [b, h / pool, w / pool, label bits]
        numbers = self._pooled_segments(labels, segments)  # [b, h / pool, w / pool]
        numbers = jnp.where((numbers > 0) & (numbers <= self.instances), numbers, 0)
        instance_words = analog(numbers, self.instance_bits, self.order, self.scale)
        return jnp.concatenate([words, instance_words], axis=-1)

    def decode(self, params: Params, latents: AnyLatents) -> Int32[Array, "batch height width 2"]:
        """The labels and segments read, each repeated over its ``pool`` x ``pool`` pixels."""
        return jnp.stack(self.read(params, latents)[:2], axis=-1)

    def read(self, params: Params, latents: AnyLatents) -> tuple[Labels, Labels, Confidence]:
        """The labels, the segments, and the probability that both are right."""
        words, bits = jnp.split(jnp.asarray(latents, jnp.float32), [self.labels.channels], axis=-1)
        labels, confidence = self.labels.decode_with_confidence(params, words)
        # (4) for the instance bits, independent of each other under the noise model:
        # prod_i 1 / (1 + exp(-2 |x_i| / (noise^2 scale)))
        reach = 2 * jnp.abs(bits) / (self.noise**2 * self.scale)  # [b, h, w, instance_bits]
        sure = jnp.exp(jax.nn.log_sigmoid(reach).sum(-1))
        segments = enlarged(integers(bits, self.order), self.pool)
        return labels, segments, confidence * enlarged(sure, self.pool)

    def _pooled_segments(self, labels: Array, segments: Array) -> Array:
        """One segment per window, of the pixels that have the window's label.

        Segment 0 is chosen only where nothing else is, as VOID is: a few pixels without an instance
        do not end the instance beside them.
        """
        # "parity_min" is a flaw of labels that the original has; segments take "min" there.
        rule = "mode" if self.pooling == "mode" else "min"
        chosen = enlarged(pooled(labels, self.pool, self.pooling), self.pool)  # [b, h, w]
        # Segments of the chosen label alone, so that both numbers belong to one pixel.
        candidates = jnp.where((labels == chosen) & (segments > 0), segments, VOID)
        return pooled(candidates, self.pool, rule)

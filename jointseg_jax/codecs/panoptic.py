"""Panoptic maps as analog bits: those of the label, then those of the instance number.

1. A pixel is (label, segment): the label as ``bits.py`` takes it, VOID included; the segment a
   number 1 .. 2^instance_bits - 1 within the image, or 0 for no instance (stuff, VOID).
2. Its codeword is the label's, from ``Bits``, followed by the bits of the segment, in the same
   order and at the same scale. Instance bits have no origin and no snapping: every code is a
   segment. A segment beyond the last number is coded as 0.
3. Pooling picks the label as ``Bits`` does, then, by the same rule, a segment among the pixels of
   the window that have this label, so that both belong to one pixel. Segment 0 is chosen only where
   nothing else is, as VOID is: a few pixels without an instance do not end the instance beside
   them. ("parity_min" takes the smallest segment, as "min" does; its flaw is one of labels.)
4. Confidence: that of the label times that of the segment, whose bits are independent under the
   noise model: ``prod_i 1 / (1 + exp(-2 |x_i| / (noise^2 scale)))``.

Numbers run in raster order (``data/segments.py``), so that what a number means can be learnt; which
of two equal things has which number must not depend on anything that the picture does not show.

Source: Chen et al., A Generalist Framework for Panoptic Segmentation (2210.06366), section 3.1
(8 + 8 bits); PDM, section 3.1 (labels).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Int32, Key

from jointseg_jax.codecs.bits import Bits, Order, analog, enlarged, integers, pooled
from jointseg_jax.types import VOID, Array

AnyArray = Array | np.ndarray


@dataclass(frozen=True, kw_only=True)
class PanopticBits:
    """(label, segment) maps as analog bits; all fields but ``instance_bits`` are those of ``Bits``.

    ``instance_bits``: numbers 1 .. 2^instance_bits - 1 can be told apart in one image.
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
    instance_bits: int = 8
    labels: Bits = field(init=False, repr=False, compare=False)
    kind: ClassVar[str] = "panoptic"

    def __post_init__(self) -> None:
        if not 1 <= self.instance_bits <= 15:
            raise ValueError(
                f"panoptic bits codec: instance_bits = {self.instance_bits}; it must be 1 to 15 "
                "(segments travel as int16). Change the codec config."
            )
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

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """No parameters."""
        return {}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Cells of ``pool`` pixels a side, one channel per bit."""
        return (*self.labels.latent_shape(size)[:2], self.channels)

    def encode(
        self,
        params: Mapping[str, Any],
        values: Int[AnyArray, "batch height width 2"],
        *,
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch rows columns bits"]:
        """The codewords of the pooled map."""
        labels, segments = jnp.moveaxis(jnp.asarray(values, jnp.int32), -1, 0)
        words = self.labels.encode(params, labels)
        numbers = self._pooled_segments(labels, segments)
        numbers = jnp.where((numbers > 0) & (numbers <= self.instances), numbers, 0)
        return jnp.concatenate([words, self._analog(numbers)], axis=-1)

    def decode(
        self, params: Mapping[str, Any], latents: Float[AnyArray, "batch rows columns bits"]
    ) -> Int32[Array, "batch height width 2"]:
        """The labels and segments read, each repeated over its ``pool`` x ``pool`` pixels."""
        return jnp.stack(self.read(params, latents)[:2], axis=-1)

    def read(
        self, params: Mapping[str, Any], latents: Float[AnyArray, "batch rows columns bits"]
    ) -> tuple[
        Int32[Array, "batch height width"],
        Int32[Array, "batch height width"],
        Float[Array, "batch height width"],
    ]:
        """The labels, the segments, and the probability of both (line 4 above)."""
        words, bits = jnp.split(jnp.asarray(latents, jnp.float32), [self.labels.channels], axis=-1)
        labels, confidence = self.labels.decode_with_confidence(params, words)
        reach = 2 * jnp.abs(bits) / (self.noise**2 * self.scale)
        sure = jnp.exp(jax.nn.log_sigmoid(reach).sum(-1))
        segments = enlarged(integers(bits, self.order), self.pool)
        return labels, segments, confidence * enlarged(sure, self.pool)

    def _analog(self, numbers: AnyArray) -> AnyArray:
        return analog(numbers, self.instance_bits, self.order, self.scale)

    def _pooled_segments(self, labels: Array, segments: Array) -> Array:
        """One segment per window, of the pixels that have the window's label."""
        rule = "mode" if self.pooling == "mode" else "min"
        chosen = enlarged(pooled(labels, self.pool, self.pooling), self.pool)
        counted = jnp.where((labels == chosen) & (segments > 0), segments, VOID)
        return pooled(counted, self.pool, rule)

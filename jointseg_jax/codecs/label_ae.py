"""Label maps through a convolutional autoencoder: bits in, a few latent channels, class logits out.

1. input: the label's bits as +-1 (``bits.analog``); VOID, and label 0 if ``background="zero"``,
   are 0 in every channel.
2. encoder (``label_net``): (mean, log variance clamped to [-30, 20]), one cell per
   factor = patch 2^(len(widths) - 1) pixels a side.
3. latent = scale * (mean + std * noise), or scale * mean ("mode", and whenever no keys are given).
4. decoder: class logits; bilinear resize where it has fewer doublings than the encoder halvings.
5. refinement (``refine`` > 0, when encoding only): so many Adam steps on the latent itself, down
   the cross-entropy of what the decoder makes of it, each row for itself; step i is
   ``refine_rate * std(latent) * (1 + cos(pi i / refine)) / 2`` long. The encoder is one guess for
   all maps; this closes most of what it misses, at the price of ``refine`` decoder gradients.
6. loss: cross-entropy over the pixels that are not VOID. There is no KL term. With
   ``refine_in_training`` > 0 the same of latents refined in so many steps is added, these held
   constant: the decoder learns to be exact where refined latents lie.
7. label = argmax; confidence = max softmax = exp(max - logsumexp); below ``prob_threshold`` the
   label becomes 0 or VOID.

The defaults are the published network. Beyond it: ``patch`` > 1 folds patch x patch pixels into
channels before the first and after the last convolution, so that nothing runs at full resolution;
``up_widths`` may narrow from stage to stage; ``middle_blocks`` counts residual blocks (the
published option has 0 or 2); VOID stays out of input and loss. The original instead merged VOID
into background or fed its low bits: ``background="zero", void="low_bits"``.

Source: JoDiffusion (2512.13014), section 3.2, eq. 1, ``LightweightLabelVAE``; 5 is not in it: the
iterative inference of Kim et al. 2018 (semi-amortized autoencoders) at encoding time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float, Int, Int32, Key

from jointseg_jax.codecs.batched_map import map_rows
from jointseg_jax.codecs.bits import analog, bits_for
from jointseg_jax.codecs.label_net import Decoder, Encoder
from jointseg_jax.codecs.pixels import cells
from jointseg_jax.codecs.point_loss import PointLoss
from jointseg_jax.types import FILE_VOID, VOID, Array, Params

AnyArray = Array | np.ndarray


@dataclass(frozen=True, kw_only=True)
class LabelAE:
    """The label autoencoder as a codec; the module docstring says what each field does.

    ``bits`` defaults to what tells the ids apart that are not at analog 0. ``scale`` multiplies
    the latents that leave (0.2 as published; ``unit_scale`` fits it). ``point_loss`` (a
    ``PointLoss`` or its fields) takes the place of the cross-entropy over all pixels. ``dtype`` is
    that of the activations; parameters, moments, logits and latents are float32.
    """

    classes: int
    bits: int | None = None
    background: Literal["code", "zero"] = "code"
    void: Literal["zero", "low_bits"] = "zero"
    widths: Sequence[int] = (128, 256, 512, 512)
    middle_width: int = 512
    middle_blocks: int = 0
    up_widths: Sequence[int] = (512, 512, 512)
    latent_channels: int = 4
    groups: int = 32
    patch: int = 1
    latent: Literal["mode", "sample"] = "mode"
    scale: float = 0.2
    prob_threshold: float = 0.0
    threshold_to: Literal["background", "void"] = "background"
    point_loss: PointLoss | Mapping[str, Any] | None = None
    refine: int = 0
    refine_rate: float = 0.1
    refine_in_training: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    kind: ClassVar[str] = "labels"

    def __post_init__(self) -> None:
        for name in ("widths", "up_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.point_loss, Mapping):
            object.__setattr__(self, "point_loss", PointLoss(**self.point_loss))
        _choice("background", self.background, ("code", "zero"))
        _choice("void", self.void, ("zero", "low_bits"))
        _choice("latent", self.latent, ("mode", "sample"))
        _choice("threshold_to", self.threshold_to, ("background", "void"))
        _choice("dtype", self.dtype, ("float32", "bfloat16"))
        _valid("classes", self.classes, self.classes >= 2, "at least 2")
        _valid("patch", self.patch, self.patch >= 1, "at least 1")
        _valid("scale", self.scale, self.scale > 0, "positive")
        _valid("prob_threshold", self.prob_threshold, 0 <= self.prob_threshold < 1, "in [0, 1)")
        _valid("refine", self.refine, self.refine >= 0, "at least 0")
        steps = self.refine_in_training
        _valid("refine_in_training", steps, steps >= 0, "at least 0")
        _valid("refine_rate", self.refine_rate, self.refine_rate > 0, "positive")
        enough = 2**self.channels >= self._corners and self.channels <= 16
        _valid("bits", self.channels, enough, f"enough for {self._corners} codes and at most 16")
        fewer = len(self.up_widths) < len(self.widths)
        _valid("up_widths", self.up_widths, fewer, f"shorter than widths = {self.widths}")
        normed = (self.middle_width, *self.up_widths[-1:])
        shared = all(w % self.groups == 0 for w in normed)
        _valid("groups", self.groups, shared, f"a divisor of the normalised widths {normed}")

    @property
    def channels(self) -> int:
        """Analog bits per pixel."""
        return bits_for(self._corners) if self.bits is None else self.bits

    @property
    def _corners(self) -> int:
        return self.classes - (self.background == "zero")

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return self.patch * 2 ** (len(self.widths) - 1)

    @property
    def shrink(self) -> int:
        """Pixels per logit, along each side, before the resize (1 in the published network)."""
        return 2 ** (len(self.widths) - 1 - len(self.up_widths))

    @property
    def encoder(self) -> Encoder:
        """The Linen module of params["encoder"]."""
        return Encoder(
            widths=self.widths,
            middle_width=self.middle_width,
            middle_blocks=self.middle_blocks,
            latent_channels=self.latent_channels,
            groups=self.groups,
            dtype=jnp.dtype(self.dtype),
        )

    @property
    def decoder(self) -> Decoder:
        """The Linen module of params["decoder"]."""
        return Decoder(
            up_widths=self.up_widths,
            middle_width=self.middle_width,
            middle_blocks=self.middle_blocks,
            outputs=self.classes * self.patch**2,
            groups=self.groups,
            dtype=jnp.dtype(self.dtype),
        )

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh parameters: ``{"encoder": ..., "decoder": ...}``."""
        first, second = jax.random.split(key)
        side = self.factor // self.patch
        pixels = jnp.zeros((1, side, side, self.channels * self.patch**2))
        latents = jnp.zeros((1, 1, 1, self.latent_channels))
        return {
            "encoder": self.encoder.init(first, pixels)["params"],
            "decoder": self.decoder.init(second, latents)["params"],
        }

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """One cell per ``factor`` x ``factor`` pixels."""
        return (*cells("label_ae codec", size, self.factor), self.latent_channels)

    def analog(
        self, labels: Int[AnyArray, "batch height width"]
    ) -> Float[Array, "batch height width bits"]:
        """What the encoder sees: the label's bits as +-1, and 0 where the docstring says so."""
        labels = jnp.asarray(labels, jnp.int32)
        words = analog(jnp.where(labels == VOID, FILE_VOID, labels), self.channels)
        silent = jnp.zeros(labels.shape, bool)
        if self.void == "zero":
            silent = silent | (labels == VOID)
        if self.background == "zero":
            silent = silent | (labels == 0)
        return jnp.where(silent[..., None], 0.0, words)

    def moments(
        self, params: Params, labels: Int[AnyArray, "batch height width"]
    ) -> tuple[Float[Array, "batch rows columns c"], Float[Array, "batch rows columns c"]]:
        """Mean and standard deviation of the latent, before ``scale``."""
        cells("label_ae codec", labels.shape[1:], self.factor)
        words = _fold(self.analog(labels), self.patch)
        out = self.encoder.apply({"params": params["encoder"]}, words)
        mean, log_variance = jnp.split(out, 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))

    def encode(
        self,
        params: Params,
        labels: Int[AnyArray, "batch height width"],
        *,
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch rows columns c"]:
        """Scaled latents: the mode, or a sample if ``latent="sample"`` and keys are given.

        They are refined last, if the codec refines.
        """
        latents = self.scale * self._point(*self.moments(params, labels), keys)
        if self.refine == 0:
            return latents
        return self._refined(params, jnp.asarray(labels, jnp.int32), latents, self.refine)

    def _refined(self, params: Params, labels: Array, latents: Array, steps: int) -> Array:
        """Line 5 of the module docstring, with that many steps."""
        unit = self.refine_rate * jnp.std(latents, axis=(1, 2, 3), keepdims=True)
        pixels = labels.shape[1] * labels.shape[2]

        def error(latents: Array) -> Array:
            # a sum over rows of their own: no row's gradient depends on another row
            rows = jax.vmap(cross_entropy)(self.logits(params, latents)[:, None], labels[:, None])
            return pixels * rows.sum()  # Adam's epsilon is meant for gradients of order 1

        mean = square = jnp.zeros_like(latents)
        for i in range(steps):  # no loop of XLA's: its CPU backend takes five times as long in one
            gradient = jax.grad(error)(latents)
            mean = 0.8 * mean + 0.2 * gradient
            square = 0.95 * square + 0.05 * jnp.square(gradient)
            spread = jnp.sqrt(square / (1 - 0.95 ** (i + 1))) + 1e-8
            length = (1 + math.cos(math.pi * i / steps)) / 2
            latents = latents - length * unit * mean / (1 - 0.8 ** (i + 1)) / spread
        return latents

    def _point(self, mean: Array, std: Array, keys: Array | None) -> Array:
        if self.latent == "mode" or keys is None:
            return mean
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        return mean + std * noise

    def logits(
        self,
        params: Params,
        latents: Float[AnyArray, "batch rows columns c"],
        *,
        interpolate: bool = True,
    ) -> Float[Array, "batch height width classes"]:
        """Class logits of scaled latents, in pixels, or as the decoder leaves them."""
        x = jnp.asarray(latents, jnp.float32) / self.scale
        out = self.decoder.apply({"params": params["decoder"]}, x)
        out = _unfold(out, self.patch)
        if not interpolate or self.shrink == 1:
            return out
        shape = (out.shape[0], *(n * self.shrink for n in out.shape[1:3]), self.classes)
        return jax.image.resize(out, shape, "bilinear")

    def decode(
        self, params: Params, latents: Float[AnyArray, "batch rows columns c"]
    ) -> Int32[Array, "batch height width"]:
        """The most probable class of every pixel."""
        return self.decode_with_confidence(params, latents)[0]

    def decode_with_confidence(
        self, params: Params, latents: Float[AnyArray, "batch rows columns c"]
    ) -> tuple[Int32[Array, "batch height width"], Float[Array, "batch height width"]]:
        """The most probable class and its probability; logits of a few images at a time."""
        widest = max(self.classes, *self.up_widths[-1:], 1)
        pixels = latents.shape[1] * latents.shape[2] * self.factor**2

        def read(rows: Array) -> tuple[Array, Array]:
            return self.read(self.logits(params, rows))

        latents = jnp.asarray(latents, jnp.float32)
        return map_rows(read, latents, values_per_row=pixels * widest)

    def loss(
        self,
        params: Params,
        labels: Int[AnyArray, "batch height width"],
        keys: Key[Array, " batch"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The reconstruction loss; beside it its parts and the spread of the scaled latents."""
        labels = jnp.asarray(labels, jnp.int32)
        sampling, drawing = _two_keys(keys)
        mean, std = self.moments(params, labels)
        latents = self.scale * self._point(mean, std, sampling)
        logits = self.logits(params, latents, interpolate=self.point_loss is None)
        if self.point_loss is None:
            parts = {"cross_entropy": cross_entropy(logits, labels)}
            parts |= self._refined_loss(params, labels, latents)
        else:
            draws = self.point_loss.draw(drawing, self.classes)
            parts = self.point_loss(logits, labels, draws)
        total = sum(parts.values())
        spread = {"latent/std": jnp.std(latents), "latent/noise": self.scale * jnp.mean(std)}
        return total, {"loss": total} | {"loss/" + k: v for k, v in parts.items()} | spread

    def _refined_loss(self, params: Params, labels: Array, latents: Array) -> dict[str, Array]:
        """The second part of line 6 of the module docstring, if there is one."""
        if self.refine_in_training == 0:
            return {}
        still, latents = jax.lax.stop_gradient((params, latents))
        latents = self._refined(still, labels, latents, self.refine_in_training)
        logits = self.logits(params, jax.lax.stop_gradient(latents))
        return {"refined": cross_entropy(logits, labels)}

    def read(
        self, logits: Float[Array, "batch height width classes"]
    ) -> tuple[Int32[Array, "batch height width"], Float[Array, "batch height width"]]:
        """Labels and confidences of logits, after ``prob_threshold``."""
        labels = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        confidence = jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, axis=-1))
        if self.prob_threshold > 0:
            fallback = 0 if self.threshold_to == "background" else VOID
            labels = jnp.where(confidence < self.prob_threshold, fallback, labels)
        return labels, confidence


def cross_entropy(
    logits: Float[Array, "batch height width classes"], labels: Int[Array, "batch height width"]
) -> Float[Array, ""]:
    """Mean of -log softmax(logits)[label] over the pixels that are not VOID; 0 if all are VOID.

    Source: JoDiffusion, eq. 1 (a mean instead of its sum, as in its code).
    """
    valid = labels != VOID
    index = jnp.where(valid, labels, 0).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.where(valid, losses, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def _two_keys(keys: Key[Array, " batch"]) -> tuple[Array, Array]:
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def unit_scale(latents: Float[Array, "..."]) -> Float[Array, ""]:
    """The ``scale`` that gives these unscaled latents (``moments``) unit standard deviation."""
    return 1 / jnp.std(latents)


def _fold(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b rows columns d"]:
    if patch == 1:
        return x
    return rearrange(x, "b (h y) (w x) c -> b h w (y x c)", y=patch, x=patch)


def _unfold(x: Float[Array, "b rows columns d"], patch: int) -> Float[Array, "b h w c"]:
    if patch == 1:
        return x
    return rearrange(x, "b h w (y x c) -> b (h y) (w x) c", y=patch, x=patch)


def _choice(name: str, given: str, known: tuple[str, ...]) -> None:
    _valid(name, repr(given), given in known, "one of " + ", ".join(map(repr, known)))


def _valid(name: str, given: Any, good: bool, what: str) -> None:
    if not good:
        raise ValueError(
            f"label_ae codec: {name} = {given}; it must be {what}. Change the codec config."
        )

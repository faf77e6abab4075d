"""Label maps through a convolutional autoencoder: bits in, a few latent channels, class logits out.

1. input: the label's bits as +-1 (``bits.analog``); VOID, and label 0 if ``background="zero"``,
   are 0 in every channel.
2. encoder: (mean, log variance), one cell per factor = patch 2^(len(widths) - 1) pixels a side.
3. latent = scale * (mean + std * noise), or scale * mean ("mode", and whenever no keys are given).
4. decoder: class logits; bilinear resize where it has fewer doublings than the encoder halvings.
5. refinement (``refine`` > 0, when encoding only): Adam steps on the latent itself.
6. loss: cross-entropy over the pixels that are not VOID. There is no KL term.
7. label = argmax; confidence = max softmax; below ``prob_threshold`` the label becomes 0 or VOID.

The defaults are the published network. Beyond it: ``patch`` > 1, ``up_widths`` that narrow from
stage to stage, any number of ``middle_blocks`` (the published option has 0 or 2), and VOID that
stays out of input and loss. The original instead merged VOID into background or fed its low bits:
``background="zero", void="low_bits"``.

Source: JoDiffusion (2512.13014), section 3.2, eq. 1, ``LightweightLabelVAE``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float, Key

from jointseg_jax import rng
from jointseg_jax.codecs.batched_map import map_rows
from jointseg_jax.codecs.bits import analog, bits_for
from jointseg_jax.codecs.codec import (
    CHANGE,
    AnyLatents,
    Keys,
    Kind,
    LabelMaps,
    Labels,
    LatentMaps,
    LossAndMetrics,
    Reading,
    two_keys,
)
from jointseg_jax.codecs.label_net import Decoder, Encoder
from jointseg_jax.codecs.layers import apply
from jointseg_jax.codecs.pixels import cells
from jointseg_jax.codecs.point_loss import PointLoss, cross_entropy
from jointseg_jax.types import FILE_VOID, VOID, Array, Params, require, require_one_of


@dataclass(frozen=True, kw_only=True)
class LabelAE:
    """The label autoencoder as a codec."""

    classes: int
    bits: int | None = None  # None: what tells the ids apart that are not at analog 0
    background: Literal["code", "zero"] = "code"  # what label 0 becomes: its bits, or analog 0
    void: Literal["zero", "low_bits"] = "zero"  # what VOID becomes: analog 0, or 255's low bits
    widths: Sequence[int] = (128, 256, 512, 512)  # of the encoder; each after the first halves
    middle_width: int = 512
    middle_blocks: int = 0  # residual blocks in the middle of the encoder and of the decoder
    up_widths: Sequence[int] = (512, 512, 512)  # of the decoder's doublings
    latent_channels: int = 4
    groups: int = 32  # of the group norms
    patch: int = 1
    """> 1 folds patch x patch pixels into channels before the first and after the last convolution,
    so that nothing runs at full resolution."""
    latent: Literal["mode", "sample"] = "mode"
    scale: float = 0.2  # of the latents that leave; ``unit_scale`` fits it
    prob_threshold: float = 0.0  # the label of pixels less sure than this is replaced ...
    threshold_to: Literal["background", "void"] = "background"  # ... by this
    point_loss: PointLoss | Mapping[str, object] | None = None
    """A ``PointLoss``, or its fields: takes the place of the cross-entropy over all pixels."""
    refine: int = 0  # Adam steps on the latents, when encoding
    refine_rate: float = 0.1  # their learning rate, in standard deviations of the latents
    refine_in_training: int = 0
    """> 0 adds to the loss the cross-entropy of latents refined in that many steps, these held
    constant: the decoder learns to be exact where refined latents lie."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; parameters, moments, logits and latents are float32."""
    kind: ClassVar[Kind] = "labels"

    def __post_init__(self) -> None:
        for name in ("widths", "up_widths"):
            # Hashable: jit takes a codec as static.
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.point_loss, Mapping):
            object.__setattr__(self, "point_loss", PointLoss(**cast(Params, self.point_loss)))
        allowed = {
            "background": ("code", "zero"),
            "void": ("zero", "low_bits"),
            "latent": ("mode", "sample"),
            "threshold_to": ("background", "void"),
            "dtype": ("float32", "bfloat16"),
        }
        for name, values in allowed.items():
            require_one_of(f"label_ae codec: {name}", getattr(self, name), values, CHANGE)
        checks = {
            "classes": (self.classes >= 2, "at least 2"),
            "patch": (self.patch >= 1, "at least 1"),
            "scale": (self.scale > 0, "positive"),
            "prob_threshold": (0 <= self.prob_threshold < 1, "in [0, 1)"),
            "refine": (self.refine >= 0, "at least 0"),
            "refine_in_training": (self.refine_in_training >= 0, "at least 0"),
            "refine_rate": (self.refine_rate > 0, "positive"),
        }
        for name, (holds, rule) in checks.items():
            require(f"label_ae codec: {name}", getattr(self, name), holds, rule, CHANGE)
        self._check_network()

    def _check_network(self) -> None:
        enough = 2**self.channels >= self._corners and self.channels <= 16
        rule = f"enough for {self._corners} codes and at most 16"
        require("label_ae codec: bits", self.channels, enough, rule, CHANGE)
        fewer = len(self.up_widths) < len(self.widths)
        rule = f"shorter than widths = {self.widths}"
        require("label_ae codec: up_widths", self.up_widths, fewer, rule, CHANGE)
        # Group norms see the middle, and what leaves the last doubling.
        normed = (self.middle_width, *self.up_widths[-1:])
        shared = all(w % self.groups == 0 for w in normed)
        rule = f"a divisor of the normalised widths {normed}"
        require("label_ae codec: groups", self.groups, shared, rule, CHANGE)

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
        widths, channels = tuple(self.widths), self.latent_channels
        return Encoder(widths=widths, latent_channels=channels, **self._shared)

    @property
    def decoder(self) -> Decoder:
        """The Linen module of params["decoder"]."""
        outputs = self.classes * self.patch**2
        return Decoder(up_widths=tuple(self.up_widths), outputs=outputs, **self._shared)

    @property
    def _shared(self) -> dict[str, Any]:
        """The fields that both networks have."""
        own = {name: getattr(self, name) for name in ("middle_width", "middle_blocks", "groups")}
        return own | {"dtype": jnp.dtype(self.dtype)}

    def init(self, key: Key[Array, ""]) -> Params:
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

    def analog(self, labels: LabelMaps) -> Float[Array, "batch height width bits"]:
        """What the encoder sees: the label's bits as +-1; 0 for VOID or label 0 if so chosen."""
        labels = jnp.asarray(labels, jnp.int32)
        # [b, h, w, bits]; VOID has the bits of the file value that the original saw in its place
        words = analog(jnp.where(labels == VOID, FILE_VOID, labels), self.channels)
        silent = jnp.zeros(labels.shape, bool)
        if self.void == "zero":
            silent = silent | (labels == VOID)
        if self.background == "zero":
            silent = silent | (labels == 0)
        return jnp.where(silent[..., None], 0.0, words)

    def moments(self, params: Params, labels: LabelMaps) -> tuple[LatentMaps, LatentMaps]:
        """Mean and standard deviation of the latent, before ``scale``."""
        cells("label_ae codec", labels.shape[1:], self.factor)
        words = _fold(self.analog(labels), self.patch)  # [b, h / patch, w / patch, bits patch^2]
        out = apply(self.encoder, params["encoder"], words)
        mean, log_variance = jnp.split(out, 2, axis=-1)  # each [b, h / factor, w / factor, c]
        # Clamped as in the original: exp of an untrained output could overflow.
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))

    def encode(self, params: Params, labels: LabelMaps, *, keys: Keys | None = None) -> LatentMaps:
        """Scaled latents: the mode, or a sample if ``latent="sample"`` and keys are given.

        They are refined last, if the codec refines.
        """
        # (3) latent = scale * (mean + std * noise), or scale * mean
        latents = self.scale * self._point(*self.moments(params, labels), keys)
        if self.refine == 0:
            return latents
        return self._refine(params, jnp.asarray(labels, jnp.int32), latents, self.refine)

    def _refine(self, params: Params, labels: Array, latents: Array, steps: int) -> Array:
        """Runs Adam on the latents, down the cross-entropy of their decoding; each row alone.

        The encoder is one guess for all maps; this closes most of what it misses, at the price of
        ``steps`` gradients of the decoder. Source: the iterative inference of Kim et al. 2018
        (semi-amortized autoencoders), at encoding time; it is not in JoDiffusion.
        """
        # Steps in units of a row's own spread suit latents of any scale.
        lr = self.refine_rate * jnp.std(latents, axis=(1, 2, 3), keepdims=True)  # [b, 1, 1, 1]
        num_pixels = labels.shape[1] * labels.shape[2]

        def error(z: Array) -> Array:
            # A sum over rows: with a mean, a row's gradient would depend on the batch around it.
            rows = jax.vmap(cross_entropy)(self.logits(params, z)[:, None], labels[:, None])  # [b]
            return num_pixels * rows.sum()  # Adam's epsilon is meant for gradients of order 1

        m = v = jnp.zeros_like(latents)  # [b, h / factor, w / factor, c]
        # Unrolled: in one of XLA's loops its CPU backend takes five times as long.
        for i in range(steps):
            g = jax.grad(error)(latents)
            m = 0.8 * m + 0.2 * g
            v = 0.95 * v + 0.05 * jnp.square(g)
            v_hat = v / (1 - 0.95 ** (i + 1))
            cosine = (1 + math.cos(math.pi * i / steps)) / 2  # from 1 down to nearly 0
            # z <- z - cosine lr m_hat / (sqrt(v_hat) + eps) with m_hat = m / (1 - 0.8^(i+1)),
            # rounded in the order in which stored latents were made.
            spread = jnp.sqrt(v_hat) + 1e-8
            latents = latents - cosine * lr * m / (1 - 0.8 ** (i + 1)) / spread
        return latents

    def _point(self, mean: Array, std: Array, keys: Array | None) -> Array:
        if self.latent == "mode" or keys is None:
            return mean
        return mean + std * rng.normal(keys, mean)

    def logits(
        self, params: Params, latents: AnyLatents, *, interpolate: bool = True
    ) -> Float[Array, "batch height width classes"]:
        """Class logits of scaled latents, in pixels, or as the decoder leaves them."""
        x = jnp.asarray(latents, jnp.float32) / self.scale
        out = apply(self.decoder, params["decoder"], x)
        out = _unfold(out, self.patch)  # [b, h / shrink, w / shrink, classes]
        if not interpolate or self.shrink == 1:
            return out
        shape = (out.shape[0], *(n * self.shrink for n in out.shape[1:3]), self.classes)
        return jax.image.resize(out, shape, "bilinear")

    def decode(self, params: Params, latents: AnyLatents) -> Labels:
        """The most probable class of every pixel."""
        return self.decode_with_confidence(params, latents)[0]

    def decode_with_confidence(self, params: Params, latents: AnyLatents) -> Reading:
        """The most probable class and its probability; logits of a few images at a time."""
        # The largest arrays are the logits, or the activations before them.
        widest = max(self.classes, *self.up_widths[-1:], 1)
        pixels = latents.shape[1] * latents.shape[2] * self.factor**2

        def read(rows: Array) -> tuple[Array, Array]:
            return self.read(self.logits(params, rows))

        latents = jnp.asarray(latents, jnp.float32)
        return map_rows(read, latents, values_per_row=pixels * widest)

    def loss(self, params: Params, labels: LabelMaps, keys: Keys) -> LossAndMetrics:
        """The reconstruction loss and its parts, and the spread of the scaled latents."""
        labels = jnp.asarray(labels, jnp.int32)
        sampling, drawing = two_keys(keys)
        mean, std = self.moments(params, labels)
        latents = self.scale * self._point(mean, std, sampling)
        # The point losses have coordinates in [0, 1] and need no resize.
        logits = self.logits(params, latents, interpolate=self.point_loss is None)
        if self.point_loss is None:
            parts = {"cross_entropy": cross_entropy(logits, labels)}
            parts |= self._refined_loss(params, labels, latents)
        else:
            point_loss = cast(PointLoss, self.point_loss)  # since the constructor
            draws = point_loss.draw(drawing, self.classes)
            parts = point_loss(logits, labels, draws)
        total = cast(Array, sum(parts.values()))
        spread = {"latent/std": jnp.std(latents), "latent/noise": self.scale * jnp.mean(std)}
        return total, {"loss": total} | {"loss/" + k: v for k, v in parts.items()} | spread

    def _refined_loss(self, params: Params, labels: Array, latents: Array) -> dict[str, Array]:
        """The cross-entropy of refined latents, if ``refine_in_training`` asks for it."""
        if self.refine_in_training == 0:
            return {}
        # The decoder alone learns from it: no gradient goes through the steps of the refinement.
        still, latents = jax.lax.stop_gradient((params, latents))
        latents = self._refine(still, labels, latents, self.refine_in_training)
        logits = self.logits(params, jax.lax.stop_gradient(latents))
        return {"refined": cross_entropy(logits, labels)}

    def read(self, logits: Float[Array, "batch height width classes"]) -> Reading:
        """Labels and confidences of logits, after ``prob_threshold``."""
        labels = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # max softmax = exp(max - logsumexp), without an array of all probabilities
        confidence = jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, axis=-1))
        if self.prob_threshold > 0:
            fallback = 0 if self.threshold_to == "background" else VOID
            labels = jnp.where(confidence < self.prob_threshold, fallback, labels)
        return labels, confidence


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

"""Segmentation losses on sampled points, most of them where the prediction is least certain.

With P points, K = floor(importance P), and coordinates (x, y) in [0, 1]^2 over the whole map:

1. Draw ``oversample`` P candidates uniformly; keep the K least certain ones, add P - K fresh ones.
2. Class loss: cross-entropy at P points of an image; uncertainty = second largest - largest logit;
   the label is that of the pixel the point lies in, VOID points do not count.
3. Mask losses: every (image, class present in it) is an object; its logit is that class's channel,
   its target the bilinear sample of (labels == class), uncertainty = -|logit|.
   bce = mean over points, dice = 1 - (2 sum p q + 1) / (sum p + sum q + 1) with p = sigmoid(logit),
   both averaged over all objects of the batch.
4. Bilinear samples treat what lies outside the map as 0 (half a pixel at the border).

Objects occupy ``slots`` per image with a presence flag, so shapes are static under jit.

Source: Kirillov et al., PointRend (1912.08193), section 3.1; JoDiffusion ``loss_segmentation.py``
(``--loss_type seg``), where VOID points count as negatives of every mask: ``void="negative"``.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from jointseg_jax.types import VOID, Array


class Draws(NamedTuple):
    """Uniform numbers in [0, 1): candidates and fresh points, per image and per object slot."""

    class_candidates: Float[Array, "batch candidates 2"]
    class_fresh: Float[Array, "batch fresh 2"]
    mask_candidates: Float[Array, "batch slots candidates 2"]
    mask_fresh: Float[Array, "batch slots fresh 2"]


class ClassPoints(NamedTuple):
    """What the class loss reads at its points."""

    logits: Float[Array, "batch points classes"]
    labels: Int[Array, "batch points"]


class MaskPoints(NamedTuple):
    """What the mask losses read at the points of each object slot."""

    logits: Float[Array, "batch slots points"]
    targets: Float[Array, "batch slots points"]
    counted: Bool[Array, "batch slots points"]
    present: Bool[Array, "batch slots"]


@dataclass(frozen=True, kw_only=True)
class PointLoss:
    """Cross-entropy, binary cross-entropy and dice on sampled points.

    ``slots`` bounds the classes of one image that are objects (None: all); classes beyond it, in
    id order, are left out of the mask losses, so choose the most that one image holds.
    """

    points: int = 12544
    oversample: int = 3
    importance: float = 0.75
    slots: int | None = None
    void: Literal["ignore", "negative"] = "ignore"

    def __post_init__(self) -> None:
        _valid("points", self.points, self.points >= 1)
        _valid("oversample", self.oversample, self.oversample >= 1)
        _valid("importance", self.importance, 0 <= self.importance <= 1)
        _valid("slots", self.slots, self.slots is None or self.slots >= 1)
        _valid("void", self.void, self.void in ("ignore", "negative"))

    @property
    def kept(self) -> int:
        """Points chosen by uncertainty."""
        return int(self.importance * self.points)

    def draw(self, keys: Key[Array, " batch"], classes: int) -> Draws:
        """The uniform numbers of a batch, each row from its own key."""
        slots = min(self.slots or classes, classes)
        candidates, fresh = self.oversample * self.points, self.points - self.kept
        shapes = ((candidates, 2), (fresh, 2), (slots, candidates, 2), (slots, fresh, 2))

        def row(key: Array) -> tuple[Array, ...]:
            return tuple(jax.random.uniform(k, s) for k, s in zip(jax.random.split(key, 4), shapes))

        return Draws(*jax.vmap(row)(keys))

    def __call__(
        self,
        logits: Float[Array, "batch rows columns classes"],
        labels: Int[Array, "batch height width"],
        draws: Draws,
    ) -> dict[str, Float[Array, ""]]:
        """``class`` (cross-entropy), ``bce`` and ``dice``; the published loss is their sum."""
        masks = self.mask_points(logits, labels, draws)
        bce, dice = mask_losses(masks)
        return {
            "class": class_loss(self.class_points(logits, labels, draws)),
            "bce": bce,
            "dice": dice,
        }

    def class_points(
        self,
        logits: Float[Array, "batch rows columns classes"],
        labels: Int[Array, "batch height width"],
        draws: Draws,
    ) -> ClassPoints:
        """Logits and labels at the points of the class loss, least certain first."""
        flat = logits.reshape(logits.shape[0], -1, logits.shape[-1])

        def sample(points: Array) -> Array:
            def tap(index: Array) -> Array:
                return jnp.take_along_axis(flat, index[..., None], axis=1)

            return _bilinear(points, logits.shape[1:3], tap, trailing=1)

        best, second = jnp.moveaxis(jax.lax.top_k(sample(draws.class_candidates), 2)[0], -1, 0)
        points = self._choose(second - best, draws.class_candidates, draws.class_fresh)
        return ClassPoints(sample(points), _nearest(points, labels))

    def mask_points(
        self,
        logits: Float[Array, "batch rows columns classes"],
        labels: Int[Array, "batch height width"],
        draws: Draws,
    ) -> MaskPoints:
        """Logits and targets at the points of each object, least certain first."""
        batch, classes = logits.shape[0], logits.shape[-1]
        ids, present = objects(labels, classes, draws.mask_candidates.shape[1])
        flat, pixels = logits.reshape(batch, -1), labels.reshape(batch, -1)

        def logit(index: Array) -> Array:
            return _pick(flat, index * classes + ids[..., None])

        def inside(index: Array) -> Array:
            return (_pick(pixels, index) == ids[..., None]).astype(jnp.float32)

        uncertainty = -jnp.abs(_bilinear(draws.mask_candidates, logits.shape[1:3], logit))
        points = self._choose(uncertainty, draws.mask_candidates, draws.mask_fresh)
        read = _bilinear(points, logits.shape[1:3], logit)
        targets = _bilinear(points, labels.shape[1:3], inside)
        flat_points = points.reshape(batch, -1, 2)
        known = (_nearest(flat_points, labels) != VOID).reshape(read.shape)
        counted = jnp.ones_like(known) if self.void == "negative" else known
        return MaskPoints(read, targets, counted, present)

    def _choose(self, uncertainty: Array, candidates: Array, fresh: Array) -> Array:
        _, index = jax.lax.top_k(jax.lax.stop_gradient(uncertainty), self.kept)
        chosen = jnp.take_along_axis(candidates, index[..., None], axis=-2)
        return jnp.concatenate([chosen, fresh], axis=-2)


def objects(
    labels: Int[Array, "batch height width"], classes: int, slots: int
) -> tuple[Int[Array, "batch slots"], Bool[Array, "batch slots"]]:
    """The class ids present in each map, ascending, in the first of ``slots`` places."""
    ids = jnp.arange(classes).reshape(1, 1, 1, classes)
    found = (labels[..., None] == ids).any((1, 2))
    order = jnp.argsort(~found, axis=-1, stable=True)[:, :slots]
    return order, jnp.take_along_axis(found, order, axis=-1)


def class_loss(points: ClassPoints) -> Float[Array, ""]:
    """Mean cross-entropy over the points that are not VOID; 0 if all are."""
    valid = points.labels != VOID
    index = jnp.where(valid, points.labels, 0)[..., None]
    chosen = jnp.take_along_axis(points.logits, index, axis=-1)[..., 0]
    losses = jax.nn.logsumexp(points.logits, axis=-1) - chosen
    return jnp.where(valid, losses, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def mask_losses(points: MaskPoints) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Binary cross-entropy and dice, averaged over the objects present; 0 if there is none."""
    x, q, w = points.logits, points.targets, points.counted.astype(jnp.float32)
    elementwise = jax.nn.softplus(x) - x * q
    bce = (w * elementwise).sum(-1) / jnp.maximum(w.sum(-1), 1)
    p = jax.nn.sigmoid(x)
    dice = 1 - (2 * (w * p * q).sum(-1) + 1) / ((w * p).sum(-1) + (w * q).sum(-1) + 1)
    count = jnp.maximum(points.present.sum(), 1)
    return tuple(jnp.where(points.present, v, 0.0).sum() / count for v in (bce, dice))


def _bilinear(points, size, tap, trailing: int = 0) -> Array:
    """Sum over the four pixels around each point of weight * tap(flat pixel index)."""
    height, width = size
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    total = None
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        i, j = top + row, left + column
        weight = (1 - jnp.abs(x - j)) * (1 - jnp.abs(y - i))
        weight = jnp.where((i >= 0) & (i < height) & (j >= 0) & (j < width), weight, 0.0)
        i, j = jnp.clip(i, 0, height - 1), jnp.clip(j, 0, width - 1)
        value = tap((i * width + j).astype(jnp.int32))
        term = weight.reshape(weight.shape + (1,) * trailing) * value
        total = term if total is None else total + term
    return total


def _nearest(points, labels) -> Array:
    height, width = labels.shape[1:3]
    j = jnp.clip(jnp.floor(points[..., 0] * width), 0, width - 1)
    i = jnp.clip(jnp.floor(points[..., 1] * height), 0, height - 1)
    return _pick(labels.reshape(labels.shape[0], -1), (i * width + j).astype(jnp.int32))


def _pick(flat, index) -> Array:
    """``flat[b, index[b, ...]]``."""
    picked = jnp.take_along_axis(flat, index.reshape(index.shape[0], -1), axis=1)
    return picked.reshape(index.shape)


def _valid(name: str, given: object, good: bool) -> None:
    if not good:
        raise ValueError(
            f"point loss: {name} = {given!r}; points, oversample and slots must be at least 1, "
            'importance in [0, 1], void "ignore" or "negative". Change the loss config.'
        )

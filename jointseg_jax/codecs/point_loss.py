"""Segmentation losses on sampled points, most of them where the prediction is least certain.

With P points, K = floor(importance P), and coordinates (x, y) in [0, 1]^2 over the whole map:

1. Draw ``oversample`` P candidates uniformly; keep the K least certain ones, add P - K fresh ones.
2. Class loss: cross-entropy at P points of an image, VOID points left out.
3. Mask losses: every (image, class present in it) is an object with logits x and targets q at its
   P points: bce, and dice = 1 - (2 sum p q + 1) / (sum p + sum q + 1) with p = sigmoid(x), both
   averaged over all objects of the batch.

Objects occupy ``slots`` per image with a presence flag, so shapes are static under jit.

Source: Kirillov et al., PointRend (1912.08193), section 3.1; JoDiffusion ``loss_segmentation.py``
(``--loss_type seg``), where VOID points count as negatives of every mask: ``void="negative"``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from jointseg_jax.rng import uniform
from jointseg_jax.types import VOID, Array, require, require_one_of

Logits = Float[Array, "batch rows columns classes"]
LabelMaps = Int[Array, "batch height width"]

CHANGE = "Change the loss config."


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
    """Cross-entropy, binary cross-entropy and dice on sampled points."""

    points: int = 12544  # P, per image and per object
    oversample: int = 3  # candidates per point
    importance: float = 0.75  # share of the points that are chosen by uncertainty
    slots: int | None = None
    """Classes of one image that are objects (None: all); those beyond, in id order, are left out of
    the mask losses, so choose the most that one image holds."""
    void: Literal["ignore", "negative"] = "ignore"  # "negative": VOID is outside every object

    def __post_init__(self) -> None:
        require("point loss: points", self.points, self.points >= 1, "at least 1", CHANGE)
        few = self.oversample >= 1
        require("point loss: oversample", self.oversample, few, "at least 1", CHANGE)
        share = 0 <= self.importance <= 1
        require("point loss: importance", self.importance, share, "in [0, 1]", CHANGE)
        some = self.slots is None or self.slots >= 1
        require("point loss: slots", self.slots, some, "at least 1", CHANGE)
        require_one_of("point loss: void", self.void, ("ignore", "negative"), CHANGE)

    @property
    def num_uncertain(self) -> int:
        """K, the points chosen by uncertainty."""
        return int(self.importance * self.points)

    def draw(self, keys: Key[Array, " batch"], classes: int) -> Draws:
        """The uniform numbers of a batch, each row from its own key."""
        slots = min(self.slots or classes, classes)
        candidates, fresh = self.oversample * self.points, self.points - self.num_uncertain
        shapes = ((candidates, 2), (fresh, 2), (slots, candidates, 2), (slots, fresh, 2))
        parts = jax.vmap(lambda key: jax.random.split(key, len(shapes)))(keys)  # [b, 4]
        return Draws(*(uniform(parts[:, i], shape) for i, shape in enumerate(shapes)))

    def __call__(
        self, logits: Logits, labels: LabelMaps, draws: Draws
    ) -> dict[str, Float[Array, ""]]:
        """``class`` (cross-entropy), ``bce`` and ``dice``; the published loss is their sum."""
        masks = self.mask_points(logits, labels, draws)
        bce, dice = mask_losses(masks)
        return {
            "class": class_loss(self.class_points(logits, labels, draws)),
            "bce": bce,
            "dice": dice,
        }

    def class_points(self, logits: Logits, labels: LabelMaps, draws: Draws) -> ClassPoints:
        """Logits and labels at the points of the class loss, least certain first."""
        flat = logits.reshape(logits.shape[0], -1, logits.shape[-1])  # [b, h * w, classes]

        def sample(points: Array) -> Array:
            def tap(index: Array) -> Array:
                return jnp.take_along_axis(flat, index[..., None], axis=1)

            return _bilinear(points, logits.shape[1:3], tap, trailing=1)

        # [b, candidates, classes] -> [2, b, candidates]
        best, second = jnp.moveaxis(jax.lax.top_k(sample(draws.class_candidates), 2)[0], -1, 0)
        # Uncertainty of a class: how near the second largest logit is to the largest.
        points = self._choose(second - best, draws.class_candidates, draws.class_fresh)
        return ClassPoints(sample(points), _nearest(points, labels))

    def mask_points(self, logits: Logits, labels: LabelMaps, draws: Draws) -> MaskPoints:
        """Logits and targets at the points of each object, least certain first."""
        batch, classes = logits.shape[0], logits.shape[-1]
        ids, present = objects(labels, classes, draws.mask_candidates.shape[1])
        flat, pixels = logits.reshape(batch, -1), labels.reshape(batch, -1)

        def logit(index: Array) -> Array:
            # The object's logit is its class's channel, fastest in ``flat``: [b, slots, points].
            return _pick(flat, index * classes + ids[..., None])

        def inside(index: Array) -> Array:
            return (_pick(pixels, index) == ids[..., None]).astype(jnp.float32)

        # Uncertainty of a mask: how near its logit is to 0.
        uncertainty = -jnp.abs(_bilinear(draws.mask_candidates, logits.shape[1:3], logit))
        points = self._choose(uncertainty, draws.mask_candidates, draws.mask_fresh)
        sampled = _bilinear(points, logits.shape[1:3], logit)  # [b, slots, points]
        # The target is sampled in the same way: a fraction where a border crosses the four pixels.
        targets = _bilinear(points, labels.shape[1:3], inside)
        flat_points = points.reshape(batch, -1, 2)  # [b, slots * points, 2]
        annotated = (_nearest(flat_points, labels) != VOID).reshape(sampled.shape)
        counted = jnp.ones_like(annotated) if self.void == "negative" else annotated
        return MaskPoints(sampled, targets, counted, present)

    def _choose(self, uncertainty: Array, candidates: Array, fresh: Array) -> Array:
        # Where points lie is no function to differentiate.
        _, index = jax.lax.top_k(jax.lax.stop_gradient(uncertainty), self.num_uncertain)
        uncertain = jnp.take_along_axis(candidates, index[..., None], axis=-2)
        return jnp.concatenate([uncertain, fresh], axis=-2)  # [..., points, 2]


def objects(
    labels: LabelMaps, classes: int, slots: int
) -> tuple[Int[Array, "batch slots"], Bool[Array, "batch slots"]]:
    """The class ids present in each map, ascending, in the first of the slots, and which are."""
    ids = jnp.arange(classes).reshape(1, 1, 1, classes)
    present = (labels[..., None] == ids).any((1, 2))  # [b, classes]
    # A fixed number of slots keeps shapes static under jit; stable: ids stay in order.
    order = jnp.argsort(~present, axis=-1, stable=True)[:, :slots]
    return order, jnp.take_along_axis(present, order, axis=-1)


def cross_entropy(
    logits: Float[Array, "*rows classes"], labels: Int[Array, "*rows"]
) -> Float[Array, ""]:
    """Mean of -log softmax(logits)[label] over the rows that are not VOID; 0 if all are VOID.

    Source: JoDiffusion, eq. 1 (a mean instead of its sum, as in its code).
    """
    valid = labels != VOID
    # VOID is -1, which would pick the last class; its losses are masked below.
    index = jnp.where(valid, labels, 0)[..., None]
    label_logits = jnp.take_along_axis(logits, index, axis=-1)[..., 0]  # [*rows]
    losses = jax.nn.logsumexp(logits, axis=-1) - label_logits
    return jnp.where(valid, losses, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def class_loss(points: ClassPoints) -> Float[Array, ""]:
    """The cross-entropy at the points."""
    return cross_entropy(points.logits, points.labels)


def mask_losses(points: MaskPoints) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Binary cross-entropy and dice, averaged over the objects present; 0 if there is none."""
    x, q, w = points.logits, points.targets, points.counted.astype(jnp.float32)
    # -q log p - (1 - q) log(1 - p) = softplus(x) - x q, which never takes the log of 0
    elementwise = jax.nn.softplus(x) - x * q  # [b, slots, points]
    bce = (w * elementwise).sum(-1) / jnp.maximum(w.sum(-1), 1)
    p = jax.nn.sigmoid(x)
    # The ones make two empty masks equal, instead of 0 / 0.
    dice = 1 - (2 * (w * p * q).sum(-1) + 1) / ((w * p).sum(-1) + (w * q).sum(-1) + 1)
    count = jnp.maximum(points.present.sum(), 1)
    mean_bce, mean_dice = (jnp.where(points.present, v, 0.0).sum() / count for v in (bce, dice))
    return mean_bce, mean_dice


def _bilinear(
    points: Float[Array, "... 2"],
    size: tuple[int, ...],
    tap: Callable[[Array], Array],
    trailing: int = 0,
) -> Array:
    """Sum over the four pixels around each point of weight * tap(flat pixel index).

    Args:
      size: height and width of the map.
      trailing: axes that ``tap`` adds at the end.
    """
    height, width = size
    # The centre of pixel (0, 0) lies at (0.5, 0.5) / size.
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = jnp.floor(x), jnp.floor(y)

    def term(row: int, column: int) -> Array:
        i, j = top + row, left + column
        weight = (1 - jnp.abs(x - j)) * (1 - jnp.abs(y - i))
        # What lies outside the map counts as 0: samples fade half a pixel inside its border.
        weight = jnp.where((i >= 0) & (i < height) & (j >= 0) & (j < width), weight, 0.0)
        i, j = jnp.clip(i, 0, height - 1), jnp.clip(j, 0, width - 1)
        value = tap((i * width + j).astype(jnp.int32))
        return weight.reshape(weight.shape + (1,) * trailing) * value

    return term(0, 0) + term(0, 1) + term(1, 0) + term(1, 1)


def _nearest(
    points: Float[Array, "batch points 2"], labels: LabelMaps
) -> Int[Array, "batch points"]:
    """The label of the pixel that each point lies in."""
    height, width = labels.shape[1:3]
    j = jnp.clip(jnp.floor(points[..., 0] * width), 0, width - 1)
    i = jnp.clip(jnp.floor(points[..., 1] * height), 0, height - 1)
    return _pick(labels.reshape(labels.shape[0], -1), (i * width + j).astype(jnp.int32))


def _pick(flat: Array, index: Int[Array, "batch ..."]) -> Array:
    """``flat[b, index[b, ...]]``."""
    picked = jnp.take_along_axis(flat, index.reshape(index.shape[0], -1), axis=1)
    return picked.reshape(index.shape)

"""Paired transforms: image, labels and segments always move together.

A transform is a frozen dataclass called as ``(record, rng, train) -> record``. It returns a new
record and leaves the arrays of the old one alone. With ``train=False`` nothing is random.

Geometry of a resize from ``n`` to ``m`` pixels over the source box ``[b, b + s)``:

1. output pixel ``i`` has its centre at ``c_i = b + (i + 1/2) s / m`` in source pixels;
2. images are filtered around ``c_i`` (bicubic, antialiased: the kernel widens with ``s / m``);
3. labels and segments take the value at ``floor(c_i)``, so no value can appear that was not there.

Both use the same box, hence image and labels stay aligned to a fraction of a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import Record
from jointseg_jax.data.resample import Box, resample


@runtime_checkable
class Transform(Protocol):
    """A paired transform of one record."""

    def __call__(self, record: Record, rng: np.random.Generator, train: bool) -> Record:
        """Returns the transformed record."""
        ...

    def for_classes(self, classes: Classes) -> Transform:
        """Returns the transform with what it needs to know of the classes filled in."""
        ...


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Brings a record to a fixed size."""

    size: int | tuple[int, int]  # pixels: one number for a square, or (height, width)
    mode: str = "crop"
    """``crop`` scales until the target is just covered, then crops (at random in training, in the
    centre otherwise); ``stretch`` maps the whole record onto the target."""
    random: bool = True  # training crops lie at random; False: in the centre, as in evaluation
    random_scale: tuple[float, float] = (1.0, 1.0)
    """In training, an extra factor on the scaled size drawn log-uniformly from (low, high) before
    the crop: (1, 2) shows parts of the picture up to twice as large."""

    def __post_init__(self) -> None:
        if min(self.target) < 1:
            raise ValueError(f"Resize: size={self.size} given; both sides need 1 pixel or more.")
        if self.mode not in BOXES:
            raise ValueError(f"Resize: mode={self.mode!r} given; one of: {', '.join(BOXES)}.")
        low, high = self.random_scale
        if not 1.0 <= low <= high:
            raise ValueError(
                f"Resize: random_scale={self.random_scale} given; 1 <= low <= high must hold (a "
                "scale under 1 would leave the crop partly empty). Set random_scale=(1.0, high)."
            )
        if self.mode == "stretch" and high > 1.0:
            raise ValueError(
                f"Resize: random_scale={self.random_scale} with mode='stretch'; scales belong to "
                "crops. Set mode='crop' or random_scale=(1.0, 1.0)."
            )

    @property
    def target(self) -> tuple[int, int]:
        """The output size (height, width)."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return height, width

    def for_classes(self, classes: Classes) -> Resize:
        """Returns itself: a size does not depend on the classes."""
        return self

    def __call__(self, record: Record, rng: np.random.Generator, train: bool) -> Record:
        box = BOXES[self.mode](self, record["image"].shape[:2], rng, train and self.random)
        # One box for all of them: that is what keeps labels aligned with their image.
        out = record.copy()
        out["image"] = resize_image(record["image"], self.target, box)
        out["labels"] = resize_labels(record["labels"], self.target, box)
        if "segments" in record:
            out["segments"] = resize_labels(record["segments"], self.target, box)
        return out


@dataclass(frozen=True, kw_only=True)
class Flip:
    """Mirrors a record left to right, in training only.

    Captions are left as they are: use ``probability=0`` where captions name sides.
    """

    probability: float = 0.5
    swaps: tuple[tuple[int, int], ...] | None = None
    """Pairs of class ids that are exchanged in a mirror (left eye, right eye); None takes them from
    the classes of the source."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"Flip: probability={self.probability} given; must lie in [0, 1].")

    def for_classes(self, classes: Classes) -> Flip:
        """Returns a flip that swaps the left and right classes of ``classes``."""
        if self.swaps is not None:
            return self
        return replace(self, swaps=classes.swaps)

    def __call__(self, record: Record, rng: np.random.Generator, train: bool) -> Record:
        out = record.copy()
        if not train or rng.random() >= self.probability:
            return out
        out["image"] = mirror(record["image"])
        # In a mirror a left eye is where right eyes are.
        out["labels"] = swap(mirror(record["labels"]), self.swaps or ())
        if "segments" in record:
            out["segments"] = mirror(record["segments"])
        return out


TRANSFORMS = {"resize": Resize, "flip": Flip}


def _cover(resize: Resize, shape: tuple[int, int], rng: np.random.Generator, train: bool) -> Box:
    """Returns the part of the source that a crop of the scaled record shows."""
    ratio = max(t / s for t, s in zip(resize.target, shape))  # the scaled record covers the target
    if train:
        low, high = np.log(resize.random_scale)
        ratio *= float(np.exp(rng.uniform(low, high)))
    scaled = [max(t, round(s * ratio)) for t, s in zip(resize.target, shape)]
    room = [n - t for n, t in zip(scaled, resize.target)]
    corner = [int(rng.integers(r + 1)) for r in room] if train else [r // 2 for r in room]
    # back to source pixels: sides are rounded, so the scale of each axis is its own
    unit = [s / n for s, n in zip(shape, scaled)]
    top, left = (c * u for c, u in zip(corner, unit))
    height, width = (t * u for t, u in zip(resize.target, unit))
    return top, left, height, width


def _whole(resize: Resize, shape: tuple[int, int], rng: np.random.Generator, train: bool) -> Box:
    """Returns the whole source."""
    return 0.0, 0.0, float(shape[0]), float(shape[1])


BOXES = {"crop": _cover, "stretch": _whole}


def resize_image(image: np.ndarray, target: tuple[int, int], box: Box) -> np.ndarray:
    """Resamples the box of a uint8 RGB image, bicubic and antialiased."""
    height, width = image.shape[:2]
    if box == (0.0, 0.0, height, width) and target == (height, width):
        return image
    return resample(image, target, box)


def resize_labels(labels: np.ndarray, target: tuple[int, int], box: Box) -> np.ndarray:
    """Samples the box of an integer map at the nearest pixel; any dtype, no new values."""
    top, left, tall, wide = box
    rows = _nearest(top, tall, target[0], labels.shape[0])
    columns = _nearest(left, wide, target[1], labels.shape[1])
    return labels.take(rows, 0).take(columns, 1)


def _nearest(start: float, span: float, count: int, length: int) -> np.ndarray:
    # c_i = b + (i + 1/2) s / m; the value at floor(c_i)
    centres = start + (np.arange(count) + 0.5) * (span / count)
    return np.clip(np.floor(centres).astype(np.int64), 0, length - 1)


def mirror(array: np.ndarray) -> np.ndarray:
    """Exchanges left and right."""
    # Band by band, which for three of them is five times as fast.
    out = np.empty_like(array)
    for band in np.ndindex(array.shape[2:]):
        out[..., *band] = array[:, ::-1, *band]
    return out


def swap(labels: np.ndarray, pairs: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Exchanges the two class ids of each pair."""
    out = labels.copy() if pairs else labels
    for left, right in pairs:
        out[labels == left], out[labels == right] = right, left
    return out

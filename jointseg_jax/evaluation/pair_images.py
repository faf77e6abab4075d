"""Images compared: what an image codec gives back with what it was given, in grey levels.

With e the difference of two uint8 images, over all pixels and channels of an image:

1. mean absolute error: mean |e|
2. PSNR: 10 log10(255^2 / mean e^2) in dB, per image; at most ``IDENTICAL``, that of equal images

Both are averaged over images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from jointseg_jax.codecs.pixels import quantise
from jointseg_jax.evaluation.alignment import number

IDENTICAL = 100.0
"""PSNR of an image with itself."""

Images = UInt8[np.ndarray, "batch height width channels"]


class ImageReconstruction:
    """What a codec makes of images, batch by batch."""

    def __init__(self) -> None:
        self.psnr: list[np.ndarray] = []
        self.error: list[np.ndarray] = []

    def add(
        self,
        images: Images,
        decoded: Float[np.ndarray, "batch height width channels"],
        valid: Bool[np.ndarray, " batch"] | None = None,
    ) -> None:
        """Counts a batch of images and what came back for them, floats in [-1, 1]."""
        rows = slice(None) if valid is None else valid
        # Rounded first: measured is the file that would be written
        back = np.asarray(quantise(decoded[rows]))
        self.psnr.append(psnr(images[rows], back))
        self.error.append(np.abs(images[rows].astype(np.float64) - back).mean((1, 2, 3)))

    def report(self) -> dict[str, Any]:
        """The numbers as JSON values; None where there was nothing to measure."""
        psnr, error = (np.concatenate(v or [np.zeros(0)]) for v in (self.psnr, self.error))
        fields = {"psnr": psnr.mean, "worst_psnr": psnr.min, "mean_absolute_error": error.mean}
        # Called only where there is something: the least of nothing is an error.
        return {k: number(measure()) if len(psnr) else None for k, measure in fields.items()}


def psnr(images: Images, others: Images) -> Float[np.ndarray, " batch"]:
    """The PSNR of each image with the other of its row."""
    # In float64: squares of uint8 differences need 16 bits, their mean more
    square = np.square(images.astype(np.float64) - others).mean((1, 2, 3))
    # (2) solved for mean e^2 where the PSNR is IDENTICAL: equal images get that, not infinity
    least = 255**2 / 10 ** (IDENTICAL / 10)
    return 10 * np.log10(255**2 / np.maximum(square, least))

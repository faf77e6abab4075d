"""The original's clean-up of label maps, one whole-image step after the other: the slow way.

The rule is that of ``masks`` (``mode="sequential"``), and the results are the same to the last
pixel; here every region costs several passes over the whole map, as it does there.

Source: JoDiffusion, section 3.3 (mask optimisation); written from its description, no code taken.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Integer
from scipy import ndimage

BACKGROUND = 0
RING = np.ones((3, 3), bool)


def absorb(
    labels: Integer[np.ndarray, "height width"], area: int
) -> Integer[np.ndarray, "height width"]:
    """Merges every region of fewer than ``area`` pixels into what surrounds it."""
    labels = labels.copy()
    for label in np.unique(labels):
        if label == BACKGROUND:
            continue
        regions, count = ndimage.label(labels == label)
        for number in range(1, count + 1):
            region = regions == number
            if region.sum() >= area:
                continue
            ring = ndimage.binary_dilation(region, RING) & ~region
            values, votes = np.unique(labels[ring], return_counts=True)
            if len(values):
                labels[region] = values[votes.argmax()]  # ascending: the smallest of equals
    return labels

"""How much of each category a map holds, compared with another map.

1. ``share_c = pixels of c / (height width)``
2. ``MCD = sum_c |share_c(truth) - share_c(prediction)|``, the mean over images, in [0, 2]: 0 for
   equal histograms wherever the pixels are, 2 for disjoint ones

VOID is a category of its own, or left out (the shares then stay parts of the whole image). Ids that
are no category are left out of the sum, as in the original.

Source: PDM, section 4.1 (mean count difference).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from jointseg_jax.evaluation.confusion import Maps, is_void

Shares = Float[np.ndarray, "*batch categories"]
"""The part of each map that each class takes, and VOID in the last place."""


def shares(labels: Maps, classes: int) -> Shares:
    """Returns the shares of each map of a batch, or of one."""
    flat = labels.astype(np.int64).reshape(-1, labels.shape[-2] * labels.shape[-1])
    # VOID becomes the last category, and ids that are no class -1: bincount takes none below 0
    flat = np.where(is_void(flat, classes), classes, np.where(_is_class(flat, classes), flat, -1))
    # (1) pixels of c / (height width): also of what is no class, so shares need not sum to 1
    pixels = np.stack([np.bincount(row[row >= 0], minlength=classes + 1) for row in flat])
    return (pixels / flat.shape[1]).reshape(*labels.shape[:-2], classes + 1)


def share_difference(
    truth: Shares, prediction: Shares, *, void: bool = True
) -> Float[np.ndarray, "*batch"]:
    """Returns the summed absolute difference of shares, per map."""
    # (2) sum_c |share_c(truth) - share_c(prediction)|
    difference = np.abs(truth - prediction)
    return np.asarray((difference if void else difference[..., :-1]).sum(axis=-1))


def mcd(gt: Maps, pred: Maps, classes: int, *, void: bool = True) -> float:
    """Returns the mean count difference, with VOID as a category or without."""
    return float(share_difference(shares(gt, classes), shares(pred, classes), void=void).mean())


def _is_class(labels: np.ndarray, classes: int) -> np.ndarray:
    return (labels >= 0) & (labels < classes)

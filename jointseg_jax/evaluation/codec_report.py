"""What a codec gives back of the validation split, and the moments of its latents.

Images are compared in grey levels. With e the difference of two uint8 images, over all pixels and
channels of an image:

1. mean absolute error: mean |e|
2. PSNR: 10 log10(255^2 / mean e^2) in dB, per image; at most ``IDENTICAL``, that of equal images

Both are averaged over images.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from jointseg_jax import sharding
from jointseg_jax.codecs.chain import Chain
from jointseg_jax.codecs.codec import Codec
from jointseg_jax.codecs.pixels import quantise
from jointseg_jax.data.classes import Classes
from jointseg_jax.evaluation.alignment import Reconstruction, number
from jointseg_jax.evaluation.confusion import Valid
from jointseg_jax.evaluation.held_out import PER_DEVICE, validation_batches
from jointseg_jax.evaluation.panoptic_quality import PanopticReconstruction
from jointseg_jax.training.workdir import Run
from jointseg_jax.types import Array, Params

IDENTICAL = 100.0
"""PSNR of an image with itself."""

Images = UInt8[np.ndarray, "batch height width channels"]
Decoded = Float[np.ndarray, "batch height width channels"]


class ImageReconstruction:
    """What a codec makes of images, batch by batch."""

    def __init__(self) -> None:
        self.psnr: list[np.ndarray] = []
        self.error: list[np.ndarray] = []

    def add(self, images: Images, decoded: Decoded, valid: Valid | None = None) -> None:
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


Measure = Reconstruction | PanopticReconstruction | ImageReconstruction

RECONSTRUCTIONS: dict[str, Callable[[Classes], Measure]] = {
    "labels": lambda classes: Reconstruction(classes.names),
    "panoptic": PanopticReconstruction,
    "image": lambda classes: ImageReconstruction(),
}
"""What measures a codec, by its kind, given the classes."""


def autoencoder_report(run: Run, num: int, seed: int, steps: Sequence[int]) -> dict[str, Any]:
    """Measures the run's codec; under ``chain`` also labels through its palette, if it has one."""
    codec, palette = run.system.codec, run.system.palette
    report = codec_report(run, codec, run.params, run.system.field, None)
    if palette is None:
        return report
    chain = Chain(first=palette, second=codec)
    return report | {"chain": codec_report(run, chain, run.params, "labels", None)}


def codec_report(
    run: Run, codec: Codec, params: Params, field: str, limit: int | None
) -> dict[str, Any]:
    """Measures a codec on a field of the validation records (the first ``limit``)."""
    mesh = sharding.own_mesh()
    rows = sharding.batch_sharding(mesh)
    round_trip = jax.jit(functools.partial(_round_trip, codec))
    measure = RECONSTRUCTIONS[codec.kind](run.info.classes)
    moments: list[np.ndarray] = []
    params = jax.device_put(params, sharding.replicated(mesh))
    for batch in validation_batches(run, PER_DEVICE * mesh.size, limit, "codec"):
        with jax.set_mesh(mesh):
            values = jax.device_put(batch[field], rows)
            decoded, mean, square = map(np.asarray, round_trip(params, values))
        valid = batch["valid"]
        measure.add(batch[field], decoded, valid)
        moments.append(np.stack([mean, square], axis=-1)[valid])
    # var z = E z^2 - (E z)^2, in float64 over float32 means of rows, which all have one size.
    mean, square = np.concatenate(moments).mean(axis=0, dtype=np.float64)
    deviation = number(np.sqrt(max(square - mean**2, 0.0)))
    records = sum(len(rows) for rows in moments)
    return measure.report() | {"latent_std": deviation, "validation_records": records}


def _round_trip(codec: Codec, params: Params, values: Array) -> tuple[Array, Array, Array]:
    """Decodes what it encodes; with the mean and the mean square of each row's latents."""
    latents = codec.encode(params, values).astype(jnp.float32)  # [batch, rows, columns, channels]
    per_row = tuple(range(1, latents.ndim))
    moments = jnp.mean(latents, per_row), jnp.mean(jnp.square(latents), per_row)  # [batch] each
    return codec.decode(params, latents), *moments

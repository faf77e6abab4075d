"""Reference weights of the label autoencoder, renamed and transposed, exact in both directions.

Source: JoDiffusion, ``LightweightLabelVAE`` state dict.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.rules import by_path, nested
from jointseg_jax.types import Params, UserError

Axes = tuple[int, ...] | None

CONV = (2, 3, 1, 0)  # [out, in, kh, kw] -> [kh, kw, in, out]
TRANSPOSED_CONV = (2, 3, 0, 1)  # [in, out, kh, kw] -> [kh, kw, in, out]


class Rename(NamedTuple):
    """One tensor's two names and layouts."""

    reference: str
    path: str  # ours
    axes: Axes  # transposes the reference's into ours; None: as it is


def table(codec: LabelAE) -> list[Rename]:
    """The rename of every tensor of this codec's network.

    Raises:
      UserError: the codec is not one that the reference network can be.
    """
    same_widths = len(set(codec.up_widths)) <= 1
    if codec.patch != 1 or codec.middle_blocks not in (0, 2) or not same_widths:
        raise UserError(
            f"label autoencoder weights: patch = {codec.patch}, middle_blocks = "
            f"{codec.middle_blocks}, up_widths = {codec.up_widths}; the reference network has "
            "patch 1, 0 or 2 middle blocks and equal up_widths. Change the codec config."
        )
    return [*_encoder(codec), *_decoder(codec)]


def from_reference(codec: LabelAE, tensors: Mapping[str, np.ndarray]) -> Params:
    """Our parameters from a reference state dict; UserError names what does not fit the codec."""
    renames = table(codec)
    _same_names({r.reference for r in renames}, set(tensors), "reference weights")
    flat = {r.path: _turned(tensors[r.reference], r.axes) for r in renames}
    _same_shapes(codec, flat)
    return nested(flat)


def to_reference(codec: LabelAE, params: Params) -> dict[str, np.ndarray]:
    """A reference state dict from our parameters; the inverse of ``from_reference``."""
    renames, flat = table(codec), by_path(params)
    _same_names({r.path for r in renames}, set(flat), "parameters")
    _same_shapes(codec, flat)
    return {r.reference: _turned(np.asarray(flat[r.path]), _inverse(r.axes)) for r in renames}


def _encoder(codec: LabelAE) -> Iterator[Rename]:
    # Reference keys are positions in a sequence, counted over layers *and* activations.
    yield from _layer("encoder.0", "encoder/conv_in", CONV)
    n = 2  # conv, silu
    for i in range(len(codec.widths) - 1):
        yield from _layer(f"encoder.{n}", f"encoder/widen_{i}", CONV)
        yield from _layer(f"encoder.{n + 1}", f"encoder/halve_{i}", CONV)
        n += 3  # conv, conv, silu
    yield from _layer(f"encoder.{n}", "encoder/conv_middle", CONV)
    yield from _residuals(codec, f"encoder.{n + 1}", "encoder")
    yield from _layer(f"encoder.{n + 2}", "encoder/norm_out", None)
    yield from _layer(f"encoder.{n + 4}", "encoder/conv_out", CONV)  # after norm, silu


def _decoder(codec: LabelAE) -> Iterator[Rename]:
    yield from _layer("decoder.0", "decoder/conv_in", CONV)
    yield from _residuals(codec, "decoder.1", "decoder")
    n = 2  # conv, middle (which counts even where it is empty)
    for i in range(len(codec.up_widths)):
        yield from _layer(f"decoder.{n}", f"decoder/double_{i}", TRANSPOSED_CONV)
        yield from _layer(f"decoder.{n + 1}", f"decoder/norm_{i}", None)
        n += 3  # transposed conv, norm, silu
    yield from _layer(f"decoder.{n}", "decoder/norm_out", None)
    yield from _layer(f"decoder.{n + 2}", "decoder/conv_out", CONV)


def _residuals(codec: LabelAE, reference: str, ours: str) -> Iterator[Rename]:
    for i in range(codec.middle_blocks):
        for j in (1, 2):
            there, here = f"{reference}.resnets.{i}", f"{ours}/middle_{i}"
            yield from _layer(f"{there}.norm{j}", f"{here}/norm_{j}", None)
            yield from _layer(f"{there}.conv{j}", f"{here}/conv_{j}", CONV)


def _layer(reference: str, path: str, axes: Axes) -> Iterator[Rename]:
    yield Rename(reference + ".weight", path + ("/kernel" if axes else "/scale"), axes)
    yield Rename(reference + ".bias", path + "/bias", None)


def _turned(tensor: np.ndarray, axes: Axes) -> np.ndarray:
    # One of another rank is left as it is: the check of shapes names it.
    if axes is None or tensor.ndim != len(axes):
        return tensor
    # Contiguous: safetensors writes the bytes as they lie, whatever the strides.
    return np.ascontiguousarray(tensor.transpose(axes))


def _inverse(axes: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if axes is None else tuple(np.argsort(axes).tolist())


def _same_names(want: set[str], got: set[str], what: str) -> None:
    # Both lists in one error: a rename shows as one name missing and one too many.
    missing, extra = sorted(want - got), sorted(got - want)
    if missing or extra:
        raise UserError(
            f"label autoencoder {what}: {len(missing)} missing ({_first(missing)}), "
            f"{len(extra)} not of this network ({_first(extra)}). Check the codec's widths, "
            "up_widths and middle_blocks against the file."
        )


def _same_shapes(codec: LabelAE, flat: Params) -> None:
    shapes = jax.eval_shape(codec.init, jax.random.key(0))
    errors = [
        f"{path} is {flat[path].shape}, the codec needs {leaf.shape}"
        for path, leaf in by_path(shapes).items()
        if tuple(flat[path].shape) != leaf.shape
    ]
    if errors:
        raise UserError(
            f"label autoencoder weights: {len(errors)} shapes differ ({_first(errors)}). Check "
            "classes, bits, background and the widths of the codec config against the file."
        )


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:3]) if names else "none"
    return shown + (", ..." if len(names) > 3 else "")

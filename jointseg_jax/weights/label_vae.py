"""Reference weights of the label autoencoder, renamed and transposed, in both directions.

1. Every reference tensor has exactly one place in our tree and the other way round; what is
   missing, left over or of another shape is an error that names it.
2. Layouts: convolution [out, in, kh, kw] <-> [kh, kw, in, out]; transposed convolution
   [in, out, kh, kw] <-> [kh, kw, in, out]; vectors as they are. Both directions are exact.
3. Reference keys are positions in two sequences, counted over layers *and* activations.

Source: JoDiffusion, ``LightweightLabelVAE`` state dict.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.rules import by_path, nested
from jointseg_jax.types import UserError


class Rename(NamedTuple):
    """One tensor: its reference key, our path, and the axes that turn the first into the second."""

    reference: str
    path: str
    axes: tuple[int, ...] | None


CONV = (2, 3, 1, 0)
TRANSPOSED_CONV = (2, 3, 0, 1)


def table(codec: LabelAE) -> list[Rename]:
    """The rename of every tensor of this codec's network.

    Raises:
      UserError: the codec is not one that the reference network can be.
    """
    _must_be_published(codec)
    return [*_encoder(codec), *_decoder(codec)]


def from_reference(codec: LabelAE, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our parameters from a reference state dict.

    Raises:
      UserError: tensors missing, left over, or of another shape than the codec's.
    """
    renames = table(codec)
    _same_names({r.reference for r in renames}, set(tensors), "reference weights")
    flat = {r.path: _turned(tensors[r.reference], r.axes) for r in renames}
    _same_shapes(codec, flat)
    return nested(flat)


def to_reference(codec: LabelAE, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A reference state dict from our parameters; the inverse of ``from_reference``.

    Raises:
      UserError: parameters missing, left over, or of another shape than the codec's.
    """
    renames = table(codec)
    flat = by_path(params)
    _same_names({r.path for r in renames}, set(flat), "parameters")
    _same_shapes(codec, flat)
    return {
        r.reference: _turned(
            np.asarray(flat[r.path]), r.axes and tuple(np.argsort(r.axes).tolist())
        )
        for r in renames
    }


def _encoder(codec: LabelAE) -> Iterator[Rename]:
    place, ours = "encoder.", "encoder/"
    yield from _layer(place + "0", ours + "conv_in", CONV)
    n = 2  # conv, silu
    for i in range(len(codec.widths) - 1):
        yield from _layer(f"{place}{n}", f"{ours}widen_{i}", CONV)
        yield from _layer(f"{place}{n + 1}", f"{ours}halve_{i}", CONV)
        n += 3  # conv, conv, silu
    yield from _layer(f"{place}{n}", ours + "conv_middle", CONV)
    yield from _residuals(codec, f"{place}{n + 1}", ours)
    yield from _layer(f"{place}{n + 2}", ours + "norm_out", None)
    yield from _layer(f"{place}{n + 4}", ours + "conv_out", CONV)


def _decoder(codec: LabelAE) -> Iterator[Rename]:
    place, ours = "decoder.", "decoder/"
    yield from _layer(place + "0", ours + "conv_in", CONV)
    yield from _residuals(codec, place + "1", ours)
    n = 2  # conv, middle
    for i in range(len(codec.up_widths)):
        yield from _layer(f"{place}{n}", f"{ours}double_{i}", TRANSPOSED_CONV)
        yield from _layer(f"{place}{n + 1}", f"{ours}norm_{i}", None)
        n += 3  # transposed conv, norm, silu
    yield from _layer(f"{place}{n}", ours + "norm_out", None)
    yield from _layer(f"{place}{n + 2}", ours + "conv_out", CONV)


def _residuals(codec: LabelAE, place: str, ours: str) -> Iterator[Rename]:
    for i in range(codec.middle_blocks):
        for j in (1, 2):
            there, here = f"{place}.resnets.{i}", f"{ours}middle_{i}"
            yield from _layer(f"{there}.norm{j}", f"{here}/norm_{j}", None)
            yield from _layer(f"{there}.conv{j}", f"{here}/conv_{j}", CONV)


def _layer(reference: str, path: str, axes: tuple[int, ...] | None) -> Iterator[Rename]:
    yield Rename(reference + ".weight", path + ("/kernel" if axes else "/scale"), axes)
    yield Rename(reference + ".bias", path + "/bias", None)


def _turned(tensor: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    if axes is None:
        return tensor
    if tensor.ndim != len(axes):
        return tensor  # left as it is: the shape check names it
    return np.ascontiguousarray(tensor.transpose(axes))


def _inverse(axes: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if axes is None else tuple(np.argsort(axes).tolist())


def _same_names(want: set[str], got: set[str], what: str) -> None:
    missing, extra = sorted(want - got), sorted(got - want)
    if missing or extra:
        raise UserError(
            f"label autoencoder {what}: {len(missing)} missing ({_first(missing)}), "
            f"{len(extra)} not of this network ({_first(extra)}). Check the codec's widths, "
            "up_widths and middle_blocks against the file."
        )


def _same_shapes(codec: LabelAE, flat: Mapping[str, Any]) -> None:
    shapes = jax.eval_shape(codec.init, jax.random.key(0))
    wrong = [
        f"{path} is {flat[path].shape}, the codec needs {leaf.shape}"
        for path, leaf in by_path(shapes).items()
        if tuple(flat[path].shape) != leaf.shape
    ]
    if wrong:
        raise UserError(
            f"label autoencoder weights: {len(wrong)} shapes differ ({_first(wrong)}). Check "
            "classes, bits, background and the widths of the codec config against the file."
        )


def _must_be_published(codec: LabelAE) -> None:
    same_widths = len(set(codec.up_widths)) <= 1
    if codec.patch != 1 or codec.middle_blocks not in (0, 2) or not same_widths:
        raise UserError(
            f"label autoencoder weights: patch = {codec.patch}, middle_blocks = "
            f"{codec.middle_blocks}, up_widths = {codec.up_widths}; the reference network has "
            "patch 1, 0 or 2 middle blocks and equal up_widths. Change the codec config."
        )


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:3]) if names else "none"
    return shown + (", ..." if len(names) > 3 else "")

"""What the rows of an encoded split hold.

1. An input whose codec has parameters (``label_ae``, ``image_tiny``, ...) is kept as latents, in
   the batch field ``latents/NAME``. One whose codec has none (pixels, bits, palette) is kept as it
   is, and so is one whose codec draws its latents anew each time.
2. Text is kept once for all rows that have the same: token ids by caption, features by record.
3. Of validation all that records have is kept as it is: previews and evaluation read pixels and
   labels, whatever the codecs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jointseg_jax import build
from jointseg_jax.data.cached.index import Field
from jointseg_jax.systems.joint import TEXT_STREAM
from jointseg_jax.systems.system import LATENTS
from jointseg_jax.training.batch_encoder import Encoder
from jointseg_jax.training.encode_options import Encoding
from jointseg_jax.types import UserError

Row = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Fields of rows, and where their values come from.

    Attributes:
      fields: of each row.
      latents: names of the inputs among them that are kept as latents.
      text: the field of the text; None where nothing reads any.
      words: whether text is token ids of captions, not features of records.
      plain: names of the inputs whose codec is applied in each step, and their batch fields.
    """

    fields: tuple[Field, ...]
    latents: tuple[str, ...] = ()
    text: Field | None = None
    words: bool = False
    plain: tuple[tuple[str, str], ...] = ()

    def source_of(self, field: Field) -> str | None:
        """The input that a field holds the latents of, if it holds any."""
        name = field.name.removeprefix(LATENTS)
        return name if name != field.name else None


def contents(
    options: Encoding,
    info: build.DatasetInfo,
    encoder: Encoder | None,
    row: Row,
    length: int | None,
) -> Contents:
    """Decides by the first row of the data.

    Args:
      encoder: of the config's codecs; None for validation.
      length: token ids of a caption, where text is words.

    Raises:
      UserError: a batch field that there is not, or latents that cannot be kept.
    """
    latents = () if encoder is None else _latents(options, encoder, row)
    inputs = {} if encoder is None else encoder.inputs
    wanted = [value.field for name, value in inputs.items() if name not in latents]
    wanted += row if encoder is None else options.keep
    made = [
        Field(name=LATENTS + name, dtype=options.dtype, shape=encoder.shape(name, row))
        for name in latents
    ]
    text = None
    for name in dict.fromkeys(wanted):
        if name == TEXT_STREAM and length is not None:
            continue
        if name not in row:
            raise UserError(
                f"ERROR [encode] the batch field {name!r} is needed, and records have "
                f"{', '.join(row)}. Check config.data and --keep."
            )
        field = Field(
            name=name, dtype=_dtype(options, info, name, row[name]), shape=row[name].shape
        )
        if name == TEXT_STREAM:
            text = field
        else:
            made.append(field)
    if length is not None:
        text = Field(name=TEXT_STREAM, dtype="int32", shape=(length,))
    plain = {k: v.field for k, v in inputs.items() if v.codec is not None and k not in latents}
    return Contents(
        fields=tuple(made),
        latents=latents,
        text=text,
        words=length is not None,
        plain=tuple(plain.items()),
    )


def _latents(options: Encoding, encoder: Encoder, row: Row) -> tuple[str, ...]:
    """The inputs to keep as latents."""
    given = options.latents
    coded = [name for name, value in encoder.inputs.items() if value.codec is not None]
    strangers = sorted(set(given or ()) - set(coded))
    if strangers:
        raise UserError(
            f"ERROR [flags] --latents={','.join(strangers)}: no codec encodes that; one of: "
            f"{', '.join(coded)}."
        )
    wanted = [k for k in coded if encoder.params.get(k)] if given is None else given
    drawn = [k for k in wanted if encoder.draws(k, row)]
    if given is not None and drawn:
        raise UserError(
            f"ERROR [flags] --latents={','.join(drawn)}: this codec draws its latents anew "
            "each time (a sample, or a perturbation), and a cache holds one draw. Switch that "
            "off in the codec's config, or leave it out of --latents."
        )
    return tuple(k for k in wanted if k not in drawn)


def _dtype(options: Encoding, info: build.DatasetInfo, name: str, values: Any) -> str:
    if np.issubdtype(values.dtype, np.floating):
        return options.dtype
    small = name == "labels" and len(info.classes) <= np.iinfo(np.int8).max + 1
    return "int8" if small else values.dtype.name

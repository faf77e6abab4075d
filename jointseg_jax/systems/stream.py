"""One part of a pair: which batch field it is, its codec, its process, and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jointseg_jax.transport.process import Process


@dataclass(frozen=True, kw_only=True)
class Stream:
    """How one batch field becomes latents, and how these move between data and source.

    Attributes:
      field: name of the batch field that the codec encodes (``"image"``, ``"labels"``, ...).
      codec: between the field's values and latents.
      process: between clean latents and their source end, and what the network predicts of it.
      weight: of the stream's mean squared error in the loss; 0 leaves it out.
      guidance: classifier-free guidance scale at sampling, ``uncond + scale (cond - uncond)``;
        1 is off.
    """

    field: str
    codec: Any
    process: Process
    weight: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0 or self.guidance < 0:
            raise ValueError(
                f"stream {self.field!r}: weight={self.weight}, guidance={self.guidance}: must both "
                "be at least 0; change them in the stream's config."
            )

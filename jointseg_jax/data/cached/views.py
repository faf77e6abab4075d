"""The rows that a cache keeps of one record, in place of what training would draw.

1. A crop per row: the centre's, as in evaluation, or ``crops`` drawn from (seed, record, crop).
2. Each also mirrored, where training draws a flip (probability neither 0 nor 1).
3. Row ``2 * crop + mirrored`` of a record, or ``crop`` without flips.

Of validation records there is one view: what evaluation reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from jointseg_jax.data.records import Record
from jointseg_jax.data.transforms import Flip, Resize, Transform
from jointseg_jax.types import UserError


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of any record.

    Args:
      crops: how many random crops; 0 is the centre's.
      train: whether the records are for training.
    """

    transforms: tuple[Transform, ...]
    crops: int
    seed: int
    train: bool = True

    def __post_init__(self) -> None:
        if self.crops and not self.train:
            raise UserError(
                f"ERROR [encode] crops={self.crops}: validation reads the centre's; leave --crops "
                "out."
            )

    @property
    def flip(self) -> float | None:
        """The probability with which training takes the mirrored row; None: there is none."""
        drawn = [t.probability for t in self.transforms if isinstance(t, Flip)]
        if len(drawn) > 1:
            raise UserError(
                "ERROR [encode] config.data.transforms: more than one flip; leave one in."
            )
        return drawn[0] if self.train and drawn and 0 < drawn[0] < 1 else None

    @property
    def random_crops(self) -> bool:
        """Whether training draws crops."""
        return any(isinstance(t, Resize) and t.mode == "crop" and t.random for t in self.transforms)

    @property
    def count(self) -> int:
        """Rows of a record."""
        return max(self.crops, 1) * (1 if self.flip is None else 2)

    def of(self, record: Record, index: int) -> Iterator[Record]:
        """The views in the order of the rows."""
        for crop in range(max(self.crops, 1)):
            for mirrored in (None,) if self.flip is None else (0.0, 1.0):
                yield self._view(record, np.random.default_rng((self.seed, index, crop)), mirrored)

    def _view(self, record: Record, rng: np.random.Generator, mirrored: float | None) -> Record:
        for transform in self.transforms:
            if isinstance(transform, Flip):
                own = transform if mirrored is None else replace(transform, probability=mirrored)
                record = own(record, rng, self.train)
            else:
                record = transform(record, rng, self.crops > 0)
        return record

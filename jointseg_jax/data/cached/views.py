"""The rows that a cache keeps of one record, instead of what training would draw, and their reader.

1. A crop per row: the centre's, as in evaluation, or ``crops`` drawn from (seed, record, crop).
2. Each also mirrored, where training draws a flip (probability neither 0 nor 1).
3. Row ``2 * crop + mirrored`` of a record, or ``crop`` without flips.

Of validation records there is one view: what evaluation reads.
"""

import contextlib
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import grain
import numpy as np

from jointseg_jax.config import ReadConfig
from jointseg_jax.data.cached.store import Note
from jointseg_jax.data.pipeline import Rows, private
from jointseg_jax.data.records import Record
from jointseg_jax.data.transforms import Flip, Resize, Transform
from jointseg_jax.data.workers import read_ahead
from jointseg_jax.types import UserError


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of any record."""

    transforms: tuple[Transform, ...]
    crops: int  # number of random crops; 0 is the centre's
    seed: int
    train: bool = True  # whether the records are for training

    def __post_init__(self) -> None:
        if self.crops and not self.train:
            raise UserError(
                f"ERROR [encode] crops={self.crops}: validation reads the centre's; leave --crops "
                "out."
            )

    @property
    def flip(self) -> float | None:
        """The probability with which training takes the mirrored row; None without such rows."""
        drawn = [t.probability for t in self.transforms if isinstance(t, Flip)]
        if len(drawn) > 1:
            raise UserError(
                "ERROR [encode] config.data.transforms: more than one flip; leave one in."
            )
        return drawn[0] if self.train and drawn and 0 < drawn[0] < 1 else None

    @property
    def random_crops(self) -> bool:
        """True if training draws crops."""
        return any(isinstance(t, Resize) and t.mode == "crop" and t.random for t in self.transforms)

    @property
    def count(self) -> int:
        """Rows of a record."""
        return max(self.crops, 1) * (1 if self.flip is None else 2)

    def of(self, record: Record, index: int) -> Iterator[Record]:
        """Yields the views of record number ``index`` in the order of its rows."""
        for crop in range(max(self.crops, 1)):
            for mirrored in (None,) if self.flip is None else (0.0, 1.0):
                # The same generator for both: a mirrored row shows the crop of its twin.
                yield self._view(record, np.random.default_rng((self.seed, index, crop)), mirrored)

    def _view(self, record: Record, rng: np.random.Generator, mirrored: float | None) -> Record:
        for transform in self.transforms:
            if isinstance(transform, Flip):
                own = transform if mirrored is None else replace(transform, probability=mirrored)
                record = own(record, rng, self.train)
            else:
                record = transform(record, rng, self.crops > 0)
        return record


@dataclass(frozen=True, kw_only=True)
class ViewedRecord:
    """One record as it was read."""

    fields: dict[str, np.ndarray]  # batch fields, a row per view
    note: Note


@dataclass(frozen=True, kw_only=True)
class ViewReader:
    """Reads records and makes their views; picklable, so that processes can own a copy."""

    rows: Rows
    views: Views

    def __call__(self, index: int) -> ViewedRecord:
        record, used, reports = self.rows.read(int(index))
        views = [self.rows.fields(view) for view in self.views.of(record, used)]
        note = Note(id=record["id"], captions=list(record["captions"]))
        if reports:
            note["instead_of"] = [report["error"] for report in reports]
        fields = {name: np.stack([row[name] for row in views]) for name in views[0]}
        return ViewedRecord(fields=fields, note=note)

    def all(
        self, records: Sequence[int], reading: ReadConfig
    ) -> Generator[ViewedRecord, None, None]:
        """Yields the views of ``records`` in that order, read ahead by ``reading``."""
        if not len(records):
            return
        packed = grain.MapDataset.source(list(records)).map(self._packed)
        # Closed with this generator, for its workers would outlive it.
        with contextlib.closing(iter(read_ahead(packed, reading))) as ahead:
            for fields, note in ahead:
                own = {name: private(array) for name, array in fields.items()}
                yield ViewedRecord(fields=own, note=json.loads(note))

    def _packed(self, index: int) -> tuple[dict[str, np.ndarray], str]:
        # Grain hands arrays and strings from process to process, not dataclasses.
        viewed = self(index)
        return viewed.fields, json.dumps(viewed.note)

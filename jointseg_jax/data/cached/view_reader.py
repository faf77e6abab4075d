"""All views of some records, read in threads or processes, in the order that was asked for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from jointseg_jax.data.cached.views import Views
from jointseg_jax.data.pipeline import Rows, private
from jointseg_jax.data.workers import Reading


@dataclass(frozen=True, kw_only=True)
class Viewed:
    """One record as it was read.

    Attributes:
      fields: batch fields, a row per view.
      note: id, captions, and ``instead_of``: the complaints of records that it replaces.
    """

    fields: dict[str, np.ndarray]
    note: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Viewer:
    """Reads records and makes their views; picklable, so that processes can own a copy."""

    rows: Rows
    views: Views

    def __call__(self, index: int) -> Viewed:
        record, used, reports = self.rows.read(int(index))
        made = [self.rows.fields(view) for view in self.views.of(record, used)]
        note = {"id": record["id"], "captions": list(record["captions"])}
        if reports:
            note["instead_of"] = [report["error"] for report in reports]
        return Viewed(fields={k: np.stack([row[k] for row in made]) for k in made[0]}, note=note)

    def all(self, records: Sequence[int], reading: Reading) -> Iterator[Viewed]:
        """Those of some records."""
        if not len(records):
            return
        found = grain.MapDataset.source(list(records)).map(self._packed)
        with contextlib.closing(iter(reading.attach(found))) as made:
            for fields, note in made:
                own = {name: private(array) for name, array in fields.items()}
                yield Viewed(fields=own, note=json.loads(note))

    def _packed(self, index: int) -> tuple[dict[str, np.ndarray], str]:
        """As Grain hands it from process to process: arrays and one string."""
        viewed = self(index)
        return viewed.fields, json.dumps(viewed.note)

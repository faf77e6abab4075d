"""Batches for training and evaluation: a function of (seed, step, row) and of nothing else.

1. Position ``p = step * batch + row`` of an endless stream names one row of one global batch.
2. ``record(p)`` is entry ``p mod n`` of the permutation of epoch ``p div n``: fresh every epoch.
3. Host ``h`` of ``H`` makes the contiguous rows ``[h * batch / H, (h + 1) * batch / H)``, so the
   global batch has the same rows in the same order on any number of hosts.
4. Augmentation and the choice of caption draw from a generator seeded by (seed, step, row).

So the position is the whole state: resuming is ``start_step=k``, whatever the number of hosts,
workers or threads. A batch has image (uint8), labels (int16), index (int64); with a tokenizer, text
(int32); with ``instances``, panoptic (int16: label and instance number, ``segments.py``). The
``features`` of a record become fields of their own names, untouched by transforms.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import grain
import numpy as np

from jointseg_jax.config import ReadConfig
from jointseg_jax.data.cached.loader import (
    Batch,
    CachedBatches,
    CachedSource,
    HostBatches,
    Tokenizer,
)
from jointseg_jax.data.records import BadReport, BadSample, Record, Source, check_record
from jointseg_jax.data.segments import panoptic
from jointseg_jax.data.transforms import Transform
from jointseg_jax.data.void_check import first_look
from jointseg_jax.data.workers import read_ahead
from jointseg_jax.types import UserError

log = logging.getLogger("jointseg_jax")

Row = dict[str, Any]
"""Fields of a row or batch, with what was wrong on the way to it in ``bad``."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Makes the row at a position: read, check, choose a caption, transform, tokenize."""

    source: Source
    transforms: tuple[Transform, ...]
    tokenizer: Tokenizer | None
    seed: int
    batch: int  # rows of the global batch
    train: bool
    bad: str  # ``replace`` by the next good record, or ``stop``
    mark: bool = False  # adds ``valid``, true where the record read is that of its own position
    instances: int = 0  # the highest instance number of the field ``panoptic``; 0: no such field

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"data: seed={self.seed} given; must be 0 or more.")

    def __call__(self, position: int, index: int) -> Row:
        step, row = divmod(position, self.batch)
        # Of its own for every row: what a row draws does not depend on hosts, workers or threads.
        rng = np.random.default_rng((self.seed, step, row))
        record, used, reports = self.read(int(index))
        caption = choose_caption(record["captions"], rng, self.train)
        for transform in self.transforms:
            record = transform(record, rng, self.train)
        out: Row = {**self.fields(record), "index": np.int64(used), "bad": reports}
        if self.tokenizer is not None:
            out["text"] = np.asarray(self.tokenizer(caption), np.int32)
        if self.mark:
            out["valid"] = np.bool_(position == index == used)
        return out

    def fields(self, record: Record) -> Batch:
        """Returns the batch fields of a transformed record."""
        out = {
            **record.get("features", {}),
            "image": np.asarray(record["image"], np.uint8),
            "labels": np.asarray(record["labels"], np.int16),
        }
        if self.instances:
            out["panoptic"] = panoptic(record, self.source.classes, self.instances)
        return out

    def read(self, index: int) -> tuple[Record, int, list[BadReport]]:
        """Returns a good record, its index, and what was wrong with those before it."""
        # A bad sample cannot be dropped, for that would shift all later positions: the next good
        # record of the source is read instead.
        reports: list[BadReport] = []
        for distance in range(len(self.source)):
            used = (index + distance) % len(self.source)
            try:
                record = self.source[used]
                check_record(record, self.source.classes)
                return record, used, [{**report, "replaced_by": used} for report in reports]
            except BadSample as error:
                if self.bad == "stop":
                    raise
                reports.append({"index": used, "error": str(error)})
        raise UserError(
            f"ERROR [data] {self.source.name}: none of its {len(self.source)} samples can be used; "
            f"the first: {reports[0]['error']}"
        )


def choose_caption(captions: Sequence[str], rng: np.random.Generator, train: bool) -> str:
    """Returns one caption: drawn in training, the first otherwise, empty when there is none."""
    if not captions:
        return ""
    return captions[int(rng.integers(len(captions)))] if train else captions[0]


class HostBlock(grain.MapDataset):
    """The rows of one host: a contiguous block of every global batch, from step ``start`` on."""

    _MUTATES_ELEMENT_SPEC = False  # Grain: elements are those of the parent

    def __init__(self, parent: grain.MapDataset, *, batch: int, host: int, hosts: int, start: int):
        super().__init__(parent)
        self._batch, self._host, self._start = batch, host, start
        self.local = batch // hosts

    def __len__(self) -> int:
        return max(len(self._parent) // self._batch - self._start, 0) * self.local

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        # own row of own step -> position (start + step) * batch + host * local + row of the stream
        step, row = divmod(index, self.local)
        return self._parent[(self._start + step) * self._batch + self._host * self.local + row]

    def __str__(self) -> str:
        return "HostBlock"


def stack(rows: Sequence[Row]) -> Row:
    """Stacks rows into a batch; reports travel as one JSON string beside the arrays."""
    sizes = sorted({row["image"].shape[:2] for row in rows})
    if len(sizes) > 1:
        raise UserError(
            f"ERROR [data] batch: images of sizes {sizes[:4]} cannot share a batch; all rows must "
            "have one size. Add a resize to config.data.transforms."
        )
    out: Row = {k: np.stack([row[k] for row in rows]) for k in rows[0] if k != "bad"}
    out["bad"] = json.dumps([row["bad"] for row in rows if row["bad"]])
    return out


class Batches(HostBatches):
    """Batches read by Grain; ``drain`` reports the bad samples met."""

    def __init__(
        self,
        rows: grain.MapDataset,
        reading: ReadConfig,
        *,
        batch: int,
        host: int,
        hosts: int,
        step: int = 0,
    ):
        block = HostBlock(rows, batch=batch, host=host, hosts=hosts, start=step)
        super().__init__(step, iter(read_ahead(block.batch(block.local, batch_fn=stack), reading)))
        self._limit = reading.bad_limit
        self._seen: set[int] = set()
        self._reports: list[BadReport] = []

    def received(self, batch: Row) -> Batch:
        """Takes the reports out of a batch, and its arrays out of the memory of workers."""
        # Reports ride beside the arrays as JSON: Grain's workers hand over arrays and strings only.
        arrays = dict(batch)
        self._count(json.loads(arrays.pop("bad")))
        return {name: private(array) for name, array in arrays.items()}

    def _count(self, rows: list[list[BadReport]]) -> None:
        self.replaced += len(rows)
        for report in (report for row in rows for report in row):
            if report["index"] not in self._seen:
                self._seen.add(report["index"])
                self._reports.append(cast(BadReport, {"step": self.step, **report}))
        # Different ones: a bad sample comes again in every epoch.
        if len(self._seen) > self._limit:
            raise UserError(
                f"ERROR [data] {len(self._seen)} different bad samples, more than the limit of "
                f"{self._limit}. Run launch/prepare.py to list them all, then fix them or raise "
                f"config.data.bad_limit. The last: {rows[-1][-1]['error']}"
            )

    def drain(self) -> list[BadReport]:
        """Returns the bad samples first met since the last call."""
        reports, self._reports = self._reports, []
        return reports


def batches(
    source: Source,
    reading: ReadConfig,
    *,
    batch: int,
    seed: int,
    transforms: Sequence[Transform],
    tokenizer: Tokenizer | None = None,
    start_step: int = 0,
    host: int = 0,
    hosts: int = 1,
    train: bool = True,
    instances: int = 0,
) -> Batches | CachedBatches:
    """Returns the endless, shuffled batches of one host from ``start_step`` on.

    An encoded source (``cached/reader.py``) was transformed when it was encoded: it needs neither
    transforms nor workers, and its batches are those of ``cached/loader.py``.

    Args:
      batch: rows of the global batch, over all hosts.
      tokenizer: from a caption to its token ids, such as ``Words.encode``; without one there is
        no ``text``.
      train: ``False`` keeps the order of training but switches augmentation off.
      instances: the highest instance number of the field ``panoptic``; 0: no such field.
    """
    check_source(source)
    check_hosts(batch, host, hosts)
    if start_step < 0:
        raise ValueError(f"data: start_step={start_step} given; must be 0 or more.")
    place = {"batch": batch, "host": host, "hosts": hosts, "step": start_step}
    if isinstance(source, CachedSource):
        source.check_tokenizer(tokenizer)
        return CachedBatches(source, seed=seed, train=train, threads=reading.threads, **place)
    if host == 0 and train and start_step == 0 and (lost := first_look(source)):
        log.warning("%s: %s", source.name, lost)
    options = {"tokenizer": tokenizer, "bad": reading.bad, "instances": instances}
    rows = make_rows(source, transforms, seed=seed, batch=batch, train=train, **options)
    # Grain shuffles epoch e with seed + e; hashing first keeps neighbouring seeds apart.
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(len(source)).shuffle(mixed).repeat()
    return Batches(order.map_with_index(rows), reading, **place)


def evaluation_batches(
    source: Source,
    reading: ReadConfig,
    *,
    batch: int,
    transforms: Sequence[Transform],
    tokenizer: Tokenizer | None = None,
    limit: int | None = None,
    host: int = 0,
    hosts: int = 1,
    instances: int = 0,
) -> Batches:
    """Returns the records of ``source`` once, in order, each batch with a ``valid`` mask.

    Rows beyond the end, and those instead of bad samples, are real records with ``valid=False``.
    Records of an encoded source were transformed when they were encoded.

    Args:
      limit: at most this many records, from the first on.
    """
    check_source(source)
    check_hosts(batch, host, hosts)
    if limit is not None and limit < 1:
        raise UserError(f"ERROR [data] limit={limit} given; evaluate at least 1 record.")
    if isinstance(source, CachedSource):  # its views were made when it was encoded
        transforms, instances = (), 0
    options = {"tokenizer": tokenizer, "bad": reading.bad, "instances": instances}
    rows = make_rows(source, transforms, seed=0, batch=batch, train=False, mark=True, **options)
    count = len(source) if limit is None else min(limit, len(source))
    # Whole batches: the last record is repeated, and ``valid`` is false there.
    padded = -(-count // batch) * batch
    order = grain.MapDataset.range(padded).map(lambda position: min(position, count - 1))
    return Batches(order.map_with_index(rows), reading, batch=batch, host=host, hosts=hosts)


def make_rows(source: Source, transforms: Sequence[Transform], **fields: Any) -> Rows:
    """Returns the maker of rows; its transforms know the classes of the source."""
    own = tuple(transform.for_classes(source.classes) for transform in transforms)
    return Rows(source=source, transforms=own, **fields)


def private(array: np.ndarray) -> np.ndarray:
    """Copies an array out of memory shared with a worker, which Grain frees on its own terms."""
    # Arrays kept until the interpreter ends would otherwise be reported as leaks.
    return np.array(array) if type(array) is not np.ndarray else array


def check_source(source: Source) -> None:
    """Refuses a source that is empty, or longer than Grain's shuffle can permute."""
    if not 0 < len(source) < 2**32:
        raise UserError(
            f"ERROR [data] {source.name}: has {len(source)} samples; between 1 and 2**32 - 1 are "
            "needed. Check config.data.*.root and config.data.*.split."
        )


def check_hosts(batch: int, host: int, hosts: int) -> None:
    """Refuses a batch that the hosts cannot share evenly."""
    if batch < 1 or hosts < 1 or not 0 <= host < hosts or batch % hosts:
        raise UserError(
            f"ERROR [data] batch={batch} over hosts={hosts} (this is host {host}): every host must "
            f"make the same number of rows. Set config.batch to a multiple of {max(hosts, 1)}."
        )

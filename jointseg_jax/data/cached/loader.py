"""Batches of an encoded source, gathered whole: the contract of ``pipeline.py``, without Grain.

1. Position ``p = step * batch + row`` is entry ``p mod n`` of the permutation of epoch ``p div n``,
   drawn from (seed, epoch).
2. The random numbers of a batch (crop, mirror, caption) are drawn from (seed, step) for all its
   rows, of which a host takes its own: rows are the same on any number of hosts.
3. So the position is the whole state; batches are made ahead by threads, in order.

A generator per row, as the pipeline has it, takes longer than reading the row: the order of records
and the draws are therefore others than those of the source that was encoded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from typing import Protocol, runtime_checkable

import grain
import numpy as np

from jointseg_jax.data.records import BadReport, BadSample
from jointseg_jax.data.workers import in_order

Batch = dict[str, np.ndarray]
Tokenizer = Callable[[str], np.ndarray]

DRAWS = 3
"""Random numbers per row: crop, mirror, caption."""


@runtime_checkable
class CachedSource(Protocol):
    """A source that reads the rows of a batch at once."""

    def __len__(self) -> int:
        """Counts the records."""
        ...

    def check_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        """Refuses a tokenizer other than the one its text was made with."""
        ...

    def gather(self, records: np.ndarray, random: np.ndarray | None = None) -> Batch:
        """Returns the batch fields of ``records``; ``random`` [DRAWS, records] chooses variants."""
        ...

    def damage(self) -> list[BadSample]:
        """Reads every file; returns what is wrong with them."""
        ...


class HostBatches:
    """An iterator over host batches whose state is ``step``; close it, or use ``with``."""

    def __init__(self, step: int, ahead: Generator[Batch, None, None] | grain.DatasetIterator):
        self.step = step  # the global step of the next batch
        self.replaced = 0  # rows so far that hold another record instead of a bad sample
        self._ahead: Generator[Batch, None, None] | grain.DatasetIterator | None = ahead

    def __iter__(self) -> HostBatches:
        return self

    def __next__(self) -> Batch:
        if self._ahead is None:
            raise ValueError("these batches are closed; make new ones with start_step=step.")
        batch = self.received(next(self._ahead))
        self.step += 1
        return batch

    def received(self, batch: Batch) -> Batch:
        """Returns a batch as it is handed out."""
        return batch

    def drain(self) -> list[BadReport]:
        """Returns the bad samples first met since the last call."""
        return []

    def close(self) -> None:
        """Ends threads and workers and frees their memory."""
        # Dropped as well: Grain complains about iterators that live on when the interpreter ends.
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()

    def __enter__(self) -> HostBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CachedBatches(HostBatches):
    """Batches gathered from a cache: nothing is bad there, for a damaged row ends the run."""

    def __init__(
        self,
        source: CachedSource,
        *,
        batch: int,
        seed: int,
        step: int,
        host: int,
        hosts: int,
        train: bool,
        threads: int,
    ):
        self._source, self._batch, self._seed, self._train = source, batch, seed, train
        local = batch // hosts
        self._own = np.arange(host * local, (host + 1) * local)
        # The order of the last epoch asked for: a batch may lie in two, and n may be millions.
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        super().__init__(step, in_order(self._make, map(self.plan, itertools.count(step)), threads))

    def plan(self, step: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the records [rows] and random numbers [DRAWS, rows] of this host in a step."""
        rng = np.random.default_rng((self._seed, step))
        # Drawn for all hosts' rows, then cut: the same numbers on any number of hosts.
        random = rng.random((DRAWS, self._batch))[:, self._own] if self._train else None
        # p = step * batch + row lies in epoch p div n, at p mod n of its permutation
        epochs, positions = np.divmod(step * self._batch + self._own, len(self._source))
        records = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            rows = epochs == epoch
            records[rows] = self._order(epoch)[positions[rows]]
        return records, random

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            # the 1 keeps it apart from the draws of a step: a 0 would be as good as nothing
            rng = np.random.default_rng((self._seed, epoch, 1))
            self._epoch = epoch, rng.permutation(len(self._source))
        return self._epoch[1]

    def _make(self, plan: tuple[np.ndarray, np.ndarray | None]) -> Batch:
        records, random = plan
        return {**self._source.gather(records, random), "index": records}

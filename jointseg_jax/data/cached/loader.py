"""Batches of a source that gathers whole batches: the same contract as ``pipeline.py``, no Grain.

1. Position ``p = step * batch + row`` is entry ``p mod n`` of the permutation of epoch ``p div n``,
   drawn from (seed, epoch).
2. The chances of a batch (crop, mirror, caption) are drawn from (seed, step) for all its rows, of
   which a host takes its own: rows are the same on any number of hosts.
3. So the position is the whole state; batches are made ahead by threads, in order.

A generator per row, as the pipeline has it, takes longer than reading the row: the order of records
and the draws are therefore others than those of the source that was encoded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jointseg_jax.data.records import BadSample
from jointseg_jax.data.workers import in_order

DRAWS = 3
"""Chances per row."""


@runtime_checkable
class CachedSource(Protocol):
    """A source that reads the rows of a batch at once."""

    def __len__(self) -> int:
        """Counts the records."""
        ...

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuses a tokenizer other than the one its text was made with."""
        ...

    def gather(
        self, records: np.ndarray, random: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The batch fields of some records; ``random`` ``[DRAWS, records]`` chooses variants."""
        ...

    def damage(self) -> list[BadSample]:
        """What is wrong with its files, each of which is read."""
        ...


class CachedBatches:
    """An iterator over host batches whose state is ``step``; close it, or use ``with``.

    Attributes:
      step: the global step of the next batch.
      replaced: always 0: what is bad was replaced when the records were encoded.
    """

    replaced = 0

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
        self.step = step
        self._source, self._batch, self._seed, self._train = source, batch, seed, train
        local = batch // hosts
        self._own = np.arange(host * local, (host + 1) * local)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        plans = map(self.plan, itertools.count(step))
        self._made: Iterator[dict[str, np.ndarray]] | None = in_order(self._make, plans, threads)

    def plan(self, step: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The records and the chances of this host's rows of a step."""
        rng = np.random.default_rng((self._seed, step))
        random = rng.random((DRAWS, self._batch))[:, self._own] if self._train else None
        epochs, places = np.divmod(step * self._batch + self._own, len(self._source))
        records = np.empty_like(places)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            records[chosen] = self._order(epoch)[places[chosen]]
        return records, random

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            # the 1 keeps it apart from the draws of a step: a 0 would be as good as nothing
            rng = np.random.default_rng((self._seed, epoch, 1))
            self._epoch = epoch, rng.permutation(len(self._source))
        return self._epoch[1]

    def _make(self, plan: tuple[np.ndarray, np.ndarray | None]) -> dict[str, np.ndarray]:
        records, random = plan
        return {**self._source.gather(records, random), "index": records}

    def __iter__(self) -> CachedBatches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._made is None:
            raise ValueError("these batches are closed; make new ones with start_step=step.")
        batch = next(self._made)
        self.step += 1
        return batch

    def drain(self) -> list[dict[str, Any]]:
        """Nothing: a damaged row ends the run."""
        return []

    def close(self) -> None:
        """Ends the threads."""
        made, self._made = self._made, None
        if made is not None:
            made.close()

    def __enter__(self) -> CachedBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

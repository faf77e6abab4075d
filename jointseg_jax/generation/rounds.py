"""One folder of pairs, written by all processes of a run as if by one.

1. Every process makes a batch and writes the files of its pairs: that is one round.
2. The first process then lists the pairs of the round in the manifest, in index order, from the
   lines that the others send it. The others do not wait for it.
3. A run that goes on relies on the manifest alone: pairs whose round was never listed are made
   again, with the same bytes, and so are those whose files are no longer whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jointseg_jax import distributed
from jointseg_jax.data.classes import Classes
from jointseg_jax.generation.pair_writer import PairWriter, rejected


class RoundWriter:
    """The writer of this process; arguments as of ``PairWriter``."""

    def __init__(self, folder: Path, classes: Classes, settings: Mapping[str, object]):
        opened: list[PairWriter] = []

        def open_folder() -> str:
            opened.append(PairWriter(folder, classes, settings))
            start, kept = opened[0].done, opened[0].kept
            end = max(kept, default=start - 1) + 1
            return json.dumps([start, end, [i for i in range(start, end) if i not in kept]])

        # One process verifies the files of all, and says so: hashing a large folder takes minutes.
        self.start: int  # the first pair that is to be made
        self._end: int  # from here on there are no pairs
        self.start, self._end, gaps = json.loads(distributed.from_first(open_folder))
        self._gaps = np.array(gaps, np.int64)  # pairs before the end that are not whole
        self.there = self._end - len(gaps)  # number of pairs that were there already
        self.pairs = opened[0] if opened else PairWriter(folder, classes, settings, lines=False)
        """The writer, whose ``lines`` are complete on the first process."""
        self._together = distributed.several()
        self._lines: list[dict[str, Any]] = []  # of this round

    def needed(self, indices: np.ndarray) -> np.ndarray:
        """Marks the pairs that are not there."""
        return np.isin(indices, self._gaps) | (indices >= self._end)

    def write(self, *pair: Any, **options: Any) -> int:
        """Writes a pair's files as ``PairWriter.files`` does; returns how many pairs that lists."""
        return self._list(self.pairs.files(*pair, **options))

    def reject(self, *pair: Any, **options: Any) -> int:
        """Lists a pair as ``rejected`` describes it; returns how many pairs that lists."""
        return self._list(rejected(*pair, **options))

    def end_round(self) -> int:
        """Lists the pairs of all processes after a batch, even an empty one; returns how many.

        That is 0 on all processes but the first, and on a lone one.
        """
        if not self._together:
            return 0
        texts = distributed.gather(json.dumps(self._lines))
        self._lines = []
        # Processes hold ascending batches of a round, so their order is that of the indices.
        return self._append(line for text in texts for line in json.loads(text))

    def _list(self, line: dict[str, Any]) -> int:
        if self._together:
            self._lines.append(line)
            return 0
        return self._append([line])

    def _append(self, lines: Iterable[Mapping[str, object]]) -> int:
        before = self.pairs.done
        for line in lines:
            self.pairs.append(line)
        # More than were given where pairs that are kept come after them.
        return self.pairs.done - before

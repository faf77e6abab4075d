"""One folder of pairs, written by all processes of a run as if by one.

1. Every process makes a batch and writes the files of its pairs: that is one round.
2. The first process then lists the pairs of the round in the manifest, in index order, from the
   lines that the others send it. Nobody waits for it.
3. A run that goes on asks the manifest alone what is there: pairs whose round was never listed are
   made again, with the same bytes, and so are those whose files are no longer whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jointseg_jax import distributed
from jointseg_jax.data.classes import Classes
from jointseg_jax.generation.pair_writer import PairWriter


class RoundWriter:
    """The writer of this process; in a lone one, a plain ``PairWriter``.

    Args:
      settings: see ``PairWriter``.

    Attributes:
      start: the first pair that is to be made.
      there: how many pairs were there already.
      pairs: the writer, whose ``lines`` are complete on the first process.
    """

    def __init__(self, folder: Path, classes: Classes, settings: Mapping[str, Any]):
        found = []

        def first() -> str:
            found.append(PairWriter(folder, classes, settings))
            start, kept = found[0].done, found[0].kept
            end = max(kept, default=start - 1) + 1
            return json.dumps([start, end, [i for i in range(start, end) if i not in kept]])

        self.start, self._end, gaps = json.loads(distributed.from_first(first))
        self.there = self._end - len(gaps)
        self._gaps = np.array(gaps, np.int64)
        self.pairs = found[0] if found else PairWriter(folder, classes, settings, lines=False)
        self._together = distributed.several()
        self._lines: list[dict[str, Any]] = []

    def needed(self, indices: np.ndarray) -> np.ndarray:
        """Which of some pairs are not there."""
        return np.isin(indices, self._gaps) | (indices >= self._end)

    def write(self, *pair: Any, **options: Any) -> int:
        """Writes a pair as ``PairWriter.write`` does; how many are listed by that."""
        return self._list(self.pairs.files(*pair, **options))

    def reject(self, *pair: Any, **options: Any) -> int:
        """Lists a pair as ``PairWriter.rejected`` does; how many are listed by that."""
        return self._list(self.pairs.rejected(*pair, **options))

    def _list(self, line: dict[str, Any]) -> int:
        if self._together:
            self._lines.append(line)
            return 0
        before = self.pairs.done
        self.pairs.append(line)
        return self.pairs.done - before

    def end_round(self) -> int:
        """After a batch, if it was empty too: lists the pairs of all; how many on the first."""
        if not self._together:
            return 0
        texts = distributed.gather(json.dumps(self._lines))
        self._lines = []
        before = self.pairs.done
        for text in texts:
            for line in json.loads(text):
                self.pairs.append(line)
        return self.pairs.done - before

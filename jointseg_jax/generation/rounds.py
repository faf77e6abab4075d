"""One folder of pairs, written by all processes of a run as if by one.

1. Every process makes a batch and writes the files of its pairs: that is one round.
2. The first process then lists the pairs of the round in the manifest, in index order, from the
   lines that the others send it. Nobody waits for it.
3. A run that goes on asks the manifest alone what is there: pairs whose round was never listed are
   made again, with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jointseg_jax import peers
from jointseg_jax.data.classes import Classes
from jointseg_jax.generation.writer import PairWriter


class RoundWriter:
    """The writer of this process; in a lone one, a plain ``PairWriter``.

    Args:
      settings: see ``PairWriter``.

    Attributes:
      start: how many pairs were there already.
      pairs: the writer, whose ``lines`` are complete on the first process.
    """

    def __init__(self, folder: Path, classes: Classes, settings: Mapping[str, Any]):
        found = []

        def first() -> str:
            found.append(PairWriter(folder, classes, settings))
            return str(found[0].done)

        self.start = int(peers.from_first(first))
        self.pairs = found[0] if found else PairWriter(folder, classes, settings, lines=False)
        self._together = peers.several()
        self._lines: list[dict[str, Any]] = []

    def write(self, *pair: Any, **options: Any) -> int:
        """Writes a pair as ``PairWriter.write`` does; how many are listed by that."""
        if not self._together:
            self.pairs.write(*pair, **options)
            return 1
        self._lines.append(self.pairs.files(*pair, **options))
        return 0

    def end_round(self) -> int:
        """After a batch, if it was empty too: lists the pairs of all; how many on the first."""
        if not self._together:
            return 0
        texts = peers.gather(json.dumps(self._lines))
        self._lines = []
        lines = [line for text in texts for line in json.loads(text)]
        for line in lines:
            self.pairs.append(line)
        return len(lines)

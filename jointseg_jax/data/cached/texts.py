"""Texts of a cache, each once however many rows have it: token ids, or features.

ROOT/SPLIT.text.bin       the different texts (``shards.py``, one field), as they first occur
ROOT/SPLIT.texts.npy      int32 [texts]: which of them each text is
ROOT/SPLIT.captions.npy   int64 [records + 1]: record i owns texts c[i] .. c[i + 1] - 1

1. Token ids: a record has a text per caption; a caption is its own name.
2. Features: a record has one, whatever its captions; its name is the SHA-256 of its bytes.

``text_writer.py`` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jointseg_jax.data import files
from jointseg_jax.data.cached.index import AGAIN
from jointseg_jax.data.cached.shards import Field, opened, row_sums
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import UserError

PIECE = 256
"""Rows moved at a time."""


class Texts:
    """The texts of the records of a cache."""

    def __init__(self, root: Path, entries: Mapping[str, Mapping[str, Any]], field: Field):
        """Opens the files that the entries of an index name."""
        self.field = field
        self._path = root / entries["text"]["file"]
        (self._words,), self._sums = opened(self._path, (field,))
        self._starts = _loaded(root, entries["captions"])
        self._which = _loaded(root, entries["texts"])
        if entries["text"]["rows"] != len(self._words) or self._starts[-1] != len(self._which):
            raise ValueError(f"{self._path.name}: another number of rows")

    def __len__(self) -> int:
        return len(self._words)

    def of(self, records: np.ndarray, chance: np.ndarray | None = None) -> np.ndarray:
        """A text of each record: the first, or the one that a draw from [0, 1) chooses.

        Zeros, the empty prompt, where a record has none.
        """
        first, count = self._starts[records], self._starts[records + 1] - self._starts[records]
        if chance is not None:
            first = first + (chance * count).astype(np.int64)
        if count.all():
            return self._rows(self._which[first])
        found = np.zeros((len(records), *self.field.shape), self.field.kind)
        found[count > 0] = self._rows(self._which[first[count > 0]])
        return found

    def of_record(self, record: int) -> np.ndarray:
        """All texts of one record."""
        return self._rows(self._which[self._starts[record] : self._starts[record + 1]])

    def check(self) -> None:
        """Reads every row; raises BadSample for one that is not as it was written."""
        for piece in pieces(len(self)):
            self._rows(np.arange(piece.start, piece.stop))

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        words = self._words.take(rows, axis=0)
        good = row_sums(words) == self._sums[rows, 0]
        if not good.all():
            raise BadSample(
                str(self._path),
                f"the table is damaged (text {int(rows[np.argmin(good)])} in it has another sum "
                "than was written)",
                "a whole table",
                AGAIN,
            )
        return self.field.values(words)


def table_path(root: Path, split: str) -> Path:
    """Where the table of a split is."""
    return root / f"{split}.text.bin"


def is_whole(root: Path, index: Mapping[str, Any]) -> bool:
    """Whether the finished index's table is there, as it was written."""
    entry = index.get("tables", {}).get("text")
    path = root / entry["file"] if entry else None
    return path is not None and path.is_file() and files.sha256(path) == entry["sha256"]


def pieces(count: int) -> Iterator[slice]:
    """Slices that together take every row."""
    return (slice(i, min(i + PIECE, count)) for i in range(0, count, PIECE))


def _loaded(root: Path, entry: Mapping[str, Any]) -> np.ndarray:
    path = root / entry["file"]
    if files.sha256(path) != entry["sha256"]:
        raise UserError(f"ERROR [data] {path}: damaged (another SHA-256 was written). {AGAIN}")
    return np.load(path, mmap_mode="r", allow_pickle=False)

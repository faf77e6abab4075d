"""Texts of a cache, each once however many rows have it: token ids, or features.

ROOT/SPLIT.text.bin       the different texts (``shards.py``, one field), as they first occur
ROOT/SPLIT.texts.npy      int32 [texts]: which of them each text is
ROOT/SPLIT.captions.npy   int64 [records + 1]: record i owns texts c[i] .. c[i + 1] - 1

1. Token ids: a record has a text per caption; a caption is its own name.
2. Features: a record has one, whatever its captions; its name is the SHA-256 of its bytes.

``text_writer.py`` writes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jointseg_jax.data import files
from jointseg_jax.data.cached.index import AGAIN, Field, RowFile, opened, row_bytes, row_sums
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

    def of(self, records: np.ndarray, random: np.ndarray | None = None) -> np.ndarray:
        """A text of each record: the first, or the one that a draw from [0, 1) chooses.

        Zeros, the empty prompt, where a record has none.
        """
        first, count = self._starts[records], self._starts[records + 1] - self._starts[records]
        if random is not None:
            first = first + (random * count).astype(np.int64)
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


PART = ".text.bin"
"""Ending of the texts of one shard."""


class TextPart:
    """The different texts of one shard, being collected."""

    def __init__(self, path: Path, field: Field):
        self._path, self._field = path, field
        self._found: dict[str, np.ndarray] = {}

    def add(self, values: np.ndarray) -> list[str]:
        """Keeps what is new of some texts; returns the name of each."""
        words = self._field.words(values)
        names = [name_of(row, self._field) for row in words]
        for name, row in zip(names, words):
            if name not in self._found:
                self._found[name] = row.copy()
        return names

    def close(self) -> str:
        """Writes the file; returns its SHA-256."""
        rows = np.array([*self._found.values()], np.uint64)
        file = RowFile(self._path, (self._field,), len(rows))
        file.add([rows.reshape(len(rows), self._field.stride // 8)])
        return file.close()["sha256"]


def name_of(words: np.ndarray, field: Field) -> str:
    """The name of features: equal ones have the same."""
    return hashlib.sha256(words.view(np.uint8)[: field.size]).hexdigest()


def write(
    root: Path,
    split: str,
    field: Field,
    records: Iterable[Sequence[str]],
    rows: Callable[[Mapping[str, int]], Iterator[tuple[Sequence[str], np.ndarray]]],
    *,
    keep: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the three files, and returns their entries in the index.

    Args:
      records: the names of the texts of each record.
      rows: from the wanted names, with their places, to names and 64-bit words, in any order.
      keep: the entry of a table that is whole already: not written again if it has these texts.
    """
    places: dict[str, int] = {}
    which, starts = [], [0]
    for names in records:
        which += [places.setdefault(name, len(places)) for name in names]
        starts.append(len(which))
    of = hashlib.sha256(json.dumps([*places]).encode()).hexdigest()
    path = table_path(root, split)
    if keep is None or keep["of"] != of:
        found = _table(path, field, places, rows(places))
        keep = {"file": path.name, "rows": len(places), "of": of} | found
    return {
        "captions": _saved(root, f"{split}.captions.npy", np.array(starts, np.int64)),
        "texts": _saved(root, f"{split}.texts.npy", np.array(which, np.int32)),
        "text": dict(keep),
    }


def tokenized(
    wanted: Mapping[str, int], field: Field, tokenizer: Callable[[str], np.ndarray]
) -> Iterator[tuple[Sequence[str], np.ndarray]]:
    """The token ids of captions."""
    captions = list(wanted)
    for piece in pieces(len(captions)):
        yield captions[piece], field.words(np.stack([*map(tokenizer, captions[piece])]))


def collected(paths: Iterable[Path], field: Field) -> Iterator[tuple[Sequence[str], np.ndarray]]:
    """The features in some files, those that are there and have a size that they can have."""
    for path in paths:
        if path.is_file() and path.stat().st_size % row_bytes((field,)) == 0:
            (words,), _ = opened(path, (field,))
            for piece in pieces(len(words)):
                rows = words[piece]
                yield [name_of(row, field) for row in rows], rows


def _table(
    path: Path,
    field: Field,
    places: Mapping[str, int],
    rows: Iterable[tuple[Sequence[str], np.ndarray]],
) -> dict[str, Any]:
    """Writes the rows of the wanted names, each at its place."""
    file = RowFile(path, (field,), len(places))
    missing = set(places)
    for names, words in rows:
        for name, row in zip(names, words):
            if name in missing:
                missing.remove(name)
                file.put(places[name], [row[None]])
    if missing:
        raise UserError(
            f"ERROR [encode] {path}: {len(missing)} of {len(places)} texts are in no file of the "
            "cache any more. Delete this file and run the same command again."
        )
    return file.close()


def _saved(root: Path, name: str, values: np.ndarray) -> dict[str, Any]:
    temporary = root / f"{name}.tmp"
    with open(temporary, "wb") as file:
        np.save(file, values, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, root / name)
    files.sync_folder(root)
    size = (root / name).stat().st_size
    return {"file": name, "bytes": size, "sha256": files.sha256(root / name)}

"""Writes the texts of a cache (``text_table.py``).

1. Each shard keeps the different features of its records in ``SHARD.text.bin`` until all shards are
   there; then they become one table, and the parts go.
2. A table is written anew when a shard brings other texts: from the parts that there are and the
   rows of the table before it.
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
from jointseg_jax.data.cached.shards import Field, RowFile, opened, row_bytes
from jointseg_jax.data.cached.texts import pieces, table_path
from jointseg_jax.types import UserError

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

"""Writes caches, shard by shard: each whole or not at all, kept when the work goes on after a kill.

1. ``begin`` writes the index with ``complete: false``, or compares it with the one that is there.
2. A shard is written to a temporary file, synced, hashed and renamed; then comes its note, with the
   hash and the ids and captions of its records. A shard without a matching note does not exist.
3. ``finish`` writes the caption table, the token ids and, last, the index with all hashes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jointseg_jax.data import files
from jointseg_jax.data.cache import (
    FORMAT,
    VERSION,
    Field,
    blocks,
    dump,
    read_index,
    row_bytes,
    row_sums,
    shard_name,
)
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import UserError

Different = Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]]


def begin(root: Path, split: str, head: Mapping[str, Any], differences: Different) -> None:
    """Opens a cache to write to, or to go on with.

    Args:
      head: what is known before the first row: settings, fields, classes, words and counts.
      differences: lists the settings that are not the same, saved ones first.

    Raises:
      UserError: it was begun with other settings.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{split}.json"
    head = json.loads(json.dumps({"format": FORMAT, "version": VERSION} | dict(head)))
    if not path.exists():
        files.write(path, dump({"complete": False} | head))
        return
    saved = read_index(path)
    found = differences({k: saved.get(k) for k in head}, head)
    if found:
        raise UserError(
            f"ERROR [data] {path}: this cache was made with other settings:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nPut these settings back, or choose another --out."
        )


def kept(root: Path, name: str) -> bool:
    """Whether a shard is there, whole: its note is, and it has the hash that the note says."""
    note, shard = root / f"{name}.json", root / f"{name}.bin"
    if not note.is_file() or not shard.is_file():
        return False
    try:
        return files.read_json(note)["sha256"] == files.sha256(shard)
    except (BadSample, KeyError, TypeError):
        return False


class ShardWriter:
    """One shard being filled, in order; nothing has its name until ``close``."""

    def __init__(self, root: Path, name: str, fields: Sequence[Field], rows: int):
        self.root, self.name, self.fields = root, name, tuple(fields)
        self.path = root / f"{name}.bin.tmp"
        self.rows, self.filled = rows, 0
        self.notes: list[dict[str, Any]] = []
        shape = (rows * row_bytes(fields),)
        self._memory = np.memmap(self.path, np.uint8, "w+", shape=shape)
        self._words, self._sums = blocks(np.asarray(self._memory), self.fields)

    def add(self, values: Mapping[str, np.ndarray], notes: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows of all fields, already of their dtypes, and the notes of their records."""
        count = len(next(iter(values.values())))
        place = slice(self.filled, self.filled + count)
        for number, field in enumerate(self.fields):
            given = np.ascontiguousarray(values[field.name], field.dtype)
            words = np.zeros((count, field.stride // 8), np.uint64)
            words.view(np.uint8)[:, : field.size] = given.reshape(count, -1).view(np.uint8)
            self._words[number][place] = words
            self._sums[place, number] = row_sums(words)
        self.filled += count
        self.notes += map(dict, notes)

    def close(self) -> None:
        """Gives the shard its name, and then its note."""
        if self.filled != self.rows:
            raise ValueError(f"{self.path}: {self.filled} of {self.rows} rows were added.")
        self._memory.flush()
        del self._words, self._sums, self._memory
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        digest, size = files.sha256(self.path), self.path.stat().st_size
        final = self.root / f"{self.name}.bin"
        os.replace(self.path, final)
        files.sync_folder(self.root)
        note = {"sha256": digest, "bytes": size, "records": self.notes}
        files.write(self.root / f"{self.name}.json", dump(note))


def finish(
    root: Path, split: str, shards: int, tokenizer: Callable[[str], np.ndarray] | None
) -> dict[str, Any]:
    """Writes the tables and the finished index, which it returns.

    Args:
      tokenizer: from a caption to its token ids, where text is words.
    """
    entries, captions, starts = [], [], [0]
    for number in range(shards):
        name = shard_name(split, number, shards)
        note = files.read_json(root / f"{name}.json")
        entry = {"file": f"{name}.bin", "records": len(note["records"])}
        entries.append(entry | {k: note[k] for k in ("bytes", "sha256")})
        for record in note["records"]:
            captions += record["captions"]
            starts.append(len(captions))
    tables = {"captions": _table(root, f"{split}.captions.npy", np.array(starts, np.int64))}
    if tokenizer is not None:
        empty = np.zeros((0, len(tokenizer(""))), np.int32)
        ids = np.stack([*map(tokenizer, captions)]).astype(np.int32) if captions else empty
        tables["tokens"] = _table(root, f"{split}.tokens.npy", ids)
    path = root / f"{split}.json"
    index = read_index(path) | {"complete": True, "shards": entries, "tables": tables}
    files.write(path, dump(index))
    remove_strays(root, split, {shard_name(split, n, shards) for n in range(shards)})
    return index


def _table(root: Path, name: str, values: np.ndarray) -> dict[str, Any]:
    temporary = root / f"{name}.tmp"
    with open(temporary, "wb") as file:
        np.save(file, values, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, root / name)
    files.sync_folder(root)
    size = (root / name).stat().st_size
    return {"file": name, "bytes": size, "sha256": files.sha256(root / name)}


def remove_strays(root: Path, split: str, names: set[str]) -> None:
    """Removes what a killed run left of this split."""
    for path in root.glob(f"{split}-*-of-*"):
        if path.name.split(".")[0] not in names or path.name.endswith(".tmp"):
            path.unlink()

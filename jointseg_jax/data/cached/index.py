"""``ROOT/SPLIT.json``: what an encoded split is made of, and with what settings.

The index alone says what a batch of the cache holds, so a program that reads it can be compiled
where the rows are not (``perf/abstract.py``).
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jointseg_jax.data import files
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.labels import class_list
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import UserError

FORMAT, VERSION = "jointseg cache", 2

AGAIN = (
    "Copy it again from its source; or delete it and run launch/encode.py again with the same "
    "settings: whole shards are kept."
)


def index_path(root: str | Path, split: str) -> Path:
    """Where the index of a split is."""
    return Path(root) / f"{split}.json"


def read_index(path: Path) -> dict[str, Any]:
    """Reads an index of this version, finished or not.

    Raises:
      UserError: no index of this version is there.
    """
    made = "Caches are made by launch/encode.py; check config.data.cache."
    try:
        index = files.read_json(path)
    except BadSample as problem:
        raise UserError(f"{problem} {made}") from None
    found = (index.get("format"), index.get("version")) if isinstance(index, dict) else (None, None)
    if found[0] != FORMAT:
        raise UserError(f"ERROR [data] {path}: not the index of a cache. {made}")
    if found[1] != VERSION:
        raise UserError(
            f"ERROR [data] {path}: version {found[1]} of the cache; this release reads version "
            f"{VERSION}. Run launch/encode.py again, into another folder."
        )
    return index


def classes_of(index: Mapping[str, Any]) -> Classes:
    """The classes of the source that was encoded."""
    content = index["classes"]
    return class_list(content["classes"], content["swaps"])


def fields_of(index: Mapping[str, Any]) -> tuple[Field, ...]:
    """What a row holds."""
    return tuple(map(Field.of, index["fields"]))


def text_of(index: Mapping[str, Any]) -> Field | None:
    """The field of texts, which are kept once for all rows that have the same."""
    return Field.of(index["text"]) if index["text"] else None


def check_files(root: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Refuses files that are missing or have another size than was written."""
    written = ((files.inside(root, entry["file"]), entry["bytes"]) for entry in entries)
    files.require_sizes(root, written, what="files of the cache", remedy=AGAIN)


def dump(content: object) -> bytes:
    """JSON as it is kept in a cache."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


BFLOAT16 = "bfloat16"
"""The one number type here that numpy does not know by name."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One array of every row.

    Attributes:
      name: the batch field.
      dtype: as stored.
      shape: of one row.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @staticmethod
    def of(values: dict[str, Any]) -> Field:
        """The field with these plain values."""
        return Field(**values | {"shape": tuple(values["shape"])})

    def plain(self) -> dict[str, Any]:
        """What ``of`` makes an equal field from."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @property
    def kind(self) -> np.dtype:
        """The number type as numpy's."""
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == BFLOAT16 else self.dtype)

    @property
    def read_kind(self) -> np.dtype:
        """The number type that rows are read as."""
        return np.dtype(np.int16) if self.name == "labels" else self.kind

    @property
    def size(self) -> int:
        """Bytes of a row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.kind.itemsize

    @property
    def stride(self) -> int:
        """Bytes from row to row."""
        return -(-self.size // 8) * 8

    def words(self, values: np.ndarray) -> np.ndarray:
        """Rows as 64-bit words ``[rows, stride / 8]``."""
        given = np.ascontiguousarray(values, self.kind)
        words = np.zeros((len(given), self.stride // 8), np.uint64)
        words.view(np.uint8)[:, : self.size] = given.reshape(len(given), -1).view(np.uint8)
        return words

    def values(self, words: np.ndarray) -> np.ndarray:
        """The rows ``[rows, *shape]`` of 64-bit words ``[rows, stride / 8]``."""
        plain = words.view(np.uint8)[:, : self.size]
        found = np.ascontiguousarray(plain).view(self.kind).reshape(len(words), *self.shape)
        return found.astype(self.read_kind, copy=False)


def row_bytes(fields: Iterable[Field]) -> int:
    """Bytes that a row takes in a file, with its sums."""
    return sum(f.stride + 8 for f in fields)


def row_sums(words: np.ndarray) -> np.ndarray:
    """The sum of each row of 64-bit words."""
    return words.sum(axis=1, dtype=np.uint64)


def blocks(memory: np.ndarray, fields: Sequence[Field]) -> tuple[list[np.ndarray], np.ndarray]:
    """The words of each field, and the sums, of the bytes of a file."""
    count = len(memory) // row_bytes(fields)
    ends = list(itertools.accumulate((count * f.stride for f in fields), initial=0))
    words = [
        memory[a:b].view(np.uint64).reshape(count, f.stride // 8)
        for f, (a, b) in zip(fields, itertools.pairwise(ends))
    ]
    return words, memory[ends[-1] :].view(np.uint64).reshape(count, len(fields))


def opened(path: Path, fields: Sequence[Field]) -> tuple[list[np.ndarray], np.ndarray]:
    """``blocks`` of a file; nothing is read before it is asked for."""
    if not path.stat().st_size:
        return blocks(np.zeros(0, np.uint8), fields)
    return blocks(np.asarray(np.memmap(path, np.uint8, "r")), fields)


class RowFile:
    """Rows being written; nothing has the file's name until ``close``."""

    def __init__(self, path: Path, fields: Sequence[Field], rows: int):
        self.path, self.fields, self.rows, self.filled = path, tuple(fields), rows, 0
        self._temporary = path.with_name(path.name + ".tmp")
        self._temporary.write_bytes(b"")  # numpy maps no empty file
        self._memory: Any = np.zeros(0, np.uint8)
        if rows:
            shape = (rows * row_bytes(fields),)
            self._memory = np.memmap(self._temporary, np.uint8, "w+", shape=shape)
        self._words, self._sums = blocks(np.asarray(self._memory), self.fields)

    def add(self, words: Sequence[np.ndarray]) -> None:
        """Adds rows after the last, given as the words of each field."""
        self.put(self.filled, words)

    def put(self, first: int, words: Sequence[np.ndarray]) -> None:
        """Fills the places from ``first`` on, each of which is filled once."""
        place = slice(first, first + len(words[0]))
        for number, given in enumerate(words):
            self._words[number][place] = given
            self._sums[place, number] = row_sums(given)
        self.filled += len(words[0])

    def close(self) -> dict[str, Any]:
        """Gives the file its name; returns what tells it from others."""
        if self.filled != self.rows:
            raise ValueError(f"{self.path}: {self.filled} of {self.rows} rows were added.")
        if self.rows:
            self._memory.flush()
        del self._words, self._sums, self._memory
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
        found = {"bytes": self._temporary.stat().st_size, "sha256": files.sha256(self._temporary)}
        os.replace(self._temporary, self.path)
        files.sync_folder(self.path.parent)
        return found


def shard_name(split: str, number: int, shards: int) -> str:
    """The name of a shard, without its ending."""
    return f"{split}-{number:05d}-of-{shards:05d}"

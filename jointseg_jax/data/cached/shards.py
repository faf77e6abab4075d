"""Fixed-size rows in a file that is mapped into memory.

1. A file of n rows is one block ``[n, stride_f]`` per field f, in the order of the fields, and then
   the sums ``[n, fields]``. A stride is the size of a row, filled up with zeros to 8 bytes.
2. The sum of a row is that of its 64-bit little-endian words modulo 2^64, taken of every row that
   is read: a changed bit, or a page of zeros, is noticed before anything learns from it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jointseg_jax.data import files

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

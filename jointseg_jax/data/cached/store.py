"""The files of an encoded split: an index, and shards of fixed-size rows, mapped into memory.

``ROOT/SPLIT.json``, the index, alone says what a batch of the cache holds, so a program that reads
it can be compiled where the rows are not (``perf/abstract.py``).

A shard of n rows is one block ``[n, stride_f]`` per field f, in the order of the fields, and then
the sums ``[n, fields]``. A stride is the size of a row, filled up with zeros to 8 bytes. The sum of
a row is that of its 64-bit little-endian words modulo 2^64, taken of every row that is read: a
changed bit, or a page of zeros, is noticed before anything learns from it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import ml_dtypes  # noqa: F401 (numpy knows bfloat16 by its name from here on)
import numpy as np

from jointseg_jax.data import files
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.labels import ClassesContent, class_list
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import UserError

FORMAT, VERSION = "jointseg cache", 2

AGAIN = (
    "Copy it again from its source; or delete it and run launch/encode.py again with the same "
    "settings: whole shards are kept."
)


class FieldContent(TypedDict):
    """A ``Field`` in JSON."""

    name: str
    dtype: str
    shape: list[int]


class Note(TypedDict):
    """What a shard's own JSON says of one record."""

    id: str
    captions: list[str]
    instead_of: NotRequired[list[str]]  # problems of the bad records that this one replaces
    text: NotRequired[str]  # name of its features of text


class ShardEntry(files.SizeAndSum):
    """What the index says of one shard."""

    file: str
    records: int
    replaced: int  # records that stand in the place of bad ones


class TableEntry(files.SizeAndSum):
    """What the index says of one file of the texts."""

    file: str
    rows: NotRequired[int]
    of: NotRequired[str]  # SHA-256 of the names of its rows


class CacheIndex(TypedDict):
    """What ``ROOT/SPLIT.json`` holds."""

    format: str
    version: int
    complete: bool
    settings: dict[str, object]  # config, fingerprint of the source, codecs
    classes: ClassesContent
    words: list[str]
    records: int
    per_shard: int
    variants: int  # rows of a record: crops, and each mirrored where ``flip`` is given
    crops: int
    random_crops: bool
    flip: float | None
    fields: list[FieldContent]
    text: FieldContent | None
    shards: list[ShardEntry]  # these two only once complete
    tables: dict[str, TableEntry]


def index_path(root: str | Path, split: str) -> Path:
    """Returns the path of the index of a split."""
    return Path(root) / f"{split}.json"


def read_index(path: Path) -> CacheIndex:
    """Reads an index of this version, finished or not; raises UserError for any other file."""
    made = "Caches are made by launch/encode.py; check config.data.cache."
    try:
        index = files.read_json(path)
    except BadSample as problem:
        raise UserError(f"{problem} {made}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"ERROR [data] {path}: not the index of a cache. {made}")
    if index.get("version") != VERSION:
        raise UserError(
            f"ERROR [data] {path}: version {index.get('version')} of the cache; this release reads "
            f"version {VERSION}. Run launch/encode.py again, into another folder."
        )
    return cast(CacheIndex, index)


def classes_of(index: CacheIndex) -> Classes:
    """Returns the classes of the source that was encoded."""
    content = index["classes"]
    return class_list(content["classes"], content["swaps"])


def fields_of(index: CacheIndex) -> tuple[Field, ...]:
    """Returns the fields of a row."""
    return tuple(map(Field.of, index["fields"]))


def text_of(index: CacheIndex) -> Field | None:
    """Returns the field of texts, which are kept once for all rows that have the same."""
    return Field.of(index["text"]) if index["text"] else None


def check_files(root: Path, entries: Iterable[ShardEntry | TableEntry]) -> None:
    """Refuses files that are missing or have another size than was written."""
    written = ((files.inside(root, entry["file"]), entry["bytes"]) for entry in entries)
    files.require_sizes(root, written, what="files of the cache", remedy=AGAIN)


def damaged(path: Path, kind: str, what: str) -> BadSample:
    """Returns the problem of a shard or table that holds something else than was written."""
    found = f"the {kind} is damaged ({what} in it has another sum than was written)"
    return BadSample(str(path), found, f"a whole {kind}", AGAIN)


def dump(content: Mapping[str, object]) -> bytes:
    """Encodes JSON as it is kept in a cache."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True, kw_only=True)
class Field:
    """One array of every row."""

    name: str  # the batch field
    dtype: str  # as stored
    shape: tuple[int, ...]  # of one row

    @staticmethod
    def of(content: FieldContent) -> Field:
        """Returns the field that ``plain`` gave."""
        return Field(name=content["name"], dtype=content["dtype"], shape=tuple(content["shape"]))

    def plain(self) -> FieldContent:
        """Returns the field as plain values for JSON."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @property
    def kind(self) -> np.dtype:
        """The number type as numpy's."""
        return np.dtype(self.dtype)

    @property
    def read_kind(self) -> np.dtype:
        """The number type that rows are read as."""
        # Labels are stored as int8 where they fit, and are int16 everywhere in the package.
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
        """Returns rows ``[rows, *shape]`` as 64-bit words ``[rows, stride / 8]``."""
        plain = np.ascontiguousarray(values, self.kind)
        words = np.zeros((len(plain), self.stride // 8), np.uint64)
        # Through bytes, which keeps every bit of bfloat16 and pads the last word with zeros.
        words.view(np.uint8)[:, : self.size] = plain.reshape(len(plain), -1).view(np.uint8)
        return words

    def values(self, words: np.ndarray) -> np.ndarray:
        """Returns the rows ``[rows, *shape]`` of 64-bit words ``[rows, stride / 8]``."""
        plain = np.ascontiguousarray(words.view(np.uint8)[:, : self.size])
        rows = plain.view(self.kind).reshape(len(words), *self.shape)
        return rows.astype(self.read_kind, copy=False)


def row_bytes(fields: Iterable[Field]) -> int:
    """Returns the bytes that a row takes in a file, with its sums."""
    return sum(f.stride + 8 for f in fields)


def row_sums(words: np.ndarray) -> np.ndarray:
    """Returns the sum of each row of 64-bit words, modulo 2^64."""
    return words.sum(axis=1, dtype=np.uint64)


def blocks(memory: np.ndarray, fields: Sequence[Field]) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns views of a file's bytes: the words of each field, and the sums."""
    count = len(memory) // row_bytes(fields)
    ends = list(itertools.accumulate((count * f.stride for f in fields), initial=0))
    words = [
        memory[a:b].view(np.uint64).reshape(count, f.stride // 8)
        for f, (a, b) in zip(fields, itertools.pairwise(ends))
    ]
    return words, memory[ends[-1] :].view(np.uint64).reshape(count, len(fields))


def opened(path: Path, fields: Sequence[Field]) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns ``blocks`` of a file; pages are read when they are used."""
    # numpy maps no empty file.
    memory = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    return blocks(np.asarray(memory), fields)


class RowFile:
    """Rows being written; nothing has the file's name until ``close``."""

    def __init__(self, path: Path, fields: Sequence[Field], rows: int):
        self.path, self.fields, self.rows, self.filled = path, tuple(fields), rows, 0
        temporary = files.temporary(path)
        temporary.write_bytes(b"")  # numpy maps no empty file
        self._memory = np.zeros(0, np.uint8)
        if rows:
            shape = (rows * row_bytes(fields),)
            self._memory = np.memmap(temporary, np.uint8, "w+", shape=shape)
        self._words, self._sums = blocks(np.asarray(self._memory), self.fields)

    def add(self, words: Sequence[np.ndarray]) -> None:
        """Adds rows after the last, given as the words of each field."""
        self.put(self.filled, words)

    def put(self, first: int, words: Sequence[np.ndarray]) -> None:
        """Fills the rows from ``first`` on, each of which is filled once."""
        rows = slice(first, first + len(words[0]))
        for number, block in enumerate(words):
            self._words[number][rows] = block
            self._sums[rows, number] = row_sums(block)
        self.filled += len(words[0])

    def close(self) -> files.SizeAndSum:
        """Gives the file its name; returns its size and SHA-256."""
        if self.filled != self.rows:
            raise ValueError(f"{self.path}: {self.filled} of {self.rows} rows were added.")
        if isinstance(self._memory, np.memmap):
            self._memory.flush()
        # The map goes before the rename: it would keep the pages of the file in use.
        del self._words, self._sums, self._memory
        files.publish(self.path)
        return files.size_and_sum(self.path)


def shard_name(split: str, number: int, shards: int) -> str:
    """Returns the name of a shard, without its ending."""
    return f"{split}-{number:05d}-of-{shards:05d}"

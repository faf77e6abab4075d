"""What a run reads of its data, encoded once: fixed-size rows in memory-mapped shards.

ROOT/SPLIT.json                      the index: settings, fields, shards with their SHA-256
ROOT/SPLIT-00000-of-00004.bin        rows
ROOT/SPLIT-00000-of-00004.json       ids and captions of the records of that shard
ROOT/SPLIT.captions.npy              int64 [records + 1]: record i owns captions c[i] .. c[i+1] - 1
ROOT/SPLIT.tokens.npy                int32 [captions, length]: token ids, where text is words

1. Record i has ``variants`` rows, ``i * variants`` and on, those of ``views.py``.
2. A shard of n rows is one block ``[n, stride_f]`` per field f, in the order of the index, and then
   the sums ``[n, fields]``. A stride is the size of a row, filled up with zeros to 8 bytes.
3. The sum of a row is that of its 64-bit little-endian words modulo 2^64, taken of every row that
   is read: a changed bit, or a page of zeros, is noticed before anything learns from it.

``launch/encode.py`` writes it (``cache_writer.py``). Rows come as they are stored, except that
``labels`` are int16 again; float16 is made float32 where it is used, on the device.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jointseg_jax.data import files
from jointseg_jax.data.class_file import class_list
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import BadSample, Record
from jointseg_jax.types import UserError

FORMAT, VERSION = "jointseg cache", 1

AGAIN = (
    "Copy it again from its source; or delete it and run launch/encode.py again with the same "
    "settings: whole shards are kept."
)


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

    @property
    def size(self) -> int:
        """Bytes of a row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def stride(self) -> int:
        """Bytes from row to row."""
        return -(-self.size // 8) * 8

    def values(self, words: np.ndarray) -> np.ndarray:
        """The rows ``[rows, *shape]`` of 64-bit words ``[rows, stride / 8]``."""
        plain = words.view(np.uint8)[:, : self.size]
        found = np.ascontiguousarray(plain).view(self.dtype).reshape(len(words), *self.shape)
        return found.astype(np.int16) if self.name == "labels" else found


def row_bytes(fields: Iterable[Field]) -> int:
    """Bytes that a row takes in a shard, with its sums."""
    return sum(f.stride + 8 for f in fields)


def row_sums(words: np.ndarray) -> np.ndarray:
    """The sum of each row of 64-bit words."""
    return words.sum(axis=1, dtype=np.uint64)


def blocks(memory: np.ndarray, fields: Sequence[Field]) -> tuple[list[np.ndarray], np.ndarray]:
    """The words of each field, and the sums, of the bytes of a shard."""
    count = len(memory) // row_bytes(fields)
    ends = list(itertools.accumulate((count * f.stride for f in fields), initial=0))
    words = [
        memory[a:b].view(np.uint64).reshape(count, f.stride // 8)
        for f, (a, b) in zip(fields, itertools.pairwise(ends))
    ]
    return words, memory[ends[-1] :].view(np.uint64).reshape(count, len(fields))


def shard_name(split: str, number: int, shards: int) -> str:
    """The name of a shard, without its ending."""
    return f"{split}-{number:05d}-of-{shards:05d}"


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


@dataclass(frozen=True, kw_only=True)
class Cache:
    """An encoded split as a source whose batches are gathered whole (``gathering.py``).

    Attributes:
      root: its folder.
      index: what its index says.
      fields: what a row holds.
    """

    root: str
    split: str
    index: dict[str, Any] = field(init=False, repr=False, compare=False)
    classes: Classes = field(init=False, repr=False)
    fields: tuple[Field, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        path = Path(self.root) / f"{self.split}.json"
        index = read_index(path)
        if not index.get("complete"):
            raise UserError(
                f"ERROR [data] {path}: the cache is not finished. Run the same launch/encode.py "
                "command again: it goes on where it stopped."
            )
        try:
            known = self._known(index)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"ERROR [data] {path}: damaged ({why}). {AGAIN}") from None
        for name, value in known.items():
            object.__setattr__(self, name, value)

    def _known(self, index: dict[str, Any]) -> dict[str, Any]:
        """The attributes that follow from an index."""
        shards, tables = index["shards"], index["tables"]
        check_files(Path(self.root), [*shards, *tables.values()])
        content = index["classes"]
        fields = tuple(Field(**f | {"shape": tuple(f["shape"])}) for f in index["fields"])
        for entry in shards:
            if entry["bytes"] != entry["records"] * index["variants"] * row_bytes(fields):
                raise ValueError(f"{entry['file']}: {entry['records']} records of other fields")
        return {
            "index": index,
            "classes": class_list(content["classes"], content["swaps"]),
            "fields": fields,
            "_starts": list(itertools.accumulate((s["records"] for s in shards), initial=0)),
            "_tables": {k: self._table(entry) for k, entry in tables.items()},
            "_open": {},
            "_notes": {},
            "_lock": threading.Lock(),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Cache, root=self.root, split=self.split), ()

    @property
    def name(self) -> str:
        """Names the source by its folder and split."""
        return f"{Path(self.root).name}/{self.split}"

    def __len__(self) -> int:
        return self._starts[-1]

    def words(self) -> tuple[str, ...]:
        """The words of the source that was encoded."""
        return tuple(self.index["words"])

    def fingerprint(self) -> dict[str, object]:
        """The encoded source's, and what its rows are."""
        digests = "".join(shard["sha256"] for shard in self.index["shards"])
        return {
            "name": "cache",
            "count": len(self),
            "classes": list(self.classes.names),
            "sha256": hashlib.sha256(digests.encode()).hexdigest()[:16],
            "source": self.index["settings"]["source"],
        }

    def __getitem__(self, index: int) -> Record:
        """One record as it was encoded, unaugmented; ``image`` and ``labels`` if they were kept."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        note = self._note(shard)[index - self._starts[shard]]
        rows = self._rows(np.array([index * self.index["variants"]]))
        arrays = {name: values[0] for name, values in rows.items()}
        own = {k: arrays.pop(k) for k in ("image", "labels") if k in arrays}
        record = {"id": note["id"], "captions": tuple(note["captions"]), **own}
        return Record(**record, features=arrays)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuses a tokenizer that does not give the stored token ids.

        Raises:
          UserError: some other vocabulary or length.
        """
        tokens = self._tables.get("tokens")
        if tokenizer is None or tokens is None:
            return
        last = len(self) - 1
        good = len(tokenizer("")) == tokens.shape[1]
        for index in sorted({0, last // 2, last}):
            captions, at = self._captions(index), int(self._tables["captions"][index])
            good = good and all(
                np.array_equal(tokenizer(caption), tokens[at + i])
                for i, caption in enumerate(captions)
            )
        if not good:
            raise UserError(
                f"ERROR [data] {self.root}: holds token ids of another vocabulary or length "
                f"({tokens.shape[1]} ids per caption) than config.system.text gives. Set that "
                "back, or run launch/encode.py again, into another folder."
            )

    def damage(self) -> list[BadSample]:
        """Reads every row; what is wrong with each shard that is not as it was written."""
        found = []
        for first, end in itertools.pairwise(self._starts):
            rows = np.arange(first * self.index["variants"], end * self.index["variants"])
            try:
                for part in np.array_split(rows, -(-len(rows) // 256) or 1):
                    self._rows(part)
            except BadSample as problem:
                found.append(problem)
        return found

    def gather(
        self, records: np.ndarray, chance: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The rows of some records, in their order.

        Args:
          chance: uniform draws ``[3, records]`` that choose crop, mirror and caption; the first
            of each when absent.

        Raises:
          BadSample: a row is not what was written.
        """
        out = self._rows(records * self.index["variants"] + self._variant(chance))
        if "tokens" in self._tables:
            out["text"] = self._text(records, chance)
        return out

    def _variant(self, chance: np.ndarray | None) -> np.ndarray | int:
        if chance is None:
            return 0
        crops, flip = self.index["crops"], self.index["flip"]
        crop = (chance[0] * crops).astype(np.int64)
        return crop if flip is None else 2 * crop + (chance[1] < flip)

    def _text(self, records: np.ndarray, chance: np.ndarray | None) -> np.ndarray:
        starts, tokens = self._tables["captions"], self._tables["tokens"]
        first, count = starts[records], starts[records + 1] - starts[records]
        if chance is not None:
            first = first + (chance[2] * count).astype(np.int64)
        found = np.zeros((len(records), tokens.shape[1]), np.int32)  # the empty prompt
        found[count > 0] = tokens[first[count > 0]]
        return found

    def _rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Copies each row once, in the order in which rows lie on disk."""
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        edges = np.array(self._starts) * self.index["variants"]
        cuts = np.searchsorted(ordered, edges)
        out = [np.empty((len(rows), f.stride // 8), np.uint64) for f in self.fields]
        sums = np.empty((len(rows), len(self.fields)), np.uint64)
        for shard, (a, b) in enumerate(itertools.pairwise(cuts.tolist())):
            if a == b:
                continue
            words, written = self._shard(shard)
            places, local = order[a:b].tolist(), (ordered[a:b] - edges[shard]).tolist()
            sums[order[a:b]] = written[local]
            for source, target in zip(words, out):
                for place, row in zip(places, local):
                    target[place] = source[row]
        for number, words in enumerate(out):
            self._check(row_sums(words) == sums[:, number], rows, self.fields[number].name)
        return {f.name: f.values(words) for f, words in zip(self.fields, out)}

    def _check(self, good: np.ndarray, rows: np.ndarray, name: str) -> None:
        if good.all():
            return
        row = int(rows[np.argmin(good)])
        record = row // self.index["variants"]
        shard = bisect.bisect_right(self._starts, record) - 1
        raise BadSample(
            str(Path(self.root) / self.index["shards"][shard]["file"]),
            f"the shard is damaged ({name!r} of record {record - self._starts[shard]} in it has "
            "another sum than was written)",
            "a whole shard",
            AGAIN,
        )

    def _shard(self, number: int) -> tuple[list[np.ndarray], np.ndarray]:
        with self._lock:
            if number not in self._open:
                path = Path(self.root) / self.index["shards"][number]["file"]
                check_files(Path(self.root), [self.index["shards"][number]])
                memory = np.memmap(path, np.uint8, "r")
                self._open[number] = blocks(np.asarray(memory), self.fields)
            return self._open[number]

    def _note(self, number: int) -> list[dict[str, Any]]:
        with self._lock:
            if number not in self._notes:
                name = Path(self.index["shards"][number]["file"]).with_suffix(".json")
                self._notes[number] = files.read_json(Path(self.root) / name)["records"]
            return self._notes[number]

    def _captions(self, index: int) -> list[str]:
        shard = bisect.bisect_right(self._starts, index) - 1
        return self._note(shard)[index - self._starts[shard]]["captions"]

    def _table(self, entry: dict[str, Any]) -> np.ndarray:
        path = Path(self.root) / entry["file"]
        if files.sha256(path) != entry["sha256"]:
            raise UserError(f"ERROR [data] {path}: damaged (another SHA-256 was written). {AGAIN}")
        return np.load(path, mmap_mode="r", allow_pickle=False)


def check_files(root: Path, entries: list[dict[str, Any]]) -> None:
    """Refuses files that are missing or have another size than was written."""
    written = ((files.inside(root, entry["file"]), entry["bytes"]) for entry in entries)
    files.require_sizes(root, written, what="files of the cache", remedy=AGAIN)


def dump(content: object) -> bytes:
    """JSON as it is kept in a cache."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()

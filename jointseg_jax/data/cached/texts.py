"""Texts of a cache, each once however many rows have it: token ids, or features.

ROOT/SPLIT.text.bin       the different texts (rows of one field), as they first occur
ROOT/SPLIT.texts.npy      int32 [texts]: which of them each text is
ROOT/SPLIT.captions.npy   int64 [records + 1]: record i owns texts c[i] .. c[i + 1] - 1

1. Token ids: a record has a text per caption; a caption is its own name.
2. Features: a record has one, whatever its captions; its name is the SHA-256 of its bytes.
3. Each shard keeps the different features of its records in ``SHARD.text.bin`` until all shards are
   there; then they become one table, and the parts go. A table is written again when a shard brings
   other texts: from the parts that there are and the rows of the table before it.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from jointseg_jax.data import files
from jointseg_jax.data.cached import store
from jointseg_jax.data.cached.store import CacheIndex, Field, RowFile, TableEntry
from jointseg_jax.types import UserError

PIECE = 256
"""Rows moved at a time."""

PART = ".text.bin"
"""Ending of the table of a split, and of the texts of one shard."""

NamedRows = Iterator[tuple[Sequence[str], np.ndarray]]
"""Names of some texts and their 64-bit words, a row each."""


class Texts:
    """The texts of the records of a cache."""

    def __init__(self, root: Path, entries: Mapping[str, TableEntry], field: Field):
        """Opens the files that the entries of an index name."""
        self.field = field
        self._path = root / entries["text"]["file"]
        (self._words,), self._sums = store.opened(self._path, (field,))
        self._starts = _loaded(root, entries["captions"])  # int64 [records + 1]
        self._which = _loaded(root, entries["texts"])  # int32 [texts]
        rows = entries["text"].get("rows")
        if rows != len(self._words) or self._starts[-1] != len(self._which):
            raise ValueError(f"{self._path.name}: another number of rows")

    def __len__(self) -> int:
        return len(self._words)

    def of(self, records: np.ndarray, random: np.ndarray | None = None) -> np.ndarray:
        """Returns a text of each record: the first, or the one that ``random`` in [0, 1) chooses.

        Zeros, the empty prompt, where a record has none.
        """
        first, count = self._starts[records], self._starts[records + 1] - self._starts[records]
        if random is not None:
            first = first + (random * count).astype(np.int64)
        if count.all():
            return self.rows(self._which[first])
        # ``first`` of a record without texts is the next record's: it must not be read.
        texts = np.zeros((len(records), *self.field.shape), self.field.kind)
        texts[count > 0] = self.rows(self._which[first[count > 0]])
        return texts

    def of_record(self, record: int) -> np.ndarray:
        """Returns all texts of one record."""
        return self.rows(self._which[self._starts[record] : self._starts[record + 1]])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Returns rows of the table; raises BadSample for one that is not as it was written."""
        words = self._words.take(rows, axis=0)
        good = store.row_sums(words) == self._sums[rows, 0]
        if not good.all():
            raise store.damaged(self._path, "table", f"text {int(rows[np.argmin(good)])}")
        return self.field.values(words)


def is_whole(root: Path, index: CacheIndex) -> bool:
    """Returns True if the finished index's table is there, as it was written."""
    entry = index.get("tables", {}).get("text")
    if entry is None:
        return False
    path = root / entry["file"]
    return path.is_file() and files.sha256(path) == entry["sha256"]


def pieces(count: int) -> Iterator[slice]:
    """Yields slices of ``PIECE`` that together take every row."""
    return (slice(i, min(i + PIECE, count)) for i in range(0, count, PIECE))


def _loaded(root: Path, entry: TableEntry) -> np.ndarray:
    path = root / entry["file"]
    # Read whole once, for a wrong entry would give every record another's text.
    if files.sha256(path) != entry["sha256"]:
        raise UserError(
            f"ERROR [data] {path}: damaged (another SHA-256 was written). {store.AGAIN}"
        )
    return np.load(path, mmap_mode="r", allow_pickle=False)


class TextPart:
    """The different texts of one shard, being collected."""

    def __init__(self, path: Path, field: Field):
        self._path, self._field = path, field
        self._rows: dict[str, np.ndarray] = {}

    def add(self, values: np.ndarray) -> list[str]:
        """Keeps what is new of some texts; returns the name of each."""
        words = self._field.words(values)
        names = [name_of(row, self._field) for row in words]
        for name, row in zip(names, words):
            if name not in self._rows:
                self._rows[name] = row.copy()  # a view would keep the whole batch alive
        return names

    def close(self) -> str:
        """Writes the file; returns its SHA-256."""
        rows = np.array([*self._rows.values()], np.uint64)
        file = RowFile(self._path, (self._field,), len(rows))
        file.add([rows.reshape(len(rows), self._field.stride // 8)])
        return file.close()["sha256"]


def name_of(words: np.ndarray, field: Field) -> str:
    """Returns the name of features, the SHA-256 of their bytes: equal ones have the same."""
    return hashlib.sha256(words.view(np.uint8)[: field.size].tobytes()).hexdigest()


def write(
    root: Path,
    split: str,
    field: Field,
    records: Iterable[Sequence[str]],
    rows: Callable[[Mapping[str, int]], NamedRows],
    *,
    keep: TableEntry | None = None,
) -> dict[str, TableEntry]:
    """Writes the three files, and returns their entries in the index.

    Args:
      records: the names of the texts of each record.
      rows: from the wanted names, with their rows, to names and 64-bit words, in any order.
      keep: the entry of a table that is whole already: not written again if it has these texts.
    """
    row_of: dict[str, int] = {}
    which, starts = [], [0]
    for names in records:
        # A text gets its row where it first occurs, so the table does not depend on the shards.
        which += [row_of.setdefault(name, len(row_of)) for name in names]
        starts.append(len(which))
    of = hashlib.sha256(json.dumps([*row_of]).encode()).hexdigest()
    if keep is None or keep.get("of") != of:
        keep = _table(root / f"{split}{PART}", field, row_of, rows(row_of), of)
    return {
        "captions": _saved(root / f"{split}.captions.npy", np.array(starts, np.int64)),
        "texts": _saved(root / f"{split}.texts.npy", np.array(which, np.int32)),
        "text": keep,
    }


def tokenized(
    wanted: Mapping[str, int], field: Field, tokenizer: Callable[[str], np.ndarray]
) -> NamedRows:
    """Yields captions and their token ids."""
    captions = list(wanted)
    for piece in pieces(len(captions)):
        yield captions[piece], field.words(np.stack([*map(tokenizer, captions[piece])]))


def collected(paths: Iterable[Path], field: Field) -> NamedRows:
    """Yields the features in those files that exist and have a size that they can have."""
    for path in paths:
        if path.is_file() and path.stat().st_size % store.row_bytes((field,)) == 0:
            (words,), _ = store.opened(path, (field,))
            for piece in pieces(len(words)):
                rows = words[piece]
                yield [name_of(row, field) for row in rows], rows


def _table(
    path: Path, field: Field, row_of: Mapping[str, int], rows: NamedRows, of: str
) -> TableEntry:
    """Writes the rows of the wanted names, each at its place."""
    file = RowFile(path, (field,), len(row_of))
    missing = set(row_of)
    for names, words in rows:
        for name, row in zip(names, words):
            if name in missing:
                missing.remove(name)
                file.put(row_of[name], [row[None]])
    if missing:
        raise UserError(
            f"ERROR [encode] {path}: {len(missing)} of {len(row_of)} texts are in no file of the "
            "cache any more. Delete this file and run the same command again."
        )
    return TableEntry(file=path.name, rows=len(row_of), of=of, **file.close())


def _saved(path: Path, values: np.ndarray) -> TableEntry:
    data = io.BytesIO()
    np.save(data, values, allow_pickle=False)
    files.write(path, data.getvalue())
    return TableEntry(file=path.name, **files.size_and_sum(path))

"""What a run reads of its data, encoded once: fixed-size rows in memory-mapped shards.

ROOT/SPLIT.json                      the index: settings, fields, shards with their SHA-256
ROOT/SPLIT-00000-of-00004.bin        rows (``store.py``)
ROOT/SPLIT-00000-of-00004.json       ids and captions of the records of that shard
ROOT/SPLIT.text.bin, .texts.npy, .captions.npy   each different text once (``texts.py``)

Record i has ``variants`` rows, ``i * variants`` and on, those of ``views.py``.

``launch/encode.py`` writes it (``shard_writer.py``). Rows come as they are stored, except that
``labels`` are int16 again; float16 is made float32 where it is used, on the device.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from jointseg_jax.data import files
from jointseg_jax.data.cached import store
from jointseg_jax.data.cached.store import CacheIndex, Field, Note, ShardEntry
from jointseg_jax.data.cached.texts import Texts, pieces
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import BadSample, Record, derive
from jointseg_jax.types import UserError

Shard = tuple[list[np.ndarray], np.ndarray]
"""The words of each field, and the sums, of a shard mapped into memory."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """An encoded split as a source whose batches are gathered whole (``loader.py``)."""

    root: str  # its folder
    split: str
    index: CacheIndex = field(init=False, repr=False, compare=False)
    classes: Classes = field(init=False, repr=False)
    fields: tuple[Field, ...] = field(init=False, repr=False, compare=False)  # of a row
    texts: Texts | None = field(init=False, repr=False, compare=False)  # None: nothing reads any
    _starts: list[int] = field(init=False, repr=False, compare=False)  # first record of each shard
    # Shards and notes are opened when they are first read; notes, which are long, by one thread.
    _shard: Callable[[int], Shard] = field(init=False, repr=False, compare=False)
    _notes: Callable[[int], list[Note]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        path = store.index_path(self.root, self.split)
        index = store.read_index(path)
        if not index.get("complete"):
            raise UserError(
                f"ERROR [data] {path}: the cache is not finished. Run the same launch/encode.py "
                "command again: it goes on where it stopped."
            )
        try:
            self._open_index(index)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"ERROR [data] {path}: damaged ({why}). {store.AGAIN}") from None

    def _open_index(self, index: CacheIndex) -> None:
        """Sets the attributes that follow from an index; files of other sizes are refused."""
        shards, tables, root = index["shards"], index["tables"], Path(self.root)
        store.check_files(root, [*shards, *tables.values()])
        fields, text = store.fields_of(index), store.text_of(index)
        for entry in shards:
            if entry["bytes"] != entry["records"] * index["variants"] * store.row_bytes(fields):
                raise ValueError(f"{entry['file']}: {entry['records']} records of other fields")
        starts = list(itertools.accumulate((s["records"] for s in shards), initial=0))
        texts = Texts(root, tables, text) if text else None
        classes = store.classes_of(index)
        derive(self, index=index, classes=classes, fields=fields, texts=texts, _starts=starts)
        # Without ``self``, whose maps would wait for the collector of cycles to be closed.
        shard = functools.partial(_opened, root, shards, fields)
        notes = functools.partial(_noted, root, shards)
        derive(self, _shard=functools.cache(shard), _notes=_once(notes))

    def __reduce__(self) -> tuple[Callable[[], Cache], tuple[()]]:
        # A copy in a worker opens the files itself: maps do not travel.
        return functools.partial(Cache, root=self.root, split=self.split), ()

    @property
    def name(self) -> str:
        """Names the source by its folder and split."""
        return f"{Path(self.root).name}/{self.split}"

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def text_is_features(self) -> bool:
        """True if texts are features that came with the records, not token ids."""
        return self.texts is not None and self.texts.field.kind.kind != "i"

    def words(self) -> tuple[str, ...]:
        """Returns the words of the source that was encoded."""
        return tuple(self.index["words"])

    def fingerprint(self) -> dict[str, object]:
        """Returns the plain values that must match when a run resumes."""
        return {
            "name": "cache",
            "count": len(self),
            "classes": list(self.classes.names),
            "sha256": files.short_sum("".join(s["sha256"] for s in self.index["shards"])),
            "source": self.index["settings"]["source"],
        }

    def __getitem__(self, index: int) -> Record:
        """Returns a record as it was encoded, unaugmented; with image and labels if kept."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        note = self._note(index)
        rows = self._rows(np.array([index * self.index["variants"]]))
        if self.texts is not None and self.text_is_features:
            rows["text"] = self.texts.of(np.array([index]))
        # Half-precision numbers in float32, as features of records are.
        whole = {name: values.dtype.kind in "iu" for name, values in rows.items()}
        arrays = {k: v[0] if whole[k] else v[0].astype(np.float32) for k, v in rows.items()}
        own = {k: arrays.pop(k) for k in ("image", "labels") if k in arrays}
        record = {"id": note["id"], "captions": tuple(note["captions"]), **own, "features": arrays}
        return cast(Record, record)

    def check_tokenizer(self, tokenizer: Callable[[str], np.ndarray] | None) -> None:
        """Raises UserError for a tokenizer of another vocabulary or length than was encoded."""
        if tokenizer is None or self.texts is None or self.text_is_features:
            return
        # Three records tell: another vocabulary numbers nearly all words differently.
        length, last = self.texts.field.shape[0], len(self) - 1
        good = len(tokenizer("")) == length
        for index in sorted({0, last // 2, last}):
            stored = zip(self._note(index)["captions"], self.texts.of_record(index))
            good = good and all(np.array_equal(tokenizer(caption), ids) for caption, ids in stored)
        if not good:
            raise UserError(
                f"ERROR [data] {self.root}: holds token ids of another vocabulary or length "
                f"({length} ids per caption) than config.system.text gives. Set that back, or run "
                "launch/encode.py again, into another folder."
            )

    def damage(self) -> list[BadSample]:
        """Reads every row; returns what is wrong with each file that is not as it was written."""
        edges = (start * self.index["variants"] for start in self._starts)
        spans: list[tuple[Callable[[np.ndarray], object], int, int]] = [
            (self._rows, first, end) for first, end in itertools.pairwise(edges)
        ]
        if self.texts is not None:
            spans.append((self.texts.rows, 0, len(self.texts)))
        problems = []
        for read, first, end in spans:
            try:
                for piece in pieces(end - first):
                    read(first + np.arange(piece.start, piece.stop))
            except BadSample as problem:
                problems.append(problem)
        return problems

    def gather(
        self, records: np.ndarray, random: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the rows of ``records``, in their order, or raises BadSample for a damaged one.

        Args:
          random: uniform draws [3, records] that choose crop, mirror and caption; the first of
            each when absent.
        """
        out = self._rows(records * self.index["variants"] + self._variant(random))
        if self.texts is not None:
            out["text"] = self.texts.of(records, None if random is None else random[2])
        return out

    def _variant(self, random: np.ndarray | None) -> np.ndarray | int:
        if random is None:
            return 0
        # row 2 * crop + mirrored of a record, or row crop where no flips are kept
        crops, flip = self.index["crops"], self.index["flip"]
        crop = (random[0] * crops).astype(np.int64)
        return crop if flip is None else 2 * crop + (random[1] < flip)

    def _rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns rows as they are stored, checked against their sums."""
        # Copied in the order in which rows lie on disk, so that a disk reads forwards.
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
            targets, local = order[a:b].tolist(), (ordered[a:b] - edges[shard]).tolist()
            sums[order[a:b]] = written[local]
            # Row by row: ``block[local]`` would copy all rows once more on the way.
            for block, rows_out in zip(words, out):
                for target, row in zip(targets, local):
                    rows_out[target] = block[row]
        for number, words in enumerate(out):
            self._check(store.row_sums(words) == sums[:, number], rows, self.fields[number].name)
        return {f.name: f.values(words) for f, words in zip(self.fields, out)}

    def _check(self, good: np.ndarray, rows: np.ndarray, name: str) -> None:
        if good.all():
            return
        record = int(rows[np.argmin(good)]) // self.index["variants"]
        shard = bisect.bisect_right(self._starts, record) - 1
        what = f"{name!r} of record {record - self._starts[shard]}"
        raise store.damaged(Path(self.root) / self.index["shards"][shard]["file"], "shard", what)

    def _note(self, index: int) -> Note:
        """Returns id and captions of a record."""
        shard = bisect.bisect_right(self._starts, index) - 1
        return self._notes(shard)[index - self._starts[shard]]


def _opened(root: Path, shards: list[ShardEntry], fields: tuple[Field, ...], number: int) -> Shard:
    store.check_files(root, [shards[number]])
    return store.opened(root / shards[number]["file"], fields)


def _once(notes: Callable[[int], list[Note]]) -> Callable[[int], list[Note]]:
    """A cache that several threads may ask: it alone would let each of them read the file."""
    read, lock = functools.cache(notes), threading.Lock()

    def locked(shard: int) -> list[Note]:
        with lock:
            return read(shard)

    return locked


def _noted(root: Path, shards: list[ShardEntry], number: int) -> list[Note]:
    name = Path(shards[number]["file"]).with_suffix(".json")
    return cast(dict, files.read_json(root / name))["records"]

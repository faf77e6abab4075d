"""Writes caches, shard by shard: each whole or not at all, kept when the work goes on after a kill.

1. ``begin`` writes the index with ``complete: false``, or compares it with the one that is there.
2. A shard is written to a temporary file, synced, hashed and renamed; then comes its note, with the
   hash and the ids and captions of its records. A shard without a matching note does not exist.
3. ``finish`` writes the texts (``texts.py``) and, last, the index with all hashes.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from jointseg_jax.data import files
from jointseg_jax.data.cached import store, texts
from jointseg_jax.data.cached.store import CacheIndex, Field, Note, RowFile, ShardEntry, TableEntry
from jointseg_jax.data.records import BadSample
from jointseg_jax.settings_diff import require_same


def begin(root: Path, split: str, head: Mapping[str, object]) -> None:
    """Opens a cache to write to, or to go on with; UserError if it has other settings.

    Args:
      head: what is known before the first row: settings, fields, classes, words and counts.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = store.index_path(root, split)
    # Through JSON, to compare what will be in the file: tuples are lists there.
    head = json.loads(json.dumps({"format": store.FORMAT, "version": store.VERSION, **head}))
    if not path.exists():
        files.write(path, store.dump({"complete": False, **head}))
        return
    saved = store.read_index(path)
    require_same(
        {k: v for k, v in saved.items() if k not in ("complete", "shards", "tables")},
        head,
        where=f"ERROR [data] {path}: this cache",
        remedy="Put these settings back, or choose another --out.",
    )


def kept(root: Path, name: str, *, part: bool = False) -> bool:
    """Returns True if a shard is whole: it has the hash that its note, written last, says."""
    paths = {"": root / f"{name}.bin"}
    if part:  # its texts must be there, too, for they are in no table yet
        paths["text_"] = root / f"{name}{texts.PART}"
    try:
        note = read_note(root, name)
        return all(note[f"{k}sha256"] == files.sha256(path) for k, path in paths.items())
    except (BadSample, KeyError, TypeError, OSError):
        return False


def read_note(root: Path, name: str) -> dict:
    """Returns the JSON beside a shard: ``bytes``, ``sha256``, and the notes of its ``records``."""
    return cast(dict, files.read_json(root / f"{name}.json"))


class ShardWriter:
    """One shard being filled, in order; nothing has its name until ``close``.

    Args:
      text: the field of the features that come with records, if any do.
    """

    def __init__(
        self, root: Path, name: str, fields: Sequence[Field], rows: int, text: Field | None = None
    ):
        self.root, self.name, self.fields = root, name, tuple(fields)
        self.notes: list[Note] = []
        self._rows = RowFile(root / f"{name}.bin", self.fields, rows)
        self._texts = texts.TextPart(root / f"{name}{texts.PART}", text) if text else None

    def add(
        self,
        values: Mapping[str, np.ndarray],
        notes: Sequence[Note],
        texts: np.ndarray | None = None,
    ) -> None:
        """Adds rows of all fields, and of each record its note and its features of text."""
        self._rows.add([f.words(values[f.name]) for f in self.fields])
        if self._texts is not None and texts is not None:
            names = self._texts.add(texts)
            notes = [{**note, "text": name} for note, name in zip(notes, names)]
        self.notes += notes

    def close(self) -> None:
        """Gives the shard its name, and then its note."""
        note: dict[str, object] = {**self._rows.close(), "records": self.notes}
        if self._texts is not None:
            note["text_sha256"] = self._texts.close()
        files.write(self.root / f"{self.name}.json", store.dump(note))


def finish(
    root: Path, split: str, shards: int, tokenizer: Callable[[str], np.ndarray] | None
) -> CacheIndex:
    """Writes the texts, by the tokenizer where they are words, and returns the finished index."""
    path = store.index_path(root, split)
    names = [store.shard_name(split, n, shards) for n in range(shards)]
    before = store.read_index(path)
    entries: list[ShardEntry] = []
    records: list[Note] = []
    for name in names:
        note = read_note(root, name)
        replaced = sum("instead_of" in record for record in note["records"])
        entry = {"file": f"{name}.bin", "records": len(note["records"]), "replaced": replaced}
        entries.append(cast(ShardEntry, entry | {k: note[k] for k in ("bytes", "sha256")}))
        records += note["records"]
    tables = _texts(root, split, before, records, names, tokenizer)
    # ``complete`` keeps its place before the head: the bytes of an index are compared.
    index = cast(CacheIndex, {**before, "complete": True, "shards": entries, "tables": tables})
    files.write(path, store.dump(index))
    # Last: the parts of the texts are needed again if the work was stopped before the index.
    # What a killed run left goes with them.
    for stray in root.glob(f"{split}-*-of-*"):
        if stray.name.split(".")[0] not in names or stray.name.endswith((".tmp", texts.PART)):
            stray.unlink()
    return index


def _texts(
    root: Path,
    split: str,
    index: CacheIndex,
    records: Sequence[Note],
    shards: Sequence[str],
    tokenizer: Callable[[str], np.ndarray] | None,
) -> dict[str, TableEntry]:
    field = store.text_of(index)
    if field is None:
        return {}
    keep = index["tables"]["text"] if texts.is_whole(root, index) else None
    if tokenizer is not None:
        names = [record["captions"] for record in records]
        encode = functools.partial(texts.tokenized, field=field, tokenizer=tokenizer)
        return texts.write(root, split, field, names, encode, keep=keep)
    paths = [*(root / f"{name}{texts.PART}" for name in shards), root / f"{split}{texts.PART}"]
    names = [[record.get("text", "")] for record in records]
    return texts.write(
        root, split, field, names, lambda _: texts.collected(paths, field), keep=keep
    )

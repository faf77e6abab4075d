"""``ROOT/SPLIT.json``: what an encoded split is made of, and with what settings.

The index alone says what a batch of the cache holds, so a program that reads it can be compiled
where the rows are not (``perf/abstract.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jointseg_jax.data import files
from jointseg_jax.data.cached.shards import Field
from jointseg_jax.data.class_file import class_list
from jointseg_jax.data.classes import Classes
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

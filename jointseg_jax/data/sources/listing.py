"""What a split of a data set folder holds: images and label files, joined by id.

An id is the name of a file without its ending. A listing is sorted by id. What is wrong with an id
stands in its entry; everything is collected, so that one run shows all problems.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jointseg_jax.data import files
from jointseg_jax.data.captions import Captions
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.labels import LabelRule
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import UserError


class Entry(NamedTuple):
    """One id of a split: its files, relative to the root, or what is wrong with it.

    ``segments`` holds (segment id, class, is crowd, area) per row, for panoptic labels; ``parts``
    holds (class, file) in painting order, for labels that lie in one file per class.
    """

    id: str
    image: str = ""
    labels: str = ""
    captions: tuple[str, ...] = ()
    segments: np.ndarray | None = None
    problem: BadSample | None = None
    parts: tuple[tuple[int, str], ...] = ()


class Listing(NamedTuple):
    """A split: entries in order, problems that belong to no entry, and what labels mean."""

    entries: tuple[Entry, ...]
    problems: tuple[BadSample, ...]
    classes: Classes | None
    rule: LabelRule | None


class Found(NamedTuple):
    """The picture files under a folder, by id."""

    prefix: str
    suffix: str
    names: dict[str, list[str]]

    def expected(self, key: str) -> str:
        """Returns the name that the file of an id should have."""
        return f"{self.prefix}{key}{self.suffix}"


def find(root: Path, folder: str, ending: str, *, suffix: str = "", needed: bool = True) -> Found:
    """Returns the picture files under a folder, hidden ones left out.

    Args:
      ending: the usual one; every ending of a picture is found.
      suffix: what file names have between the id and the ending; files without it are left out.
      needed: refuses to go on without the folder.
    """
    top = files.inside(root, folder)
    if needed and not top.is_dir():
        beside = sorted(p.name for p in top.parent.iterdir()) if top.parent.is_dir() else []
        raise UserError(
            f"ERROR [data] {top}: no such folder; the layout keeps files there"
            f"{f', and beside it there are: {chr(44).join(beside[:20])}' if beside else ''}. "
            "Check config.data.*.root, config.data.*.split and config.data.*.layout."
        )
    prefix = "" if folder == "." else f"{folder}/"
    found: dict[str, list[str]] = {}
    for where, below, names in os.walk(top):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            stem, kind = os.path.splitext(os.path.relpath(os.path.join(where, name), top))
            picture = kind.lower() in files.PICTURES and not name.startswith(".")
            if picture and stem.endswith(suffix):
                key = stem.removesuffix(suffix)
                found.setdefault(key, []).append(f"{prefix}{stem}{kind}")
    return Found(prefix, suffix + ending, found)


def lines_of(root: Path, name: str, remedy: str = "") -> list[str]:
    """Returns the ids of a split file, as they stand."""
    path = files.inside(root, name)
    if not path.exists():
        have = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise UserError(
            f"ERROR [data] {path}: no such split; there are: {', '.join(have) or 'none'}. "
            f"Check config.data.*.root and config.data.*.split.{remedy}"
        )
    return [line.strip() for line in files.read_text(path).splitlines() if line.strip()]


def listed(root: Path, names: Iterable[str], *found: Found) -> Iterable[str]:
    """Returns the ids of the first split file that is there, or else those of all files."""
    for name in names:
        if files.inside(root, name).exists():
            return lines_of(root, name)
    return set().union(*(files_by_id.names for files_by_id in found))


def optional(
    path: Path, reader: Callable[[Path], tuple[Captions, list[BadSample]]]
) -> tuple[Captions | None, tuple[BadSample, ...]]:
    """Reads a caption file if there is one; its ids lose file endings."""
    if not path.exists():
        return None, ()
    texts, problems = reader(path)
    pictures = files.PICTURES
    plain = {
        k.rsplit(".", 1)[0] if k.lower().endswith(pictures) else k: v for k, v in texts.items()
    }
    return plain, tuple(problems)


def pair(
    root: Path,
    ids: Iterable[str],
    images: Found | None,
    labels: Found | None,
    texts: Captions | None,
) -> tuple[Entry, ...]:
    """Joins images, labels and captions by id; what does not fit becomes the entry's problem.

    Args:
      images, labels: ``None`` where there are none to be had.
    """
    ids = sorted(ids)
    same = Counter(key.casefold() for key in ids)
    entries = []
    for key in dict.fromkeys(ids):
        try:
            if same[key.casefold()] > 1:
                equal = [k for k in ids if k.casefold() == key.casefold()]
                raise clash(root, equal, images or labels)
            entries.append(entry_of(root, key, images, labels, texts))
        except BadSample as problem:
            entries.append(Entry(key, problem=problem))
    return tuple(entries)


def entry_of(
    root: Path, key: str, images: Found | None, labels: Found | None, texts: Captions | None
) -> Entry:
    """Returns the entry of an id, or raises what is wrong with it."""
    files.check_name(root, key)
    image = "" if images is None else only(root, images, key, "image")
    mask = "" if labels is None else only(root, labels, key, "label file")
    if texts is not None and not texts.get(key):
        raise BadSample(
            str(root / (image or mask)),
            "has no caption",
            "where there is a caption file it has every id",
            "Add its caption, or remove the caption file to have captions made from the labels.",
        )
    return Entry(key, image, mask, (texts or {}).get(key, ()))


def only(root: Path, found: Found, key: str, what: str) -> str:
    """Returns the one file of an id, refusing none, several, and links out of the root."""
    names = found.names.get(key, [])
    if not names:
        raise files.missing(root / found.expected(key), f"{what} of id {key!r}")
    if len(names) > 1:
        raise BadSample(
            str(root / names[0]),
            f"id {key!r} has {len(names)} files: {', '.join(sorted(names))}",
            f"one {what} per id",
            "Remove or rename all but one.",
        )
    files.inside(root, names[0])
    return names[0]


def clash(root: Path, keys: list[str], found: Found) -> BadSample:
    """Returns the complaint about ids that are equal, or equal but for case."""
    paths = [name for key in dict.fromkeys(keys) for name in found.names.get(key, [key])]
    return BadSample(
        str(root / paths[0]),
        f"ids {', '.join(map(repr, keys))} are the same or differ by case only "
        f"({', '.join(paths)})",
        "ids differ on every file system",
        "Rename or remove all but one.",
    )

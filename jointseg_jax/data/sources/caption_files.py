"""Where the captions of a split are: the layout's own file, or one under a usual name.

| file | contents |
|---|---|
| captions/SPLIT.jsonl, captions/SPLIT.json | of the split |
| captions.jsonl, captions.json in the root | of all splits: ids as they are, or SPLIT/ID |
| metadata.jsonl beside the images, in any of their folders | file names relative to it |
| ID.txt beside the image, or captions/SPLIT/ID.txt | a caption a line |

One of these rows is used; captions in two of them are refused, and so is a file that nearly has
such a name, for captions made from the labels would take its place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from jointseg_jax.data import captions, files
from jointseg_jax.data.captions import Captions
from jointseg_jax.data.records import BadSample

Reader = Callable[[Path], tuple[Captions, list[BadSample]]]

USUAL = "captions/{split}.jsonl, captions/{split}.json, captions.jsonl, metadata.jsonl or ID.txt"
ENDINGS = (".jsonl", ".json")
NEARLY = (".json1", ".jsonlines", ".ndjson", ".csv", ".tsv", ".txt", ".yaml", ".yml", ".parquet")
"""Endings of caption files that are not read, where the rest of the name is that of one."""


class FoundCaptions(NamedTuple):
    """The captions of a split."""

    texts: Captions | None  # by id; None: there are none
    problems: tuple[BadSample, ...] = ()
    complete: bool = True  # one file has all of them: an id that it leaves out is a problem


NO_CAPTIONS = FoundCaptions(None)


def read_any(path: Path) -> tuple[Captions, list[BadSample]]:
    """Reads a caption file by its ending."""
    reader = captions.read_lines if path.suffix == ".jsonl" else captions.read_mapping
    return reader(path)


def captions_of(
    root: Path,
    split: str,
    pictures: str,
    ids: Collection[str],
    own: str = "",
    reader: Reader = read_any,
) -> FoundCaptions:
    """Returns the captions of a split.

    Args:
      split: its name; empty for one folder without splits.
      pictures: the folder of its images.
      ids: those of its images.
      own: the file that the layout keeps them in, which goes before the others.
      reader: of that file.
    """
    if own and (path := files.inside(root, own)).exists():
        texts, problems = reader(path)
        return FoundCaptions(by_id(texts), tuple(problems))
    names = [f"captions{e}" for e in ENDINGS] + [f"captions/{split}{e}" for e in ENDINGS if split]
    single = [name for name in names if files.inside(root, name).exists()]
    beside = [pictures, f"captions/{split}"] if split else [pictures]
    tables = [name for _, name in files_beside(root, pictures) if _is_table(name)]
    texts_of_ids = {
        name: key
        for folder in beside
        for key, name in files_beside(root, folder)
        if not _is_table(name) and key in ids
    }
    rows = [*single, *tables[:1], *list(texts_of_ids)[:1]]
    if len(rows) > 1:
        rule, remedy = "one of them is used", "Remove or join the others."
        raise BadSample(str(root), f"captions in {' and in '.join(rows)}", rule, remedy)
    nearly = tuple(near_misses(root, split, pictures)) if not rows else ()
    if single:
        texts, problems = read_any(files.inside(root, single[0]))
        return FoundCaptions(by_id(texts, f"{pictures}/", f"{split}/"), tuple(problems))
    if tables:
        return of_tables(root, pictures, tables)
    found = of_texts(root, texts_of_ids)
    return found._replace(problems=(*found.problems, *nearly))


def by_id(texts: Captions, *prefixes: str) -> Captions:
    """Returns captions by id: keys lose endings of pictures, and the first of these prefixes."""
    found: Captions = {}
    for key, lines in texts.items():
        name = files.one_name(key)
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        name = name.removeprefix(prefix)
        name = name.rsplit(".", 1)[0] if name.lower().endswith(files.PICTURES) else name
        found[name] = (*found.get(name, ()), *lines)
    return found


def _is_table(name: str) -> bool:
    return os.path.basename(name) == "metadata.jsonl"


def files_beside(root: Path, folder: str) -> Iterator[tuple[str, str]]:
    """Yields the files of a folder that may hold captions: name without ending, and path."""
    top = files.inside(root, folder)
    for name in files.walk(root, top) if top.is_dir() else ():
        # Links that lead nowhere are named where the pictures are listed.
        if isinstance(name, str) and (_is_table(name) or name.endswith(".txt")):
            yield files.one_name(os.path.splitext(name)[0]), f"{folder}/{name}"


def of_tables(root: Path, pictures: str, names: list[str]) -> FoundCaptions:
    """Reads every ``metadata.jsonl`` under the images."""
    texts: Captions = {}
    problems: list[BadSample] = []
    for name in names:
        found, wrong = captions.read_lines(files.inside(root, name))
        folder = os.path.dirname(name).removeprefix(pictures).lstrip("/")
        texts |= {f"{folder}/{key}" if folder else key: lines for key, lines in found.items()}
        problems += wrong
    return FoundCaptions(by_id(texts), tuple(problems))


def of_texts(root: Path, ids: Mapping[str, str]) -> FoundCaptions:
    """Reads a text file per image (path -> id), a caption a line; empty ones have none."""
    entries: list[tuple[str, object, str] | BadSample] = []
    for name, key in ids.items():
        path = files.inside(root, name)
        try:
            lines = files.lines(files.read_text(path))
            entries += [(key, line, f"{path}:{number}") for number, line in lines]
        except BadSample as problem:
            entries.append(problem)
    texts, problems = captions.gather(entries)
    return FoundCaptions(texts if ids else None, tuple(problems), complete=False)


def near_misses(root: Path, split: str, pictures: str) -> Iterator[BadSample]:
    """Yields the files that look like captions and are not read."""
    names = ("captions", "caption")
    places = {"": names, "captions": (split, *names), pictures: (*names, "metadata")}
    for folder, stems in places.items():
        top = files.inside(root, folder) if folder else root
        for path in sorted(top.iterdir()) if top.is_dir() else ():
            stem, ending = os.path.splitext(path.name.lower())
            usual = ending in ENDINGS and (stem, folder) != ("captions", "")
            if stem in stems and (usual or ending in NEARLY) and path.is_file():
                rule = f"captions are in {USUAL.format(split=split)}"
                remedy = "Rename or convert it, or move it out of the folder."
                found = "looks like captions and is under no name that is read"
                yield BadSample(str(path), found, rule, remedy)

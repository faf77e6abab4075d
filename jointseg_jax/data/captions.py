"""Captions: read from the files data sets keep them in, cleaned, or made from the labels.

| file | contents |
|---|---|
| ``*.jsonl`` | one ``{"id": ..., "caption": ...}`` a line; an id may come several times |
| ``*.json`` | ``{id: caption}`` or ``{id: [caption, ...]}`` |
| COCO ``captions_*.json`` | ``annotations``: ``{"image_id": ..., "caption": ...}`` |

``file_name`` and ``text`` are other names of the two, and a caption may be a list of them.

Cleaning keeps every script, emoji and writing direction. It removes control characters (NUL among
them), joins white space, and refuses captions that are empty or absurdly long.

A record without any caption gets ``a picture of`` its class names, in descending area.
"""

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Int16

from jointseg_jax.data import files
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import BadSample, Record, check_record
from jointseg_jax.data.tokenizer import split

LONGEST = 4096
PREFIX = "a picture of"

Captions = dict[str, tuple[str, ...]]


def clean(text: object, where: str) -> str:
    """Returns the caption without control characters and with single blanks."""
    if not isinstance(text, str):
        raise BadSample(where, f"a caption of type {type(text).__name__}", "text", "Fix the file.")
    # Cc: control characters. Cf stays: it joins emoji and turns the writing direction.
    kept = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    # NFC: the same word, typed with combining accents or without, is the same text.
    words = " ".join(unicodedata.normalize("NFC", kept).split())
    if not words:
        raise BadSample(where, "an empty caption", "words", "Write a caption, or drop the entry.")
    if len(words) > LONGEST:
        found = f"a caption of {len(words)} characters, starting {words[:40]!r}"
        raise BadSample(where, found, f"at most {LONGEST}", "Check that it is a caption at all.")
    return words


def read_lines(path: Path) -> tuple[Captions, list[BadSample]]:
    """Reads a ``.jsonl`` file; returns the captions by id, and a problem for each bad line."""
    # Bytes, not text: one line that is not UTF-8 must not cost the others.
    data = files.read(path)
    files.refuse_utf16(data, str(path))  # once, instead of a problem for each line
    lines = enumerate(data.split(b"\n"), 1)
    rows = (_line(path, number, line) for number, line in lines if line.strip())
    return gather(entry for row in rows for entry in row)


def read_mapping(path: Path) -> tuple[Captions, list[BadSample]]:
    """Reads a ``.json`` file of captions by id."""
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise BadSample(str(path), f"a {type(content).__name__}", "{id: caption}", "Fix the file.")
    pairs = ((k, t) for k, v in content.items() for t in (v if isinstance(v, list) else [v]))
    return gather((key, text, f"{path}: {key}") for key, text in pairs)


def read_coco(path: Path) -> tuple[Captions, list[BadSample]]:
    """Reads a COCO caption file; keys are image ids as text."""
    content = cast(dict, files.read_json(path))
    try:
        pairs = [(str(a["image_id"]), a["caption"]) for a in content["annotations"]]
    except (TypeError, KeyError) as error:
        found = f"no {error} in it"
        raise BadSample(str(path), found, "a COCO caption file", "Replace the file.") from None
    return gather((key, text, f"{path}: image {key}") for key, text in pairs)


def gather(
    entries: Iterable[tuple[str, object, str] | BadSample],
) -> tuple[Captions, list[BadSample]]:
    """Returns captions by id, and the problems, of entries (id, caption, location)."""
    captions: Captions = {}
    problems = []
    for entry in entries:
        try:
            if isinstance(entry, BadSample):
                raise entry
            key, text, where = entry
            # ``clean`` raises first: an id whose captions are all bad must not be there at all.
            captions[key] = (*captions.get(key, ()), clean(text, where))
        except BadSample as error:
            problems.append(error)
    return captions, problems


IDS = ("id", "file_name", "image_file_name", "image")
TEXTS = ("caption", "captions", "text")
"""Keys of a line under which ids and captions are found, the first one that is there."""


def _line(path: Path, number: int, data: bytes) -> list[tuple[str, object, str]] | list[BadSample]:
    """Returns id, caption and location for each caption of a line, or what is wrong with it."""
    where = f"{path}:{number}"
    try:
        content = json.loads(data.decode("utf-8").lstrip(files.MARK))
        key = next(str(content[name]) for name in IDS if name in content)
        text = next(content[name] for name in TEXTS if name in content)
        return [(key, each, where) for each in (text if isinstance(text, list) else [text])]
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} is not UTF-8"
    except json.JSONDecodeError as error:
        found = f"not JSON ({error.msg})"
    except (StopIteration, TypeError):
        found = "no 'id' or no 'caption' in it"
    return [BadSample(where, found, 'lines are {"id": ..., "caption": ...} in UTF-8', "Fix it.")]


def describe(labels: Int16[np.ndarray, "height width"], classes: Classes) -> str:
    """Returns the caption made from labels: class names in descending area."""
    areas = np.bincount(labels[labels >= 0].ravel(), minlength=len(classes))
    # Stable: of equal areas the smaller class index comes first.
    present = [c for c in np.argsort(-areas, kind="stable") if areas[c]]
    return f"{PREFIX} {', '.join(classes.names[c] for c in present) or 'nothing'}"


def completed(record: Record, segments: np.ndarray | None, classes: Classes, where: str) -> Record:
    """Returns a checked record with its segments, if any, and a caption where it has none."""
    if not record["captions"]:
        record["captions"] = (describe(record["labels"], classes),)
    if segments is not None:
        record["segments"] = segments
    check_record(record, classes, where)
    return record


def words_of(captions: Iterable[str]) -> set[str]:
    """Returns the different words of some captions."""
    return {word for caption in captions for word in split(caption)}


def described_words(classes: Classes) -> set[str]:
    """Returns every word that ``describe`` can write."""
    return words_of((PREFIX, "nothing", *classes.names))

"""JSON lines: one object a line, appended in one piece, readable after a kill.

A process that dies while it writes leaves at most one torn line, at the end. A reader either skips
every line that is no object (``read``: each line stands for itself) or stops at the first one
(``read_until_damaged``: the order counts).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""One parsed line; the values are whatever JSON holds."""


def line(record: Mapping[str, object], *, ascii_only: bool = True, allow_nan: bool = True) -> bytes:
    """``record`` as one line with its newline.

    Raises:
      ValueError: without ``allow_nan``, a NaN or an infinity, which other JSON readers refuse.
    """
    text = json.dumps(record, ensure_ascii=ascii_only, allow_nan=allow_nan)
    return (text + "\n").encode()


def parse(text: bytes) -> Record | None:
    """The object that a line holds; None if it is torn or holds anything else."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # neither JSON nor UTF-8, or brackets without an end
        return None
    return record if isinstance(record, dict) else None


def read(path: str | os.PathLike) -> list[Record]:
    """Every line that is an object, in order; the others are skipped."""
    records = map(parse, Path(path).read_bytes().splitlines())
    return [record for record in records if record is not None]


def read_until_damaged(path: str | os.PathLike) -> Iterator[Record]:
    """Yields the lines up to the first that is torn or no object."""
    # not splitlines(): a text may hold what Unicode calls a line break, and the last line only
    # counts with its newline
    *whole, _ = Path(path).read_bytes().split(b"\n")
    for text in whole:
        record = parse(text)
        if record is None:
            return
        yield record


def append(path: str | os.PathLike, record: Mapping[str, object]) -> None:
    """Adds one line in one write; a torn line before it is ended first, so it alone is lost."""
    text = line(record)
    with Path(path).open("ab+", buffering=0) as file:  # unbuffered: one system call per line
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else b"\n" + text
        file.write(text)


def cut_torn_tail(path: Path) -> int:
    """Truncates the file after its last whole object; returns the number of bytes removed."""
    data = path.read_bytes() if path.exists() else b""
    end = len(data)
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        # without its newline even a whole object goes: the next line would be joined to it
        if data[end - 1 : end] == b"\n" and parse(data[start:end]) is not None:
            break
        end = start
    if end < len(data):
        os.truncate(path, end)
    return len(data) - end


def clock(seconds: float) -> str:
    """``0:12:33``: hours, minutes and seconds, rounded."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def duration(seconds: float) -> str:
    """``3.2 s``, ``4:05 min`` or ``12:04:05 h``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if round(seconds) >= 3600:
        return f"{clock(seconds)} h"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min"

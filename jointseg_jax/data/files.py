"""Files of a data set folder: found inside their root, opened only when regular.

Lists and manifests are not trusted. A name that is absolute, climbs with ``..`` or follows a link
out of the root is refused before it is opened, and so is anything that is not a regular file (a
FIFO would block the run, a device could do worse).

A file may have rotted into another valid picture, which no decoder can tell. Where the folder has a
list of SHA-256 sums, as ``sha256sum`` writes them, every file in it is compared with it when it is
read; others are taken as they are. To make one:

  cd ROOT && find images annotations -type f -exec sha256sum {} + > SHA256SUMS
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from jointseg_jax.data.records import BadSample
from jointseg_jax.types import UserError

PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""File name endings of images, in lower case."""

OTHER_PICTURES = (
    *(".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".apng", ".psd", ".tga", ".ppm"),
    *(".pgm", ".pnm", ".svg", ".exr", ".hdr", ".dds", ".ico", ".dng", ".cr2", ".nef", ".arw"),
)
"""Endings of pictures that are not read: a data set with such a file is told so."""

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
"""A line of ``sha256sum``: the sum, and the name after a blank (text) or a star (binary)."""


class SizeAndSum(TypedDict):
    """What tells a file from others, as manifests keep it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Files:
    """Reads files from inside a folder only, and compares them with the folder's SHA-256 sums."""

    root: Path
    sums: Mapping[str, str] = field(default_factory=dict, repr=False)  # by name, in lower case

    @classmethod
    def of(cls, root: Path) -> Files:
        """Returns the files of a folder, with its list of sums if it has one."""
        path = inside(root, SUMS)
        return cls(root, read_sums(path) if path.exists() else {})

    def read(self, name: str) -> tuple[Path, bytes]:
        """Returns the path and the bytes of a file; BadSample if it is not what the list says."""
        path = inside(self.root, name)
        data = read(path)
        wanted = self.sums.get(name)
        if wanted is not None and (actual := hashlib.sha256(data).hexdigest()) != wanted:
            found = f"the contents have changed (SHA-256 {actual[:12]}...)"
            remedy = f"Copy the file again from its source, or fix its line in {SUMS}."
            raise BadSample(str(path), found, f"{SUMS} says {wanted[:12]}...", remedy)
        return path, data


def read_sums(path: Path) -> dict[str, str]:
    """Returns the sum of each name in a list that ``sha256sum`` wrote."""
    sums = {}
    for number, line in lines(read_text(path)):
        match = LINE.fullmatch(line)
        if match is None:
            rule = "lines are 64 hexadecimal digits, two spaces and a name"
            remedy = "Write the list again with sha256sum, or remove it."
            found = f"{line[:60]!r} is no sum of a file"
            raise BadSample(f"{path}:{number}", found, rule, remedy)
        sums[match[2]] = match[1].lower()
    return sums


def check_name(root: Path, name: str) -> None:
    """Raises BadSample for a name that is absolute or climbs out of ``root``."""
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        found, rule = "the name leaves the data set folder", "names are relative, without '..'"
        raise BadSample(f"{root}: {name!r}", found, rule, "Fix the list or manifest that holds it.")


def inside(root: Path, name: str) -> Path:
    """Returns the path of ``name`` under ``root``; BadSample for one that leads out of it."""
    check_name(root, name)
    path = f"{root}/{name}"
    # Links are followed to their end: a link within the folder is fine, one out of it is not.
    real = os.path.realpath(path)
    if real != _real(root) and not real.startswith(_real(root) + os.sep):
        raise outside(path, real, root)
    return Path(path)


@functools.cache
def _real(root: Path) -> str:
    return os.path.realpath(root)


def one_name(text: str) -> str:
    """Returns a name in Unicode's composed form (NFC); macOS hands out names decomposed."""
    return unicodedata.normalize("NFC", text)


def walk(root: Path, top: Path) -> Iterator[str | BadSample]:
    """Yields the names of all files under ``top``, relative to it, sorted within their folder.

    Hidden files and folders are left out. Links to folders are entered where they stay inside
    ``root``; one that does not, leads nowhere or back into itself is yielded as a problem, and so
    is a folder that cannot be read.
    """
    yield from _below(root, top, "", (os.path.realpath(top),))


def _below(root: Path, top: Path, folder: str, above: tuple[str, ...]) -> Iterator[str | BadSample]:
    try:
        with os.scandir(top / folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError as error:
        found, remedy = f"cannot be read ({error.strerror})", "Check its permissions and the disk."
        yield BadSample(str(top / folder), found, "folders can be read", remedy)
        return
    for entry in entries:
        name = f"{folder}{entry.name}"
        if entry.name.startswith("."):
            continue
        linked = entry.is_symlink() and not entry.is_file()
        if linked and (problem := _wrong_link(root, top / name, above)) is not None:
            yield problem
        elif entry.is_dir():
            yield from _below(root, top, f"{name}/", (*above, os.path.realpath(entry.path)))
        else:
            yield name


def _wrong_link(root: Path, path: Path, above: Sequence[str]) -> BadSample | None:
    """Returns why a link that is no link to a file is not followed; None if it can be."""
    real = os.path.realpath(path)
    if not os.path.exists(real):
        remedy = "Restore what it leads to, or remove the link."
        return BadSample(str(path), f"a link to {real}", "which does not exist", remedy)
    if real != _real(root) and not real.startswith(_real(root) + os.sep):
        return outside(path, real, root)
    parent = os.path.realpath(path.parent)
    if real in above or (parent + os.sep).startswith(real + os.sep):
        rule = "which holds the link itself"
        return BadSample(str(path), f"a link to {real}", rule, "Remove the link.")
    return None


def outside(path: Path | str, real: str, root: Path) -> BadSample:
    """Returns the problem of a link out of ``root``."""
    remedy = "Copy it into the folder, or make the root the folder that holds both."
    return BadSample(str(path), f"a link to {real}", f"files lie inside {root}", remedy)


def require_sizes(
    root: Path, written: Iterable[tuple[Path, int]], *, what: str, remedy: str
) -> None:
    """Refuses files that are missing or of another size than was written, all of them at once.

    Args:
      written: files and their bytes.
      what: the plural noun for them in the message.
      remedy: what the user can do, as the last sentences of the message.
    """
    written = list(written)
    sizes = [path.stat().st_size if path.is_file() else None for path, _ in written]
    problems = [
        f"ERROR [data] {path}: {'missing' if size is None else f'{size} bytes'}; {wanted} bytes "
        "were written."
        for (path, wanted), size in zip(written, sizes)
        if size != wanted
    ]
    if problems:
        head = f"ERROR [data] {root}: {len(problems)} of {len(written)} {what} are not as written."
        raise UserError("\n".join([*problems, f"{head} {remedy}"]))


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> bytes:
    """Returns the bytes of a regular file, or raises BadSample."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            rule, remedy = "a file that can be read", "Remove or replace it."
            raise BadSample(str(path), "not a regular file", rule, remedy)
        # Non-blocking, in case a FIFO has taken the place of the file since.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
        raise BadSample(str(path), found, "a readable file", "Check the disk.") from error


def unreadable(path: str, *, file: bool = False) -> str:
    """Returns why a folder (or file) cannot be read; empty if it can."""
    if "://" in path:
        return (
            "is in a bucket, and data are read from folders of this machine. Mount it (gcsfuse), "
            'or copy it: pip install gcsfs, then python -c "import gcsfs; '
            f"gcsfs.GCSFileSystem().get('{path.partition('://')[2]}', 'DIR', recursive=True)\""
        )
    kind = "file" if file else "folder"
    try:
        os.stat(path)
    except FileNotFoundError:
        return f"there is no such {kind}"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if Path(path).is_file() != file:
        return f"is no {kind}"
    return "" if os.access(path, os.R_OK) else "cannot be read (permissions)"


def missing(path: Path, what: str = "file") -> BadSample:
    """Returns the problem that ``path`` does not exist."""
    rule = "every id needs its image and its labels"
    remedy = "Restore the file, or take its id out of the split."
    return BadSample(str(path), f"the {what} is missing", rule, remedy)


MARK = "\ufeff"
"""The byte order mark, which editors on Windows put before UTF-8 text."""


UTF8 = "text files are UTF-8"


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark."""
    return decoded(read(path), str(path))


def decoded(data: bytes, where: str) -> str:
    """Returns UTF-8 text without a byte order mark; BadSample for any other encoding."""
    refuse_utf16(data, where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise BadSample(f"{where}:{line}", found, UTF8, "Save the file as UTF-8.") from None


def refuse_utf16(data: bytes, where: str) -> None:
    """Raises BadSample for text in UTF-16."""
    # By its mark, or by a zero in the first two bytes, which no text has: UTF-16 of Latin letters
    # without a mark is valid UTF-8.
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:2]:
        remedy = "Save the file as UTF-8 (in PowerShell: Out-File -Encoding utf8, not `>`)."
        raise BadSample(where, "is UTF-16 text", UTF8, remedy)


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields the lines that hold something, stripped, with their numbers."""
    for number, line in enumerate(text.splitlines(), 1):
        # Also within the text: files that were joined have a mark where each of them began.
        if stripped := line.strip().strip(MARK).strip():
            yield number, stripped


def read_json(path: Path) -> object:
    """Returns the contents of a JSON file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        where, found = f"{path}:{error.lineno}", f"not JSON ({error.msg})"
        raise BadSample(where, found, "a JSON file", "Fix the line.") from None


def temporary(path: Path) -> Path:
    """Returns the name under which ``path`` is written until ``publish`` renames it."""
    return path.with_name(path.name + ".tmp")


def publish(path: Path) -> None:
    """Gives the written ``temporary(path)`` its name, durably."""
    # Synced before the rename: after a power cut the name must not stand for half a file.
    with open(temporary(path), "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary(path), path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name itself
    finally:
        os.close(folder)


def short_sum(text: str) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a text, for fingerprints."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def size_and_sum(path: Path) -> SizeAndSum:
    """Returns the size in bytes and the SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: temporary file, fsync, rename."""
    temporary(path).write_bytes(data)
    publish(path)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes JSON as people read it."""
    write(path, json.dumps(content, indent=1, ensure_ascii=False).encode())

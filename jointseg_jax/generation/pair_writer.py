"""Pairs on disk: PNG files and one manifest line each, written so that nothing is half there.

| file | what |
|---|---|
| ``images/ID.png`` | the image |
| ``annotations/ID.png`` | palette PNG whose pixels are class indices, 255 for void |
| ``panoptic/ID.png`` | of panoptic results: RGB PNG of segment ids (``data/segments.py``) |
| ``overlay/ID.png``, ``confidence/ID.png`` | if asked for: labels over the image; 255 = certain |
| ``manifest.jsonl`` | a line per pair, in index order |
| ``settings.json`` | everything that the pairs depend on |

The line of a panoptic pair has its COCO ``segments_info``, ``category_id`` being the class index.
A file appears by rename, and a manifest line follows its files. Nothing written depends on the
clock or the machine, so an interrupted run ends with the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jointseg_jax import jsonl
from jointseg_jax.annotations import viz
from jointseg_jax.data import files
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.images import encode_segment_ids
from jointseg_jax.data.segments import listed
from jointseg_jax.generation.pair_names import same_file
from jointseg_jax.types import FILE_VOID, VOID, UserError


class PairWriter:
    """Appends pairs to a folder, which may hold some already.

    Args:
      settings: everything the pairs depend on; another run into the same folder must agree.
      lines: False for a process that only writes the files of pairs, and not the manifest.
    """

    def __init__(
        self, folder: Path, classes: Classes, settings: Mapping[str, object], *, lines: bool = True
    ):
        self.folder, self.classes = folder, classes
        self.lines: list[dict[str, Any]] = []
        """Of the manifest, one for each pair that is done."""
        self.kept: dict[int, dict[str, Any]] = {}
        """By index, lines of whole pairs that come after one that is not whole. They are listed
        again when their turn has come, so that their files need not be made again."""
        self._names: dict[str, int] = {}  # the index that a name belongs to
        self._manifest = folder / "manifest.jsonl"
        if not lines:
            if not (folder / "settings.json").exists():
                raise UserError(
                    f"{folder}: what the first process wrote there is not seen by the others; "
                    "choose an --out on a file system that all of them share."
                )
            return
        with self.explained():
            for name in ("images", "annotations"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            check_settings(folder / "settings.json", settings)
            self.lines, self.kept = self._verified()
            for line in (*self.lines, *self.kept.values()):
                self._names[same_file(str(line.get("id")))] = line["index"]
            # cuts off what is torn or damaged; leaves the file alone where nothing is
            text = b"".join(jsonl.line(line, ascii_only=False) for line in self.lines)
            if not self._manifest.exists() or self._manifest.read_bytes() != text:
                files.write(self._manifest, text)

    @property
    def done(self) -> int:
        """Number of pairs that are listed: these need not be made again."""
        return len(self.lines)

    def write(self, index: int, *pair: Any, **options: Any) -> None:
        """Writes pair ``index``, the next one in order; arguments as of ``files``."""
        self._advance_to(index)
        self.append(self.files(index, *pair, **options))

    def files(
        self,
        index: int,
        prompt: str,
        image: np.ndarray,
        labels: np.ndarray,
        fields: Mapping[str, object],
        segments: np.ndarray | None = None,
        *,
        name: str | None = None,
        extra_images: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, Any]:
        """Writes the files of pair ``index``, in any order; returns its manifest line.

        Args:
          image: [height, width, 3] uint8.
          labels: [height, width], VOID where nothing is annotated.
          fields: what else its manifest line says.
          segments: [height, width] instance numbers, if it has any.
          name: its ID, with folders if it holds "/"; the index in eight digits when not given.
          extra_images: further uint8 pictures by the name of their folder.
        """
        name = name or f"{index:08d}"
        if (owner := self._names.setdefault(same_file(name), index)) != index:
            raise ValueError(
                f"pairs {owner} and {index} are both named {name!r}; names differ, and not by "
                "case or Unicode form only."
            )
        # The order of contents and fields is that of the line's keys, hence of the file's bytes.
        contents = {
            "image": (f"images/{name}.png", viz.png_bytes(image)),
            "annotation": (f"annotations/{name}.png", viz.palette_png_bytes(labels, self.classes)),
        }
        line: dict[str, Any] = {"id": name, "index": index, "prompt": prompt, **fields}
        line |= {"height": int(labels.shape[0]), "width": int(labels.shape[1])}
        for folder, picture in (extra_images or {}).items():
            contents[folder] = (f"{folder}/{name}.png", viz.png_bytes(picture))
        if segments is not None:
            ids, line["segments_info"] = listed(labels, segments, self.classes)
            contents["panoptic"] = (f"panoptic/{name}.png", encode_segment_ids(ids))
        for key, (path, data) in contents.items():
            with self.explained(self.folder / path, len(data)):
                (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
                files.write(self.folder / path, data)
            line |= {key: path, key + "_sha256": hashlib.sha256(data).hexdigest()}
        return line

    def close(self) -> None:
        """Flushes the manifest to disk."""
        self._list_kept()
        with self.explained(), self._manifest.open("a") as file:
            os.fsync(file.fileno())

    def append(self, line: Mapping[str, object]) -> None:
        """Adds the next pair to the manifest; its files must be there."""
        self._advance_to(line["index"])
        self._add_line(line)

    def _list_kept(self) -> None:
        while self.done in self.kept:  # their turn has come
            self._add_line(self.kept[self.done])

    def _add_line(self, line: Mapping[str, object]) -> None:
        text = jsonl.line(line, ascii_only=False)
        with self.explained(self._manifest, len(text)), self._manifest.open("ab") as file:
            file.write(text)
        self.lines.append(dict(line))
        self._names[same_file(str(line["id"]))] = self.done - 1

    @contextlib.contextmanager
    def explained(self, path: Path | None = None, size: int = 0) -> Iterator[None]:
        """Turns an error of the file system into a message a user can act on."""
        try:
            yield
        except OSError as error:
            if path is not None:
                # What is half there would keep the disk full.
                with contextlib.suppress(OSError):
                    path.with_name(path.name + ".tmp").unlink()
            reason = f"cannot be written ({error.strerror or error})"
            remedy = "Choose another --out, or mend its permissions"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                free = shutil.disk_usage(self.folder).free
                reason += f": {size} bytes needed, {free} free"
                remedy = "Free some space"
            raise UserError(
                f"ERROR [generation] {path or self.folder}: {reason}. {remedy}; the pairs listed "
                f"in {self._manifest.name} are whole, and the same command goes on from them."
            ) from error

    def _advance_to(self, index: object) -> None:
        self._list_kept()
        if index != self.done:
            raise ValueError(f"pair {index} out of order; {self.done} is next.")

    def _verified(self) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
        """Returns the manifest's lines up to the first pair that is not whole; those after it.

        A line that is torn or out of order ends the manifest. A pair with the name of one before
        it, whose files it shares, is made again: under a name of its own.
        """
        saved = jsonl.read_until_damaged(self._manifest) if self._manifest.exists() else ()
        lines, kept, names = [], {}, set()
        for index, line in enumerate(saved):
            if line.get("index") != index:
                break
            name = same_file(str(line.get("id")))
            if name not in names and self._is_whole(line):
                kept[index] = line
            names.add(name)
        while len(lines) in kept:
            lines.append(kept.pop(len(lines)))
        return lines, kept

    def _is_whole(self, line: Mapping[str, object]) -> bool:
        """True if all files of a line are there with the bytes that it says."""
        if isinstance(line.get("rejected"), str):
            return True
        for key in (k.removesuffix("_sha256") for k in line if k.endswith("_sha256")):
            name = line.get(key)
            if not isinstance(name, str) or "\0" in name:
                return False
            path = self.folder / name
            # A manifest may come from somebody else: what it names elsewhere must not even be read.
            if not path.resolve().is_relative_to(self.folder.resolve()) or not path.is_file():
                return False
            if hashlib.sha256(path.read_bytes()).hexdigest() != line[key + "_sha256"]:
                return False
        return {"image_sha256", "annotation_sha256"} <= line.keys()


def rejected(
    index: int, prompt: str, fields: Mapping[str, object], reason: str, name: str | None = None
) -> dict[str, Any]:
    """The manifest line of pair ``index``, which a filter rejects: it has no files."""
    name = name or f"{index:08d}"
    return {"id": name, "index": index, "prompt": prompt, **fields, "rejected": reason}


def read_mask(path: Path) -> np.ndarray:
    """Reads a written annotation: [height, width] int16 labels, VOID where the file says 255."""
    values = np.asarray(Image.open(path)).astype(np.int16)
    return np.where(values == FILE_VOID, VOID, values).astype(np.int16)


def check_settings(path: Path, settings: Mapping[str, object]) -> None:
    """Writes the settings, or refuses other ones than those the folder was made with.

    Raises:
      UserError: they differ, or what is there is not readable.
    """
    if not path.exists():
        files.write(path, (json.dumps(settings, indent=1) + "\n").encode())
        return
    saved = jsonl.parse(path.read_bytes())
    if saved is None:
        raise UserError(
            f"{path}: damaged; the settings that these pairs were made with cannot be read. Put "
            "the file back from a copy, or choose another --out."
        )
    keys = [k for k in sorted({*saved, *settings}) if saved.get(k) != settings.get(k)]
    if keys:
        changes = "; ".join(f"{k}: {saved.get(k)} -> {settings.get(k)}" for k in keys)
        raise UserError(
            f"{path.parent}: made with other settings: {changes}. "
            "Give the same settings to go on, or another --out."
        )

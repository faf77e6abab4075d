"""Pairs on disk: PNG files and one manifest line each, written so that nothing is half there.

``OUT/images/ID.png``, ``OUT/annotations/ID.png`` (palette PNG whose pixels are class indices, 255
for void), ``OUT/manifest.jsonl`` in index order; if asked for, ``OUT/overlay/ID.png`` (the labels
over the image) and ``OUT/confidence/ID.png`` (grey, 255 = certain). Of panoptic results also
``OUT/panoptic/ID.png`` (RGB PNG of segment ids, ``data/segments.py``), whose COCO ``segments_info``
stands in the manifest line, ``category_id`` being the class index. A file appears by rename; a
manifest line follows its files; a torn last line is cut off when a run goes on. Nothing written
depends on the clock or the machine, so an interrupted run ends with the same bytes as one that was
not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jointseg_jax import pictures
from jointseg_jax.data import files
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.images import encode_segment_ids
from jointseg_jax.data.segments import listed
from jointseg_jax.types import UserError


class PairWriter:
    """Appends pairs to a folder; ``done`` says how many are there and whole.

    Args:
      settings: everything the pairs depend on; another run into the same folder must agree.
      lines: of a process that only makes the ``files`` of pairs: their manifest is another's.
    """

    def __init__(
        self, folder: Path, classes: Classes, settings: Mapping[str, Any], *, lines: bool = True
    ):
        self.folder, self.classes = folder, classes
        if not lines:
            if not (folder / "settings.json").exists():
                raise UserError(
                    f"{folder}: what the first process wrote there is not seen by the others; "
                    "choose an --out on a file system that all of them share."
                )
            return
        for name in ("images", "annotations"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        _agree(folder / "settings.json", settings)
        self._manifest = folder / "manifest.jsonl"
        self.lines = self._verified()
        self._rewrite_manifest()

    @property
    def done(self) -> int:
        """Pairs that need not be made again."""
        return len(self.lines)

    def write(
        self,
        index: int,
        prompt: str,
        image: np.ndarray,
        labels: np.ndarray,
        facts: Mapping[str, Any],
        segments: np.ndarray | None = None,
        *,
        name: str | None = None,
        more: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Writes pair ``index``, the next one in order; as ``files``, then ``append``."""
        self._require_next(index)
        self.append(self.files(index, prompt, image, labels, facts, segments, name=name, more=more))

    def files(
        self,
        index: int,
        prompt: str,
        image: np.ndarray,
        labels: np.ndarray,
        facts: Mapping[str, Any],
        segments: np.ndarray | None = None,
        *,
        name: str | None = None,
        more: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, Any]:
        """Writes the files of pair ``index``, in any order; returns its manifest line.

        Args:
          facts: what else its manifest line says.
          segments: instance numbers, if it has any.
          name: its ID, with folders if it holds "/"; the index in eight digits when not given.
          more: further uint8 pictures by the name of their folder.
        """
        name = name or f"{index:08d}"
        contents = {
            "image": (f"images/{name}.png", pictures.png_bytes(image)),
            "annotation": (
                f"annotations/{name}.png",
                pictures.palette_png_bytes(labels, self.classes),
            ),
        }
        line: dict[str, Any] = {"id": name, "index": index, "prompt": prompt, **facts}
        line |= {"height": int(labels.shape[0]), "width": int(labels.shape[1])}
        for folder, picture in (more or {}).items():
            contents[folder] = (f"{folder}/{name}.png", pictures.png_bytes(picture))
        if segments is not None:
            ids, line["segments_info"] = listed(labels, segments, self.classes)
            contents["panoptic"] = (f"panoptic/{name}.png", encode_segment_ids(ids))
        for key, (path, data) in contents.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            files.write(self.folder / path, data)
            line |= {key: path, key + "_sha256": hashlib.sha256(data).hexdigest()}
        return line

    def close(self) -> None:
        """Flushes the manifest to disk."""
        with self._manifest.open("a") as file:
            os.fsync(file.fileno())

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds the next pair to the manifest, its files being there."""
        self._require_next(line["index"])
        with self._manifest.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.lines.append(dict(line))

    def _require_next(self, index: int) -> None:
        if index != self.done:
            raise ValueError(f"pair {index} out of order; {self.done} is next.")

    def _verified(self) -> list[dict[str, Any]]:
        """Manifest lines up to the first that is torn, out of order, or of files not whole."""
        if not self._manifest.exists():
            return []
        lines: list[dict[str, Any]] = []
        for line in manifest_lines(self._manifest):
            if line.get("index") != len(lines) or not self._whole(line):
                break
            lines.append(line)
        return lines

    def _whole(self, line: Mapping[str, Any]) -> bool:
        for key in (k.removesuffix("_sha256") for k in line if k.endswith("_sha256")):
            path = self._inside(line.get(key))
            if path is None or not path.is_file():
                return False
            if hashlib.sha256(path.read_bytes()).hexdigest() != line[key + "_sha256"]:
                return False
        return {"image_sha256", "annotation_sha256"} <= line.keys()

    def _inside(self, name: Any) -> Path | None:
        """A file of this folder that a line names; None for any other place, which is not read."""
        if not isinstance(name, str) or "\0" in name:
            return None
        path = self.folder / name
        return path if path.resolve().is_relative_to(self.folder.resolve()) else None

    def _rewrite_manifest(self) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines).encode()
        if not self._manifest.exists() or self._manifest.read_bytes() != text:
            files.write(self._manifest, text)


def manifest_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a manifest up to the first that is torn or damaged.

    A line ends at a newline and nowhere else: a prompt may hold what Unicode calls a line break.
    """
    *whole, _ = path.read_bytes().split(b"\n")
    for text in whole:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # no JSON, no UTF-8
            return
        if not isinstance(line, dict):
            return
        yield line


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_bytes())
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise UserError(
            f"{path}: damaged; nobody can say with what settings these pairs were made. Put the "
            "file back from a copy, or choose another --out."
        )
    return saved


def _agree(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings, or refuses other ones than those the folder was made with."""
    if path.exists():
        saved = _read(path)
        keys = sorted(set(saved) | set(settings))
        changed = [k for k in keys if saved.get(k) != settings.get(k)]
        if changed:
            listed = "; ".join(f"{k}: {saved.get(k)} -> {settings.get(k)}" for k in changed)
            raise UserError(
                f"{path.parent}: made with other settings: {listed}. "
                "Give the same settings to go on, or another --out."
            )
        return
    files.write(path, (json.dumps(settings, indent=1) + "\n").encode())

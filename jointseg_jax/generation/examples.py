"""A few records of a run's data as files that a person can look at, copy and replace.

``WORKDIR/examples`` is a data set in folders (``data/sources/layouts.py``) and holds what sampling
can start from: ``prompts.txt``, ``images/val``, ``annotations/val``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jointseg_jax import build
from jointseg_jax.annotations import viz
from jointseg_jax.config import RunConfig
from jointseg_jax.data import files
from jointseg_jax.data.labels import to_content

COUNT = 8
"""Records of each split."""


def write_examples(config: RunConfig, workdir: Path) -> Path:
    """Writes ``WORKDIR/examples`` as evaluation sees the data; files that are there stay.

    Raises:
      UserError: the data set is not there, as where a run needs its cache alone.
    """
    folder = workdir / "examples"
    for split in ("train", "val"):
        source = build.records(config, split)
        ids, captions = [], []
        for index in range(min(COUNT, len(source))):
            record = source[index]
            for transform in build.evaluation_transforms(config):
                record = transform(record, np.random.default_rng(0), False)  # draws nothing
            ids.append(f"{index:08d}")
            captions.append(next(iter(record["captions"]), ""))
            picture, map_ = viz.png_bytes(record["image"]), record["labels"]
            _keep(folder / f"images/{split}/{ids[-1]}.png", picture)
            drawn = viz.palette_png_bytes(map_, source.classes)
            _keep(folder / f"annotations/{split}/{ids[-1]}.png", drawn)
        lines = [json.dumps({"id": i, "caption": c}) for i, c in zip(ids, captions)]
        _keep(folder / f"captions/{split}.jsonl", _text(lines))
        if split == "val":
            _keep(folder / "prompts.txt", _text([c for c in captions if c]))
            _keep(folder / "classes.json", _text([json.dumps(to_content(source.classes))]))
    return folder


def _text(lines: list[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


def _keep(path: Path, content: bytes) -> None:
    """Writes a file unless a person has one there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, content)

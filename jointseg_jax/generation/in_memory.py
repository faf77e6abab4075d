"""Pairs as arrays instead of a folder: for notebooks, and programs that go on with them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jointseg_jax.data.transforms import BOXES, Resize, resize_image, resize_labels
from jointseg_jax.generation import unread_words
from jointseg_jax.generation.sample import (
    Condition,
    Inputs,
    SampleOptions,
    cleaned,
    host_pairs,
    prompt_rows,
    resolved,
)
from jointseg_jax.generation.sampler import make_sampler, pending_batches
from jointseg_jax.training.workdir import Run


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InMemory(Condition):
    """Images or label maps to start from, as ``launch/sample.py --given`` reads them from files."""

    kind: Literal["images", "labels"]
    rows: Sequence[np.ndarray]
    """uint8 [height, width, 3] of any sizes, or labels [height, width] with -1 for void."""
    mode: Literal["crop", "stretch"] = "crop"  # to the model's size come its centre, or all of it

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Returns one row at (height, width)."""
        row, resize = self.rows[index], Resize(size=size, mode=self.mode)
        box = BOXES[self.mode](resize, row.shape[:2], np.random.default_rng(0), False)
        return (resize_image if self.kind == "images" else resize_labels)(row, resize.target, box)

    def fingerprint(self) -> dict[str, object]:
        """Returns plain values that differ for other rows."""
        rows = (np.ascontiguousarray(row).tobytes() for row in self.rows)
        sums = [hashlib.sha256(row).hexdigest() for row in rows]
        return {"kind": self.kind, "mode": self.mode, "sha256": sums}


def sample_pairs(run: Run, options: SampleOptions) -> dict[str, np.ndarray]:
    """Generates pairs of a trained run; the ones that ``sample`` would write.

    Returns:
      ``index`` [n], ``image`` uint8 [n, height, width, 3], ``labels`` [n, height, width] (-1 is
      void), ``confidence`` [n, height, width] in [0, 1], and ``segments`` of panoptic runs. Pairs
      that ``options.filters`` reject are left out. Of several processes each returns its share.

    Raises:
      UserError: the run cannot do what the options ask for.
    """
    system, options = resolved(run, options)
    inputs = Inputs(prompt_rows(run, options.prompts, options.features), options.condition)
    unread_words.say(unread_words.unread_words(run, options.prompts))
    sampler = make_sampler(run, system, per_device=options.per_device)
    clean = functools.partial(
        cleaned, classes=run.info.classes, absorb=options.absorb, min_instance=options.min_instance
    )

    pending = pending_batches(0, options.count, sampler.batch_size)
    pairs = []
    for indices, made in host_pairs(sampler, inputs, options.seed, system.size, pending):
        for row, index in enumerate(indices):
            pair = clean({k: rows[row] for k, rows in made.items()})
            if not options.filters.reason(pair):
                pairs.append({"index": np.int64(index), **pair})
    return {k: np.stack([pair[k] for pair in pairs]) for k in (pairs[0] if pairs else ())}


def segment(run: Run, images: Sequence[np.ndarray], *, steps: int | None = None) -> np.ndarray:
    """Reads the labels of images with a bridge run: [n, height, width], classes of the run.

    Args:
      images: uint8 [height, width, 3] of any sizes; the centre is read, at the run's size.
      steps: of the solver; None is the config's number.
    """
    condition = InMemory(kind="images", rows=images)
    return sample_pairs(run, SampleOptions(condition=condition, steps=steps))["labels"]

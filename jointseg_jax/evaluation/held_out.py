"""The validation split: its batches, its captions to sample from, and its maps to start from."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jointseg_jax import build
from jointseg_jax.config import plain
from jointseg_jax.data.pipeline import evaluation_batches
from jointseg_jax.evaluation.confusion import shares
from jointseg_jax.training.workdir import Run
from jointseg_jax.types import UserError

PER_DEVICE = 8
"""Label maps that a device codes at a time."""

PROMPTS = 512
"""Least number of validation captions to sample from, if the split has as many."""

log = logging.getLogger("jointseg_jax")


def validation_batches(
    run: Run, batch: int, limit: int | None, what: str
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yields host batches of the validation split as ``config.evaluate`` transforms it.

    Rows that only fill up the last batch are False in its field ``valid``.

    Args:
      limit: at most this many records, from the first on.
      what: the progress bar's title.
    """
    source = build.source(run.config, "val")
    count = min(limit or len(source), len(source))
    with evaluation_batches(
        source,
        run.config.data,
        batch=batch,
        transforms=build.evaluation_transforms(run.config),
        limit=count,
        instances=build.instances(run.config),
    ) as batches:
        total = -(-count // batch)
        quiet = jax.process_index() > 0
        yield from tqdm(
            batches, total=total, unit="batch", desc=what, dynamic_ncols=True, disable=quiet
        )
        # Bad samples were replaced by others and marked invalid; here is what was wrong with them.
        for report in batches.drain():
            log.warning("%s", report["error"])


class References(NamedTuple):
    """Captions to sample from, and what the real masks of their records hold."""

    prompts: list[str]
    features: np.ndarray | None
    """Of the captions, [prompts, tokens, width], where the records carry them."""
    shares: np.ndarray
    """[prompts, classes + 1]: part of each mask that each class takes, VOID last."""


def references(run: Run, num: int) -> References:
    """Reads the references for ``num`` pairs."""
    source = build.source(run.config, "val")
    prompts, features, real = [], [], []
    # Below PROMPTS their number does not follow ``num``: pair i keeps caption i mod n, so that more
    # pairs of the same seed go on where fewer ended.
    for batch in validation_batches(run, PER_DEVICE, max(num, PROMPTS), "captions"):
        valid = batch["valid"]
        real.append(shares(batch["labels"][valid], len(run.info.classes)))
        for index in batch["index"][valid]:
            prompts.append(next(iter(source[int(index)]["captions"]), ""))
        if "text" in batch:
            features.append(batch["text"][valid])
    return References(prompts, np.concatenate(features) if features else None, np.concatenate(real))


class HeldOutMaps:
    """The first label maps of the validation split, as a ``generation.sample.Condition``."""

    kind = "labels"

    def __init__(self, run: Run, count: int):
        self.source = build.source(run.config, "val")
        self.transforms = build.evaluation_transforms(run.config)
        self.ids = tuple(f"{i:08d}" for i in range(count))
        self.captions = ((),) * count

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Returns one map as the evaluation transforms bring it to the model's size."""
        record = self.source[index]
        for transform in self.transforms:
            # Evaluation transforms draw nothing: ``False`` is ``train``.
            record = transform(record, np.random.default_rng(0), False)
        if record["labels"].shape != size:
            raise UserError(
                f"config.evaluate.transforms give maps of {record['labels'].shape}, the model "
                f"makes pairs of {size}; let them end with a resize to that size."
            )
        return record["labels"]

    def fingerprint(self) -> dict[str, Any]:
        """Returns plain values that differ for other maps."""
        return plain(self.source.fingerprint()) | {"count": len(self)}

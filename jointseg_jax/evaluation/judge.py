"""Judges: what labels a generated image, to compare with the mask generated beside it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import numpy as np

from jointseg_jax.data.sources.scenes import HUES, oracle_labels
from jointseg_jax.training.workdir import Run
from jointseg_jax.types import UserError

Judge = Callable[[np.ndarray], np.ndarray]
"""[height, width, 3] uint8 image -> [height, width] labels."""

log = logging.getLogger("jointseg_jax")


def find_judge(run: Run) -> Judge | None:
    """Returns the judge that ``config.evaluate.judge`` names; for "" None, and logs why."""
    name = run.config.evaluate.judge
    if name == "":
        log.info(
            "alignment is not measured: config.evaluate.judge is empty. A judge labels generated "
            "images; one of: %s (for data whose classes it knows).",
            ", ".join(JUDGES),
        )
        return None
    if name not in JUDGES:
        raise UserError(
            f'config.evaluate.judge: {name!r} is unknown; "" or one of: {", ".join(JUDGES)}.'
        )
    return JUDGES[name](run.info.classes.names)


def oracle(names: Sequence[str]) -> Judge:
    """Returns the exact labels of the embedded scenes, whose categories each own a hue."""
    unknown = [name for name in names if name not in HUES]
    if unknown:
        raise UserError(
            f"config.evaluate.judge: the oracle knows the categories of `scenes` by their hue; "
            f'{len(unknown)} classes are none of these ({", ".join(unknown[:4])}). Set it to "".'
        )
    return functools.partial(oracle_labels, names=tuple(names))


JUDGES = {"oracle": oracle}
"""Makers of judges, class names -> judge, by their name in a config."""

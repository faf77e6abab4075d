"""What must agree between a workdir and the run that is to go on in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jointseg_jax.config import RunConfig, plain
from jointseg_jax.data.records import DatasetInfo, Source
from jointseg_jax.settings_diff import classes_apart, require_same
from jointseg_jax.types import UserError

MAY_CHANGE = (
    r"^(log|preview|checkpoint|evaluate|profile|finish|nan|watchdog)/",
    r"^(mesh|sharding)(/|$)",
    r"^data/(workers|threads|prefetch|bad|bad_limit)$",
)
"""Config paths that a resumed run may change; everything else would change its result."""


def settings(config: RunConfig, source: Source) -> dict[str, Any]:
    """What is kept beside a checkpoint and compared when a run goes on from it."""
    found = plain(config.values)
    if config.start.is_fresh:
        found.pop("start", None)  # as in runs made before there was such a setting
    if not config.data.cache:
        found["data"].pop("cache", None)  # likewise
    return found | {"source": plain(source.fingerprint())}


def require_settings(
    meta: Mapping[str, Any], current: Mapping[str, Any], allow: Sequence[str], workdir: Path
) -> None:
    """Refuses, field by field, a checkpoint that was made with other settings.

    Args:
      allow: regexes of config paths that may differ beside ``MAY_CHANGE``.
    """
    where = f"the checkpoint of step {meta['step']} in {workdir}"
    remedy = "Put these settings back, choose another --workdir, or --allow=FIELD to change one."
    require_same(meta["config"], current, (*MAY_CHANGE, *allow), where=where, remedy=remedy)


def require_info(info: DatasetInfo, path: Path) -> None:
    """Refuses data with other classes or words than the workdir's ``facts.json`` says."""
    saved = DatasetInfo.load(path)
    apart = classes_apart(saved.classes.names, info.classes.names)
    if not apart and saved.vocabulary == info.vocabulary:
        return
    words = f"{len(saved.vocabulary)} words, the data has {len(info.vocabulary)}"
    raise UserError(
        f"{path}: this workdir was trained on other classes or words than config.data.train gives "
        f"now: {apart or words}. Use the same data, or another --workdir."
    )

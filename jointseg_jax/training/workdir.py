"""A trained run, read from its workdir alone: config, facts, frozen codecs, averaged parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jointseg_jax import build, rules
from jointseg_jax.training import pretrained
from jointseg_jax.training import state as states
from jointseg_jax.training.checkpoints import Checkpoints
from jointseg_jax.types import UserError


@dataclass(frozen=True)
class Run:
    """What sampling and evaluation need of a workdir."""

    workdir: Path
    config: dict[str, Any]
    info: build.DatasetInfo
    system: Any
    params: Any
    frozen: dict[str, Any]
    step: int
    digest: str


def load_info(workdir: Path) -> build.DatasetInfo:
    """What a run knows of its data.

    Raises:
      UserError: the folder is no workdir.
    """
    if not (workdir / "config.json").exists():
        raise UserError(
            f"{workdir}: no trained run here (config.json is missing). "
            f"Train one: launch/train.py --config configs/quickstart.py --workdir {workdir}"
        )
    return build.DatasetInfo.load(workdir / "facts.json")


def load_run(workdir: Path | str) -> Run:
    """Reads the newest verified checkpoint of a workdir, without optimizer state.

    Raises:
      UserError: the folder is no workdir, or holds no usable checkpoint.
    """
    workdir = Path(workdir)
    known = load_info(workdir)
    config = build.from_plain(json.loads((workdir / "config.json").read_text()))
    specs, frozen = pretrained.load(workdir, config)
    system = build.system(config, known, specs)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    trainable = rules.match(shapes, config["trainable"], where="trainable", prefix="params/")
    chosen, fixed = states.split(shapes, trainable)
    wanted = {"ema": chosen, "params": fixed}
    only = ("ema", *("params/" + path for path in rules.paths(fixed)))
    found = Checkpoints(workdir / "checkpoints", read_only=True).restore_newest(wanted, only=only)
    if found is None:
        raise UserError(
            f"{workdir}: the run has no checkpoint yet; let it train to its first save."
        )
    restored, meta = found
    params = states.merge(restored["ema"], restored["params"])
    digest = meta["checkpoint"]["digest"]
    return Run(workdir, config, known, system, params, frozen, meta["step"], digest)

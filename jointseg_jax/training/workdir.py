"""A trained run, read from its workdir alone: config, facts, frozen codecs, averaged parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from jointseg_jax import build, rules
from jointseg_jax.data import files
from jointseg_jax.training import state as states
from jointseg_jax.training.checkpoints import Checkpoints
from jointseg_jax.types import UserError

RESERVED_KEYS = ("name", "workdir", "scale")
"""Entries of a ``trained`` spec that are no fields of the codec."""


class TrainedCodec(NamedTuple):
    """A codec of a config: its spec, the batch field it codes, and where it stands."""

    spec: Mapping[str, Any]
    field: str
    where: str


def trained_codecs(config: Mapping[str, Any]) -> dict[str, TrainedCodec]:
    """The codecs of a config that are another run's, by the name of their parameters."""
    system = config["system"]
    places = {
        name: TrainedCodec(stream["codec"], stream["field"], f"config.system.streams.{name}.codec")
        for name, stream in system.get("streams", {}).items()
        if "codec" in stream
    }
    if "image" in system:
        places["image"] = TrainedCodec(system["image"], "image", "config.system.image")
    return {k: place for k, place in places.items() if place.spec["name"] == "trained"}


def load_codecs(workdir: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Codec specs and parameters by name, as ``import_codecs`` left them in the workdir."""
    specs, params = {}, {}
    for name in trained_codecs(config):
        path = workdir / "frozen" / f"{name}.json"
        if not path.exists():
            raise UserError(
                f"{path}: missing; the workdir lost its codec. Copy it back, or train anew."
            )
        record = json.loads(path.read_text())
        file = path.with_suffix(".safetensors")
        if not file.exists() or files.sha256(file) != record["sha256"]:
            raise UserError(f"{file}: missing or not the file that {path.name} describes (sha256).")
        specs[name] = record["codec"]
        params[name] = rules.nested({k: jnp.asarray(v) for k, v in load_file(file).items()})
    return specs, params


def copied_spec(workdir: Path, name: str) -> dict[str, Any] | None:
    """The spec of a codec that the workdir has a copy of; None where it has none."""
    path = workdir / "frozen" / f"{name}.json"
    return json.loads(path.read_text())["codec"] if path.is_file() else None


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
    specs, frozen = load_codecs(workdir, config)
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

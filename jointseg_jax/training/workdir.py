"""A trained run, read from its workdir alone: config, data, frozen codecs, averaged parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from jointseg_jax import build, rules
from jointseg_jax.config import CodecPlace, RunConfig, SystemConfig, from_plain
from jointseg_jax.data import files
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.specs import Spec
from jointseg_jax.training import state as states
from jointseg_jax.training.checkpoints import Checkpoints
from jointseg_jax.types import Params, UserError

RESERVED_KEYS = ("name", "workdir", "scale")  # of a `trained` spec; no fields of the codec
FIT = "fit"  # scale of a `trained` spec: 1 / std of the latents of the first batches


def changed(codec: Spec, place: CodecPlace) -> dict[str, Any]:
    """A trained codec's spec with what the config that uses it changes; a scale to fit is 1."""
    made = {**codec, **{k: v for k, v in place.spec.items() if k not in RESERVED_KEYS}}
    scale = place.spec.get("scale", codec.get("scale"))
    return made if scale is None else made | {"scale": 1.0 if scale == FIT else scale}


def load_codecs(workdir: Path, system: SystemConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Codec specs and parameters by name, as ``import_codecs`` left them in the workdir."""
    specs, params = {}, {}
    for name in system.trained_codecs():
        path = workdir / "frozen" / f"{name}.json"
        if not path.exists():
            raise UserError(
                f"{path}: missing; the workdir lost its codec. Copy it back, or train again."
            )
        record, file = json.loads(path.read_text()), path.with_suffix(".safetensors")
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
    config: RunConfig
    info: DatasetInfo
    system: Any  # Joint, Bridge or Autoencode; the caller knows which of them it needs
    params: Params  # averaged where an average is kept
    frozen: dict[str, Params]  # parameters of trained codecs, by name
    step: int
    digest: str  # of the whole state that the checkpoint holds


def load_info(workdir: Path) -> DatasetInfo:
    """Reads classes and words of a run's data from its workdir.

    Raises:
      UserError: the folder is no workdir.
    """
    if not (workdir / "config.json").exists():
        raise UserError(
            f"{workdir}: no trained run here (config.json is missing). "
            f"Train one: launch/train.py --config configs/quickstart.py --workdir {workdir}"
        )
    return DatasetInfo.load(workdir / "facts.json")


def load_run(workdir: Path | str) -> Run:
    """Reads the newest verified checkpoint of a workdir, without optimizer state.

    Raises:
      UserError: the folder is no workdir, or holds no usable checkpoint.
    """
    workdir = Path(workdir)
    info = load_info(workdir)
    config = RunConfig.parse(from_plain(json.loads((workdir / "config.json").read_text())))
    specs, frozen = load_codecs(workdir, config.system)
    system = build.system(config.system, info, specs)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    is_trainable = rules.match(shapes, config.trainable, where="trainable", prefix="params/")
    trainable, fixed = states.split(shapes, is_trainable)
    # averages of what was trained, and the parameters that were not: neither the optimizer's state
    # nor the last trained values are read
    wanted = {"ema": trainable, "params": fixed}
    only = ("ema", *("params/" + path for path in rules.paths(fixed)))
    found = Checkpoints(workdir / "checkpoints", read_only=True).restore_newest(wanted, only=only)
    if found is None:
        raise UserError(
            f"{workdir}: the run has no checkpoint yet; let it train to its first save."
        )
    restored, meta = found
    params = states.averaged(restored["params"], restored["ema"])
    digest = meta["checkpoint"]["digest"]
    return Run(workdir, config, info, system, params, frozen, meta["step"], digest)

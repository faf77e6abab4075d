"""Trained codecs inside another run's workdir.

``codec = {"name": "trained", "workdir": "runs/codec", "scale": "fit"}`` takes the codec of that
run: its fields from the run's config, its averaged parameters from its newest checkpoint. Both are
copied into ``WORKDIR/frozen/NAME.{json,safetensors}`` before the first step, so that a workdir can
be sampled and moved without the codec's. ``scale`` replaces the codec's latent scale; ``"fit"``
sets it to 1 / std of the latents of the first batches. Further entries replace fields of the codec
that leave its parameters as they are (``refine``).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import load_file, save_file

from jointseg_jax import build, rules
from jointseg_jax.codecs.codec import Codec
from jointseg_jax.config import CodecPlace, SystemConfig
from jointseg_jax.data import files
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.settings_diff import classes_apart
from jointseg_jax.training.workdir import FIT, changed, load_run
from jointseg_jax.types import Params, UserError


def import_codecs(
    workdir: Path,
    system: SystemConfig,
    info: DatasetInfo,
    batches: Iterable[Mapping[str, np.ndarray]],
) -> None:
    """Copies trained codecs into the workdir, once; every process calls it.

    Args:
      batches: host batches, read only when a scale is to be fitted.
    """
    for name, place in system.trained_codecs().items():
        target = workdir / "frozen" / f"{name}.json"
        if target.exists():
            continue
        trained, params = load_codec(place, info)
        spec = changed(trained, place)
        if place.spec.get("scale", trained.get("scale")) == FIT:
            codec = build.codec(spec, info, place.where)
            spec["scale"] = _fit(codec, params, place.field, batches)
        # the first process decides: the others read other rows and would fit another scale
        if jax.process_index() == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            file, arrays = target.with_suffix(".safetensors"), rules.by_path(params)
            save_file({k: np.asarray(v) for k, v in arrays.items()}, file)
            made = {"codec": spec, "from": place.spec["workdir"], "sha256": files.sha256(file)}
            # whole or absent: a run may be killed here
            files.write(target, (json.dumps(made, indent=1) + "\n").encode())
    multihost_utils.sync_global_devices("pretrained.import_codecs")


def check_unchanged(workdir: Path, system: SystemConfig, info: DatasetInfo) -> None:
    """Compares copied codecs with their own runs, as far as these are still there.

    Raises:
      UserError: such a run was trained on since the copy was made.
    """
    for name, place in system.trained_codecs().items():
        file, run = workdir / "frozen" / f"{name}.safetensors", Path(place.spec["workdir"])
        if not file.exists() or not (run / "config.json").exists():
            continue
        ours, theirs = load_file(file), rules.by_path(load_codec(place, info)[1])
        same = ours.keys() == theirs.keys()
        if not same or any(not np.array_equal(ours[k], theirs[k]) for k in ours):
            raise UserError(
                f"{file}: the codec as it was when this folder was begun; {run} was trained on "
                "since. Choose another folder to use it as it is now."
            )


def from_cache(workdir: Path, system: SystemConfig, cache: str) -> None:
    """Copies the codecs that a cache was encoded with into the workdir, once.

    Raises:
      UserError: the workdir has others; its latents are not those of the cache.
    """
    for name in system.trained_codecs() if cache else ():
        made, target = Path(cache) / "frozen" / f"{name}.json", workdir / "frozen" / f"{name}.json"
        if not made.exists():
            raise UserError(f"{made}: missing; the cache lost its codec. Copy it back.")
        if not target.exists() and jax.process_index() == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            for suffix in (".safetensors", ".json"):  # the JSON last: where it is, all is whole
                files.write(target.with_suffix(suffix), files.read(made.with_suffix(suffix)))
        multihost_utils.sync_global_devices("pretrained.from_cache")
        ours, theirs = (json.loads(path.read_text()) for path in (target, made))
        if any(ours[k] != theirs[k] for k in ("codec", "sha256")):
            raise UserError(
                f"{target}: this workdir has another codec than {cache} was encoded with. Train "
                "in another --workdir, or encode again, into another folder."
            )


def load_codec(place: CodecPlace, info: DatasetInfo) -> tuple[dict[str, Any], Params]:
    """The spec and the parameters of the codec that another run trained.

    Raises:
      UserError: no run, or not one of a codec of this field and these classes.
    """
    workdir = place.spec["workdir"]
    run = load_run(Path(workdir))
    system = run.config.system
    if system.codec is None or system.field != place.field:
        raise UserError(
            f"{place.where}: {workdir} holds a `{system.name}` run of {system.field}; a codec of "
            f"{place.field} comes from an `autoencode` run of that field."
        )
    labels = place.field != "image"
    if labels and run.info.classes.names != info.classes.names:
        raise UserError(
            f"{place.where}: {workdir} was trained on "
            f"{classes_apart(run.info.classes.names, info.classes.names)}. "
            "Train the codec on this data."
        )
    return dict(system.codec), run.params


def _fit(
    codec: Codec, params: Params, field: str, batches: Iterable[Mapping[str, np.ndarray]]
) -> float:
    """1 / standard deviation of the unscaled latents over the first batches, at most 8."""
    encode = jax.jit(lambda values: codec.encode(params, values))  # without keys: the mode
    first = (encode(batch[field]) for batch in itertools.islice(batches, 8))
    return float(1.0 / np.concatenate([np.asarray(x, np.float64).ravel() for x in first]).std())

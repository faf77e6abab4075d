"""What is wrong with a config, all of it at once, before jax looks for devices.

Every setting and every part is made by its own constructor, and what a path names is looked for.
What needs the data or the devices (mesh against devices, rules against parameters) is found later:
by ``validate``, or when the run starts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jointseg_jax import build, sharding
from jointseg_jax.build import SOURCES, TRANSFORMS
from jointseg_jax.config import Problems, RunConfig, StartConfig, SystemConfig, from_plain
from jointseg_jax.data import files
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.labels import read_classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.data.sources.layouts import LAYOUTS, published_classes
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.specs import Spec, check_spec, make
from jointseg_jax.training.optimizer import OPTIMIZERS
from jointseg_jax.training.step import check_rows
from jointseg_jax.training.workdir import changed, copied_spec
from jointseg_jax.weights.convert import require_safetensors

UNKNOWN_CLASSES = Classes(names=("a", "b"))  # where only reading the data would tell


def checked(values: Mapping[str, Any], workdir: str | None = None) -> tuple[RunConfig, Problems]:
    """The config, and everything that is wrong with it and with the folder of its run.

    Where something is wrong the config has defaults in its place.

    Raises:
      UserError: a part is missing altogether.
    """
    problems = Problems()
    config = RunConfig.parse(values, problems)
    _optimizer(config, problems)
    _mesh(config, problems)
    _data(config, problems)
    if not (workdir and has_checkpoint(workdir)):  # which goes before the weights to start from
        _start(config.start, problems)
    _system(config, problems, workdir)
    if workdir is not None:
        _workdir(workdir, problems)
    return config, problems


def has_checkpoint(workdir: str) -> bool:
    """Returns True if a folder holds a run that would be resumed, whole or not."""
    folder = Path(workdir) / "checkpoints"
    return folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())


def _optimizer(config: RunConfig, problems: Problems) -> None:
    optimizer = problems.collect(lambda: make(OPTIMIZERS, config.optimizer, where="optimizer"))
    if optimizer is None:
        return
    problems.collect(lambda: optimizer.learning_rate(config.steps))
    warmup = optimizer.warmup
    if config.steps < warmup:
        problems.note(
            f"config.steps = {config.steps}: the warm-up alone takes {warmup}, so the learning "
            f"rate is never reached; set config.steps to {warmup} or more, or "
            f"config.optimizer.schedule.warmup to {config.steps} or less."
        )


def _mesh(config: RunConfig, problems: Problems) -> None:
    shape = problems.collect(lambda: sharding.mesh_sizes(config.mesh))
    if shape is not None:
        # -1 stands for a number that is not known yet; whatever it is, the rest must divide
        shards = math.prod(n for n in shape[:2] if n > 0)
        problems.collect(lambda: check_rows(config, shards))
    preset = config.sharding
    if isinstance(preset, str):
        problems.collect(lambda: sharding.preset_rules(preset))


# --------------------------------------------------------------------------- data


def _data(config: RunConfig, problems: Problems) -> None:
    cache = config.data.cache
    if cache:
        _place("config.data.cache", cache, problems)
    for split in ("train", "val"):
        if build.from_cache(config, split):
            continue
        before = len(problems)
        _source(getattr(config.data, split), f"data.{split}", problems)
        if cache and len(problems) > before:
            problems.note(
                f"config.data.{split} is read beside config.data.cache = {cache}, which has no "
                f"such split: launch/encode.py --split={split} --out={cache} adds it."
            )
    for field, part in (("data", config.data), ("evaluate", config.evaluate)):
        for name, spec in part.transforms.items():
            where = f"{field}.transforms.{name}"
            problems.collect(lambda spec=spec, where=where: make(TRANSFORMS, spec, where=where))
    problems.collect(lambda: build.instances(config))


def _source(spec: Spec, where: str, problems: Problems) -> None:
    """Looks at a source without reading it: a listing may take minutes."""
    spec = dict(spec)
    features = spec.pop("features", None)
    if problems.collect(lambda: check_spec(SOURCES, spec, where=where)) is Scenes:
        problems.collect(lambda: make(SOURCES, spec, where=where))
    if "layout" in spec and spec["layout"] not in LAYOUTS:
        problems.note(
            f"config.{where}.layout: {spec['layout']!r} is unknown; one of: {', '.join(LAYOUTS)}."
        )
    for field in ("root", "folder"):
        if field in spec:
            _place(f"config.{where}.{field}", spec[field], problems)
    if features:
        _place(f"config.{where}.features.root", features.get("root", ""), problems)


def _place(name: str, path: str, problems: Problems, *, file: bool = False) -> bool:
    """Notes why a folder (or file) cannot be read; returns True if it can."""
    text = files.unreadable(path, file=file)
    if text:
        problems.note(f"{name} = {path}: {text}. Set --{name}=PATH.")
    return not text


def _start(start: StartConfig, problems: Problems) -> None:
    if start.workdir:
        _place("config.start.workdir", start.workdir, problems)
    if start.file and _place("config.start.file", start.file, problems, file=True):
        problems.collect(lambda: require_safetensors(start.file))


def _workdir(workdir: str, problems: Problems) -> None:
    if "://" in workdir:
        problems.note(
            f"--workdir={workdir}: runs are written to a folder of this machine; mount the bucket "
            "(gcsfuse) and give its folder."
        )
        return
    path = Path(workdir).absolute()
    above = next(p for p in (path, *path.parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = "is no folder" if not above.is_dir() else "cannot be written (permissions)"
        problems.note(f"--workdir={workdir}: {above} {why}. Choose another --workdir.")


# ------------------------------------------------------------------------- system


def _system(config: RunConfig, problems: Problems, workdir: str | None) -> None:
    info = DatasetInfo(_classes(config.data.train, problems), ("a",), ())
    codecs = _trained(config.system, workdir, problems)
    build.system(config.system, info, codecs, problems)


def _classes(spec: Spec, problems: Problems) -> Classes:
    """The classes of a source, where they can be known without listing it."""
    source = SOURCES.get(str(spec.get("name")))
    if source is Scenes:
        made = Problems().collect(lambda: make(SOURCES, spec, where="data.train"))
        return UNKNOWN_CLASSES if made is None else made.classes
    if (published := published_classes(spec)) is not None:
        return published
    own = Path(spec.get("root", "")) / "classes.json"
    if source is SOURCES["folders"] and own.is_file():
        read = problems.collect(lambda: read_classes(own))
        return UNKNOWN_CLASSES if read is None else read[0]
    return UNKNOWN_CLASSES


def _trained(
    system: SystemConfig, workdir: str | None, problems: Problems
) -> dict[str, Spec | None]:
    """The specs of codecs that other runs trained; None where nobody knows."""
    specs: dict[str, Spec | None] = {}
    for name, place in system.trained_codecs().items():
        run = Path(place.spec["workdir"]) / "config.json"
        specs[name] = copied_spec(Path(workdir), name) if workdir else None
        if specs[name] is None and not run.is_file():
            problems.note(
                f"{place.where}.workdir = {place.spec['workdir']}: no trained run here "
                f"(config.json is missing). Train that codec first, or set "
                f"--{place.where}.workdir=RUN."
            )
        elif specs[name] is None:
            codec = from_plain(json.loads(run.read_text()))["system"].get("codec")
            # a run that trained no codec is refused, with more to say, when it is opened
            specs[name] = codec and changed(codec, place)
    return specs

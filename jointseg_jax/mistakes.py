"""What is wrong with a config, all of it at once, before jax looks for devices.

Every part that can be built by itself is built by itself (the constructor is the schema), numbers
are held against their ranges, and what a path names is looked for. What needs the data or the
devices (mesh against devices, rules against parameters) is found later: by ``dry_run``, or when the
run starts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jointseg_jax import build, sharding
from jointseg_jax.build import SOLVERS, SOURCES, TRANSFORMS
from jointseg_jax.config import check_spec, make
from jointseg_jax.data import files
from jointseg_jax.data.class_lists import CLASS_LISTS
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.labels import read_classes
from jointseg_jax.data.pipeline import POLICIES
from jointseg_jax.data.sources.layouts import LAYOUT_CLASSES, LAYOUTS
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.models.embed import spec_of
from jointseg_jax.models.uvit import UViT
from jointseg_jax.systems.joint import TEXT_STREAM
from jointseg_jax.systems.system import Stream
from jointseg_jax.training.faults import Faults
from jointseg_jax.training.init_from import InitFrom
from jointseg_jax.training.optimizer import OPTIMIZERS
from jointseg_jax.training.program import check_rows
from jointseg_jax.training.watchdog import Watchdog
from jointseg_jax.training.workdir import RESERVED_KEYS, TrainedCodec, copied_spec, trained_codecs
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import Linear
from jointseg_jax.types import UserError
from jointseg_jax.weights.convert import require_safetensors

T = TypeVar("T")
Config = Mapping[str, Any]

LEAST = {
    "steps": 1,
    "batch": 1,
    "accumulate": 1,
    "seed": 0,
    "log.every": 1,
    "preview.every": 0,
    "preview.count": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "profile.steps": 0,
    "finish.num": 0,
    "data.workers": 0,
    "data.threads": 0,
    "data.prefetch": 1,
    "data.bad_limit": 0,
}
"""Whole numbers of a config and the least that each may be."""

STANDING = Process(schedule=Linear(), predicts="velocity")
"""For a stream whose own process cannot be built."""

UNKNOWN_CLASSES = Classes(names=("a", "b"))
"""For data whose classes only reading them would tell."""


class Mistakes(list[str]):
    """Texts, collected."""

    def attempt(self, make: Callable[[], T], where: str = "") -> T | None:
        """What ``make`` gives; None, and its text collected, where it refuses.

        Args:
          where: the config path to put before a text that names none.
        """
        try:
            return make()
        except (UserError, ValueError) as error:
            text = str(error)
            self.note(
                text if text.startswith("config.") or not where else f"config.{where}: {text}"
            )
        return None

    def note(self, text: str) -> None:
        """Collects a text once."""
        if text not in self:
            self.append(text)


def mistakes(config: Config, workdir: str | None = None) -> list[str]:
    """Everything that is wrong with a config, and with the folder of its run."""
    found = Mistakes()
    _run(config, found)
    _mesh(config, found)
    _data(config, found)
    if not (workdir and has_checkpoint(workdir)):  # which goes before the weights to start from
        _start(config.get("start", {}), found)
    _system(config, found, workdir)
    if workdir is not None:
        _workdir(workdir, found)
    return found


def refuse(config: Config, workdir: str | None = None) -> None:
    """Raises everything that is wrong with a config in one block."""
    found = mistakes(config, workdir)
    if found:
        raise UserError(block(found))


def block(texts: Sequence[str]) -> str:
    """One text of several, with their number where it is not one."""
    head = f"ERROR [config] {len(texts)} problems:\n" if len(texts) > 1 else ""
    return head + "\n".join(texts)


def has_checkpoint(workdir: str) -> bool:
    """Whether a folder holds a run that would be resumed; not whether its checkpoints are whole."""
    folder = Path(workdir) / "checkpoints"
    return folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())


def _run(config: Config, found: Mistakes) -> None:
    for path, least in LEAST.items():
        value = config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None and (type(value) is not int or value < least):
            found.note(f"config.{path} = {value!r}: must be a whole number, {least} or more.")
    if not 0 <= config["ema"] < 1:
        found.note(f"config.ema = {config['ema']}: must lie in [0, 1); 0 keeps no average.")
    found.attempt(lambda: Faults(**config.get("nan", {})))
    found.attempt(lambda: Watchdog(**config.get("watchdog", {})))
    optimizer = found.attempt(lambda: make(OPTIMIZERS, config["optimizer"], where="optimizer"))
    if optimizer is not None and config["steps"] > 0:
        found.attempt(lambda: optimizer.learning_rate(config["steps"]))
    warmup = config["optimizer"].get("schedule", {}).get("warmup", 0)
    if 0 < config["steps"] < warmup:
        found.note(
            f"config.steps = {config['steps']}: the warm-up alone takes {warmup}, so the learning "
            f"rate is never reached; set config.steps to {warmup} or more, or "
            f"config.optimizer.schedule.warmup to {config['steps']} or less."
        )


def _mesh(config: Config, found: Mistakes) -> None:
    shape = found.attempt(lambda: sharding.mesh_sizes(config["mesh"]))
    if shape is not None and config["accumulate"] > 0:
        # -1 stands for a number that is not known yet; whatever it is, the rest must divide
        shards = math.prod(n for n in shape[:2] if n > 0)
        found.attempt(lambda: check_rows(config, shards))
    preset = config["sharding"]
    if isinstance(preset, str):
        found.attempt(lambda: sharding.preset_rules(preset))


# --------------------------------------------------------------------------- data


def _data(config: Config, found: Mistakes) -> None:
    cache = config["data"].get("cache")
    if cache:
        _place("config.data.cache", cache, found)
    for split in ("train", "val"):
        if build.from_cache(config, split):
            continue
        before = len(found)
        _source(config["data"][split], f"data.{split}", found)
        if cache and len(found) > before:
            found.note(
                f"config.data.{split} is read beside config.data.cache = {cache}, which has no "
                f"such split: launch/encode.py --split={split} --out={cache} adds it."
            )
    for field in ("data", "evaluate"):
        for name, spec in config[field].get("transforms", {}).items():
            where = f"{field}.transforms.{name}"
            found.attempt(lambda spec=spec, where=where: make(TRANSFORMS, spec, where=where))
    policy = config["data"].get("bad", "replace")
    if policy not in POLICIES:
        found.note(f"config.data.bad = {policy!r}: one of: {', '.join(POLICIES)}.")
    found.attempt(lambda: build.instances(config))


def _source(spec: Config, where: str, found: Mistakes) -> None:
    """Looks at a source without reading it: a listing may take minutes."""
    spec = dict(spec)
    features = spec.pop("features", None)
    if found.attempt(lambda: check_spec(SOURCES, spec, where=where)) is Scenes:
        found.attempt(lambda: make(SOURCES, spec, where=where))
    if "layout" in spec and spec["layout"] not in LAYOUTS:
        found.note(
            f"config.{where}.layout: {spec['layout']!r} is unknown; one of: {', '.join(LAYOUTS)}."
        )
    for field in ("root", "folder"):
        if field in spec:
            _place(f"config.{where}.{field}", spec[field], found)
    if features:
        _place(f"config.{where}.features.root", features.get("root", ""), found)


def _place(name: str, path: str, found: Mistakes, *, file: bool = False) -> bool:
    """Notes why a folder (or file) cannot be read; returns whether it can."""
    text = files.unreadable(path, file=file)
    if text:
        found.note(f"{name} = {path}: {text}. Set --{name}=PATH.")
    return not text


def _start(spec: Config, found: Mistakes) -> None:
    found.attempt(lambda: make({"start": InitFrom}, {"name": "start", **spec}, where="start"))
    if spec.get("workdir"):
        _place("config.start.workdir", spec["workdir"], found)
    if spec.get("file") and _place("config.start.file", spec["file"], found, file=True):
        found.attempt(lambda: require_safetensors(spec["file"]))


def _workdir(workdir: str, found: Mistakes) -> None:
    if "://" in workdir:
        found.note(
            f"--workdir={workdir}: runs are written to a folder of this machine; mount the bucket "
            "(gcsfuse) and give its folder."
        )
        return
    path = Path(workdir).absolute()
    above = next(p for p in (path, *path.parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        said = "is no folder" if not above.is_dir() else "cannot be written (permissions)"
        found.note(f"--workdir={workdir}: {above} {said}. Choose another --workdir.")


# ------------------------------------------------------------------------- system


def _system(config: Config, found: Mistakes, workdir: str | None) -> None:
    spec, before = config["system"], len(found)
    known = build.DatasetInfo(_classes(config["data"]["train"], found), ("a",), ())
    size = tuple(spec["size"])
    if len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        found.note(f"config.system.size = {size}: give (height, width) in pixels, both above 0.")
        return
    codecs = _trained(config, workdir, found)
    _codecs(spec, codecs, known, size, found)
    for name, stream in spec.get("streams", {}).items():
        _stream(name, stream, found)
    makers = {
        "text": lambda part: build.text_encoder(part, known),
        "process": lambda part: build.process(part, "system"),
        "times": build.times,
        "solver": lambda part: make(SOLVERS, part, where="system.solver"),
    }
    for name, maker in makers.items():
        if spec.get(name):
            found.attempt(lambda name=name, maker=maker: maker(spec[name]))
    if len(found) == before and None not in codecs.values():  # how the parts go together
        found.attempt(lambda: build.system(config, known, codecs), "system")
    elif "denoiser" in spec:
        _denoiser(spec["denoiser"], found)
    if spec.get("name") not in build.SYSTEMS:
        found.attempt(lambda: build.system(config, known, codecs))


def _classes(spec: Config, found: Mistakes) -> Classes:
    """The classes of a source, where they can be known without listing it."""
    named = spec.get("classes") or LAYOUT_CLASSES.get(spec.get("layout"))
    own = Path(spec.get("root", "")) / "classes.json"
    if spec.get("name") == "scenes":
        made = Mistakes().attempt(lambda: make(SOURCES, spec, where="data.train"))
        return UNKNOWN_CLASSES if made is None else made.classes
    if named in CLASS_LISTS:
        return CLASS_LISTS[named]
    if spec.get("name") == "folders" and own.is_file():
        read = found.attempt(lambda: read_classes(own))
        return UNKNOWN_CLASSES if read is None else read[0]
    return UNKNOWN_CLASSES


def _trained(config: Config, workdir: str | None, found: Mistakes) -> dict[str, Any]:
    """The specs of codecs that other runs trained; None where nobody knows."""
    specs: dict[str, Any] = {}
    for name, place in trained_codecs(config).items():
        run = Path(place.spec["workdir"]) / "config.json"
        specs[name] = copied_spec(Path(workdir), name) if workdir else None
        if specs[name] is None and not run.is_file():
            found.note(
                f"{place.where}.workdir = {place.spec['workdir']}: no trained run here "
                f"(config.json is missing). Train that codec first, or set "
                f"--{place.where}.workdir=RUN."
            )
        elif specs[name] is None:
            specs[name] = _codec_of(place, build.from_plain(json.loads(run.read_text())))
    return specs


def _codec_of(place: TrainedCodec, run: Config) -> dict[str, Any] | None:
    codec = run["system"].get("codec")
    if codec is None:
        return None  # not a codec's run, which the run says better
    codec = {**codec, **{k: v for k, v in place.spec.items() if k not in RESERVED_KEYS}}
    return codec | ({"scale": 1.0} if codec.get("scale") == "fit" else {})


def _codecs(
    spec: Config, codecs: Config, info: build.DatasetInfo, size: tuple[int, int], found: Mistakes
) -> None:
    """Every codec of a system, and how the tokens of its stream cut its latents."""
    streams = {k: v for k, v in spec.get("streams", {}).items() if k != TEXT_STREAM}
    places = {f"system.{k}": spec[k] for k in ("image", "palette", "codec") if spec.get(k)}
    places |= {f"system.streams.{k}.codec": stream["codec"] for k, stream in streams.items()}
    tokens = {f"system.streams.{k}.codec": stream["tokens"] for k, stream in streams.items()}
    for where, given in places.items():
        name = where.split(".")[2] if where in tokens else "image"
        given = codecs.get(name) if given["name"] == "trained" else given
        if given is None:
            continue
        made = found.attempt(lambda g=given, w=where: build.codec(g, info, w), where)
        shape = made and found.attempt(lambda m=made: m.latent_shape(size), where)
        if shape and where in tokens and len(shape) == 3:
            look = {"kind": "patches", "grid": shape[:2], "channels": shape[2], **tokens[where]}
            path = where.replace(".codec", ".tokens")
            found.attempt(lambda s=look, p=path: spec_of(s, where=f"config.{p}"))


def _stream(name: str, entry: Config, found: Mistakes) -> None:
    where = f"system.streams.{name}"
    process = found.attempt(lambda: build.process(entry["process"], where), where)
    fields = {k: v for k, v in entry.items() if k not in ("tokens", "codec", "process")}
    known = {"codec": None, "process": process or STANDING}
    found.attempt(
        lambda: make({"stream": Stream}, {"name": "stream", **fields}, where=where, **known)
    )


def _denoiser(spec: Config, found: Mistakes) -> None:
    """A denoiser whose streams are not known: what can be said of its other fields."""
    made = found.attempt(
        lambda: check_spec(build.DENOISERS, spec, where="system.denoiser", given=("streams",))
    )
    if made is not UViT:
        return
    fields = {k: v for k, v in spec.items() if k not in ("share", "add_features", "time_tokens")}
    streams = {"any": {"kind": "patches", "grid": (8, 8), "channels": 1, "patch": 1}}
    known = {"streams": streams, "time_tokens": ("any",)}
    found.attempt(lambda: make(build.DENOISERS, fields, where="system.denoiser", **known))

"""From a config to objects. The only place that reads a whole config.

What a model must know of its data (``DatasetInfo``: class names, vocabulary, a few captions) is
read from the data at training time and kept in the workdir, so that sampling and evaluation need
the workdir alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jointseg_jax.codecs.bits import Bits, PanopticBits
from jointseg_jax.codecs.chain import Chain
from jointseg_jax.codecs.image_tiny import ImageTiny
from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.codecs.palette import Palette
from jointseg_jax.codecs.pixels import Latents, Pixels
from jointseg_jax.config import make
from jointseg_jax.data import tokenizer as data_text
from jointseg_jax.data.cached.index import index_path
from jointseg_jax.data.cached.reader import Cache
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import BadSample, Source
from jointseg_jax.data.sources.arrayrecord import ArrayRecords
from jointseg_jax.data.sources.features import WithFeatures
from jointseg_jax.data.sources.folders import Folders
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.data.sources.tfds import TFDS
from jointseg_jax.data.transforms import TRANSFORMS
from jointseg_jax.models.text import TEXTS
from jointseg_jax.models.two_stream import TwoStream
from jointseg_jax.models.uvit import UViT
from jointseg_jax.settings_diff import require_same
from jointseg_jax.systems.autoencode import Autoencode
from jointseg_jax.systems.bridge import IMAGE, STATE, Bridge
from jointseg_jax.systems.joint import TEXT_STREAM, Joint
from jointseg_jax.systems.system import Stream
from jointseg_jax.transport.adaptive import Dopri5
from jointseg_jax.transport.discrete import DDIM, DDPM, MultistepDPM
from jointseg_jax.transport.dpm import DPMSolverPP
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import SCHEDULES
from jointseg_jax.transport.solvers import Euler, Heun
from jointseg_jax.transport.times import (
    Grouped,
    HighNoise,
    Independent,
    LogitNormal,
    Shared,
    Uniform,
)
from jointseg_jax.types import UserError

CODECS = {
    "pixels": Pixels,
    "latents": Latents,
    "bits": Bits,
    "panoptic_bits": PanopticBits,
    "label_ae": LabelAE,
    "palette": Palette,
    "image_tiny": ImageTiny,
    "chain": Chain,
}
SOURCES = {"scenes": Scenes, "folders": Folders, "arrayrecord": ArrayRecords, "tfds": TFDS}
DISTRIBUTIONS = {"uniform": Uniform, "logit_normal": LogitNormal, "high_noise": HighNoise}
TIMES = {"shared": Shared, "independent": Independent, "grouped": Grouped}
SOLVERS = {
    "dpm_solver_pp": DPMSolverPP,
    "multistep_dpm": MultistepDPM,
    "ddim": DDIM,
    "ddpm": DDPM,
    "euler": Euler,
    "heun": Heun,
    "dopri5": Dopri5,
}
DENOISERS = {"uvit": UViT, "two_stream": TwoStream}


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a model must know of the data it was trained on."""

    classes: Classes
    vocabulary: tuple[str, ...]
    captions: tuple[str, ...]

    def dump(self) -> str:
        """The info as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @staticmethod
    def load(path: Path) -> DatasetInfo:
        """Reads what ``dump`` gave."""
        values = json.loads(path.read_text())
        c = values["classes"]
        classes = Classes(
            names=tuple(c["names"]),
            isthing=tuple(c["isthing"]),
            palette=tuple(map(tuple, c["palette"])),
            swaps=tuple(map(tuple, c["swaps"])),
            void=c["void"],
        )
        return DatasetInfo(classes, tuple(values["vocabulary"]), tuple(values["captions"]))


def dataset_info(source: Source, *, captions: int = 512) -> DatasetInfo:
    """What a model must know of a source; its first captions are the default prompts."""
    found = []
    for i in range(min(captions, len(source))):
        with contextlib.suppress(BadSample):  # the pipeline reports it, by policy
            found += source[i]["captions"][:1]
    return DatasetInfo(source.classes, tuple(source.words()), tuple(found))


def source(config: Mapping[str, Any], split: str) -> Source:
    """The data source of ``config.data.train`` or ``config.data.val``.

    A cache made of them, with these settings, takes their place: see ``from_cache``.
    """
    if from_cache(config, split):
        return cache(config, split)
    spec = dict(config["data"][split])
    features = spec.pop("features", None)
    found = make(SOURCES, spec, where=f"data.{split}")
    if not features:
        return found
    where = f"data.{split}.features"
    return make({"npy": WithFeatures}, features, where=where, source=found, split=found.split)


def from_cache(config: Mapping[str, Any], split: str) -> bool:
    """Whether ``config.data.cache`` takes the place of ``config.data.train`` or ``.val``.

    Of ``val`` it does where the cache has that split and evaluation has no transforms of its own:
    a cache holds one size, that of training.
    """
    root = config["data"].get("cache")
    if not root or split == "train":
        return bool(root)
    own = config.get("evaluate", {}).get("transforms")
    return not own and index_path(root, split).exists()


def cache(config: Mapping[str, Any], split: str = "train") -> Cache:
    """The cache of ``config.data.cache``, once its settings are found to be the config's.

    Raises:
      UserError: they are not, with each that differs.
    """
    found = Cache(root=config["data"]["cache"], split=split)
    check_cache(config, found.index, split)
    return found


def check_cache(config: Mapping[str, Any], index: Mapping[str, Any], split: str = "train") -> None:
    """Refuses the index of a cache that was made with other settings than this config's.

    Raises:
      UserError: each setting that differs.
    """
    made, now = index["settings"]["config"], cache_settings(config, split)
    latents = index["settings"]["latents"]
    now["codecs"] = {k: v for k, v in now["codecs"].items() if k in latents}
    require_same(
        {**made, "codecs": {k: made["codecs"].get(k) for k in latents}},
        now,
        where=f"ERROR [data] {config['data']['cache']}: this cache",
        remedy="Put these back, or run launch/encode.py again with this config, into another "
        "folder.",
    )


def cache_settings(config: Mapping[str, Any], split: str) -> dict[str, Any]:
    """What of a config decides the contents of its cache, without the folders on this machine."""
    system, data = config["system"], config["data"]
    specs = {k: v["codec"] for k, v in system.get("streams", {}).items() if "codec" in v}
    if "image" in system:
        specs["image"] = system["image"]
    text = system.get("text") or {}
    return plain(
        {
            "data": {k: v for k, v in data[split].items() if k not in ("root", "folder")},
            "transforms": data["transforms"],
            "panoptic": data.get("panoptic", False),
            "size": system["size"],
            "text": {k: text.get(k) for k in ("name", "length")},
            "codecs": {k: {n: v for n, v in c.items() if n != "workdir"} for k, c in specs.items()},
        }
    )


def transforms(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """The paired transforms in the config's order."""
    return _transforms(config["data"]["transforms"], "data.transforms")


def evaluation_transforms(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Those of ``config.evaluate.transforms``, or the training transforms when it is empty."""
    own = config["evaluate"]["transforms"]
    return _transforms(own, "evaluate.transforms") if own else transforms(config)


def _transforms(specs: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    return tuple(make(TRANSFORMS, spec, where=f"{where}.{name}") for name, spec in specs.items())


def instances(config: Mapping[str, Any]) -> int:
    """The highest instance number of the batch field ``panoptic``; 0 where nothing needs one.

    ``config.data.panoptic`` asks for the field; the codec that reads it says how high to number.

    Raises:
      UserError: a stream codes panoptic maps and has no such field.
    """
    streams = config.get("system", {}).get("streams", {})
    wanted = bool(config["data"].get("panoptic", False))
    numbers = []
    for name, stream in streams.items():
        spec = stream.get("codec", {})
        if spec.get("name") != "panoptic_bits":
            continue
        if not wanted or stream["field"] != "panoptic":
            raise UserError(
                f"config.system.streams.{name}: its codec panoptic_bits codes the batch field "
                f"`panoptic`; field = {stream['field']!r} and data.panoptic = {wanted} are given. "
                "Set field='panoptic' and config.data.panoptic=True, or take the codec `bits`."
            )
        numbers.append(2 ** spec.get("instance_bits", PanopticBits.instance_bits) - 1)
    return min(numbers, default=2**PanopticBits.instance_bits - 1) if wanted else 0


def tokenizer(config: Mapping[str, Any], vocabulary: tuple[str, ...]) -> data_text.Words | None:
    """The host side of the text encoder; None where text is no words."""
    spec = config["system"].get("text")
    if not spec or spec["name"] != "words":
        return None
    return data_text.Words(vocabulary=vocabulary, length=spec["length"])


def system(
    config: Mapping[str, Any], info: DatasetInfo, codecs: Mapping[str, Any] | None = None
) -> Any:
    """The system of a config.

    Args:
      known: classes and vocabulary of the data.
      codecs: specs of trained codecs by stream, in place of their ``trained`` entries.
    """
    spec = dict(config["system"])
    name = spec.pop("name", None)
    if name not in SYSTEMS:
        raise UserError(f"config.system.name: {name!r} is unknown; one of: {', '.join(SYSTEMS)}.")
    return SYSTEMS[name](spec, info, codecs or {})


def codec(spec: Mapping[str, Any], info: DatasetInfo, where: str) -> Any:
    """One codec and those it is made of; annotation codecs are told the number of classes."""
    parts = {k: v for k, v in spec.items() if isinstance(v, Mapping) and "name" in v}
    spec = dict(spec) | {k: codec(v, info, f"{where}.{k}") for k, v in parts.items()}
    told = ("bits", "panoptic_bits", "label_ae", "palette")
    if spec.get("name") in told and "classes" not in spec:
        return make(CODECS, spec, where=where, classes=len(info.classes))
    return make(CODECS, spec, where=where)


def autoencode(spec: dict[str, Any], info: DatasetInfo, codecs: Mapping[str, Any]) -> Autoencode:
    """The system that trains one codec."""
    del codecs
    for part in ("codec", "palette"):
        if spec.get(part):
            spec[part] = codec(spec[part], info, f"system.{part}")
    return make({"autoencode": Autoencode}, {"name": "autoencode", **spec}, where="system")


def bridge(spec: dict[str, Any], info: DatasetInfo, codecs: Mapping[str, Any]) -> Bridge:
    """The bridge system: two ends in the image codec's latents and a denoiser that fits them."""
    size = tuple(spec["size"])
    image = codec(codecs.get(IMAGE, spec["image"]), info, "system.image")
    del spec["image"]
    palette = codec(spec.pop("palette"), info, "system.palette")
    mask = Chain(first=palette, second=image)
    shape = mask.latent_shape(size)
    tokens = {"kind": "patches", "grid": shape[:2], "channels": shape[2]} | spec.pop("tokens")
    spec |= {
        "size": size,
        "mask": mask,
        "denoiser": make(
            DENOISERS,
            dict(spec["denoiser"]) | {"time_tokens": (STATE,)},
            where="system.denoiser",
            streams={STATE: tokens},
        ),
        "process": process(spec["process"], "system"),
        "times": times(spec["times"]),
        "solver": make(SOLVERS, spec["solver"], where="system.solver"),
    }
    return make({"bridge": Bridge}, {"name": "bridge", **spec}, where="system")


def joint(spec: dict[str, Any], info: DatasetInfo, codecs: Mapping[str, Any]) -> Joint:
    """The joint system: streams, text, times, solver, and a denoiser that fits the streams."""
    size = tuple(spec["size"])
    entries = {k: dict(v) for k, v in spec["streams"].items()}
    text = text_encoder(spec.get("text"), info)
    tokens, streams = {}, {}
    for name, entry in entries.items():
        where = f"system.streams.{name}"
        look = dict(entry.pop("tokens"))
        if name == TEXT_STREAM:
            entry["codec"] = {"name": "latents", "shape": (text.length, text.width)}
        entry["codec"] = codec(codecs.get(name, entry["codec"]), info, where + ".codec")
        entry["process"] = process(entry["process"], where)
        streams[name] = make({"stream": Stream}, {"name": "stream", **entry}, where=where)
        shape = streams[name].codec.latent_shape(size)
        if len(shape) == 2:
            tokens[name] = {"kind": "tokens", "count": shape[0], "width": shape[1]} | look
        else:
            tokens[name] = {"kind": "patches", "grid": shape[:2], "channels": shape[2]} | look
    denoiser = dict(spec["denoiser"])
    if text is not None and TEXT_STREAM not in streams:
        denoiser["context"] = {"kind": "tokens", "count": text.length, "width": text.width}
    spec |= {
        "size": size,
        "streams": streams,
        "text": text,
        "denoiser": make(DENOISERS, denoiser, where="system.denoiser", streams=tokens),
        "times": times(spec["times"]),
        "solver": make(SOLVERS, spec["solver"], where="system.solver"),
    }
    return make({"joint": Joint}, {"name": "joint", **spec}, where="system")


def process(spec: Mapping[str, Any], where: str) -> Process:
    """One process and its schedule."""
    spec = dict(spec)
    spec["schedule"] = make(SCHEDULES, spec["schedule"], where=where + ".process.schedule")
    return make({"process": Process}, {"name": "process", **spec}, where=where + ".process")


def times(spec: Mapping[str, Any]) -> Any:
    """What draws training times, and its distribution."""
    spec = dict(spec)
    if "distribution" in spec:
        spec["distribution"] = make(
            DISTRIBUTIONS, spec["distribution"], where="system.times.distribution"
        )
    return make(TIMES, spec, where="system.times")


def text_encoder(spec: Mapping[str, Any] | None, info: DatasetInfo) -> Any:
    """The text encoder, told how many words there are; None where text is none."""
    if not spec:
        return None
    if spec.get("name") == "words":
        size = len(info.vocabulary) + data_text.UNKNOWN + 1
        return make(TEXTS, spec, where="system.text", vocabulary_size=size)
    return make(TEXTS, spec, where="system.text")


SYSTEMS = {"joint": joint, "bridge": bridge, "autoencode": autoencode}


def plain(config: Any) -> Any:
    """A config as JSON values: what is stored beside a checkpoint and compared on resume."""
    if isinstance(config, Mapping) or hasattr(config, "items"):
        return {k: plain(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(v) for v in config]
    if isinstance(config, float) and math.isfinite(config) and config == int(config):
        return float(config)
    return config


def from_plain(values: Any) -> Any:
    """A config read back from JSON: sequences are tuples again, as in the files of configs."""
    if isinstance(values, Mapping):
        return {k: from_plain(v) for k, v in values.items()}
    return tuple(map(from_plain, values)) if isinstance(values, list) else values

"""From a config to objects, in one walk.

``system(config.system, info, codecs, problems)`` makes every part by its own constructor. With a
``Problems`` it goes on after a part that cannot be made, so that all mistakes are reported at once;
without one (``RAISE``) it stops at the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jointseg_jax.codecs.bits import Bits, PanopticBits
from jointseg_jax.codecs.chain import Chain
from jointseg_jax.codecs.codec import Codec
from jointseg_jax.codecs.image_tiny import ImageTiny
from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.codecs.palette import Palette
from jointseg_jax.codecs.pixels import Latents, Pixels
from jointseg_jax.config import RAISE, DataConfig, Problems, RunConfig, SystemConfig, plain
from jointseg_jax.data import tokenizer as data_text
from jointseg_jax.data.cached.reader import Cache
from jointseg_jax.data.cached.store import index_path
from jointseg_jax.data.records import DatasetInfo, Source
from jointseg_jax.data.sources.arrayrecord import ArrayRecords
from jointseg_jax.data.sources.features import WithFeatures
from jointseg_jax.data.sources.folders import Folders
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.data.sources.tfds import TFDS
from jointseg_jax.data.transforms import TRANSFORMS, Transform
from jointseg_jax.models.embed import spec_of
from jointseg_jax.models.text import TEXTS
from jointseg_jax.models.two_stream import TwoStream
from jointseg_jax.models.unet import UNet
from jointseg_jax.models.uvit import UViT
from jointseg_jax.settings_diff import require_same
from jointseg_jax.specs import Spec, accepts, check_spec, construct, make
from jointseg_jax.systems.autoencode import Autoencode
from jointseg_jax.systems.bridge import IMAGE, STATE, Bridge
from jointseg_jax.systems.joint import TEXT_STREAM, Joint
from jointseg_jax.systems.system import Stream
from jointseg_jax.transport.adaptive import Dopri5
from jointseg_jax.transport.ancestral import Ancestral
from jointseg_jax.transport.discrete import DDIM, DDPM, MultistepDPM
from jointseg_jax.transport.dpm import DPMSolverPP
from jointseg_jax.transport.loss_weight import WEIGHTS
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import SCHEDULES, Linear
from jointseg_jax.transport.solvers import Euler, Heun
from jointseg_jax.transport.times import (
    Ends,
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
DISTRIBUTIONS = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "high_noise": HighNoise,
    "ends": Ends,
}
TIMES = {"shared": Shared, "independent": Independent, "grouped": Grouped}
SOLVERS = {
    "dpm_solver_pp": DPMSolverPP,
    "multistep_dpm": MultistepDPM,
    "ddim": DDIM,
    "ddpm": DDPM,
    "ancestral": Ancestral,
    "euler": Euler,
    "heun": Heun,
    "dopri5": Dopri5,
}
DENOISERS = {"uvit": UViT, "unet": UNet, "two_stream": TwoStream}


def source(config: RunConfig, split: str) -> Source:
    """The data source of ``config.data.train`` or ``config.data.val``.

    A cache made of them, with these settings, takes their place: see ``from_cache``.
    """
    if from_cache(config, split):
        return cache(config, split)
    found, features = records(config, split), getattr(config.data, split).get("features")
    if not features:
        return found
    where = f"data.{split}.features"
    return make({"npy": WithFeatures}, features, where=where, source=found, split=found.split)


def records(config: RunConfig, split: str) -> Source:
    """The data source itself: no cache takes its place, and no features are added."""
    spec = {k: v for k, v in getattr(config.data, split).items() if k != "features"}
    return make(SOURCES, spec, where=f"data.{split}")


def from_cache(config: RunConfig, split: str) -> bool:
    """Returns True if ``config.data.cache`` takes the place of ``config.data.train`` or ``.val``.

    A cache holds one size, that of training: it stands for ``val`` only where it has that split and
    evaluation has no transforms of its own.
    """
    root = config.data.cache
    if not root or split == "train":
        return bool(root)
    return not config.evaluate.transforms and index_path(root, split).exists()


def cache(config: RunConfig, split: str = "train") -> Cache:
    """The cache of ``config.data.cache``, once its settings are found to be the config's.

    Raises:
      UserError: they are not, with each that differs.
    """
    opened = Cache(root=config.data.cache, split=split)
    check_cache(config, opened.index, split)
    return opened


def check_cache(config: RunConfig, index: Mapping[str, Any], split: str = "train") -> None:
    """Refuses the index of a cache that was made with other settings than this config's.

    Raises:
      UserError: each setting that differs.
    """
    made, now = index["settings"]["config"], cache_settings(config, split)
    # A codec without parameters is applied in the step, so that its settings may differ.
    latents = index["settings"]["latents"]
    now["codecs"] = {k: v for k, v in now["codecs"].items() if k in latents}
    made = {**made, "codecs": {k: made["codecs"].get(k) for k in latents}}
    remedy = "Put these back, or run launch/encode.py again with this config, into another folder."
    require_same(made, now, where=f"ERROR [data] {config.data.cache}: this cache", remedy=remedy)


def cache_settings(config: RunConfig, split: str) -> dict[str, Any]:
    """What of a config decides the contents of its cache, without the folders on this machine."""
    data, text = config.data, config.system.text or {}
    specs = {k: place.spec for k, place in config.system.codecs().items()}
    return plain(
        {
            "data": {k: v for k, v in getattr(data, split).items() if k not in ("root", "folder")},
            "transforms": data.transforms,
            "panoptic": data.panoptic,
            "size": config.system.size,
            "text": {k: text.get(k) for k in ("name", "length")},
            "codecs": {k: {n: v for n, v in c.items() if n != "workdir"} for k, c in specs.items()},
        }
    )


def transforms(data: DataConfig) -> tuple[Transform, ...]:
    """The paired transforms of training, in the config's order."""
    return _transforms(data.transforms, "data.transforms")


def evaluation_transforms(config: RunConfig) -> tuple[Transform, ...]:
    """Those of ``config.evaluate.transforms``, or the training transforms when it is empty."""
    own = config.evaluate.transforms
    return _transforms(own, "evaluate.transforms") if own else transforms(config.data)


def _transforms(specs: Mapping[str, Spec], where: str) -> tuple[Transform, ...]:
    return tuple(make(TRANSFORMS, spec, where=f"{where}.{name}") for name, spec in specs.items())


def instances(config: RunConfig) -> int:
    """The highest instance number of the batch field ``panoptic``; 0 where nothing needs one.

    ``config.data.panoptic`` asks for the field; the codec that reads it says how high to number.

    Raises:
      UserError: a stream codes panoptic maps and has no such field.
    """
    wanted, numbers = config.data.panoptic, []
    for name, stream in config.system.streams.items():
        spec = stream.get("codec", {})
        if CODECS.get(spec.get("name")) is not PanopticBits:
            continue
        if not wanted or stream["field"] != "panoptic":
            raise UserError(
                f"config.system.streams.{name}: its codec panoptic_bits codes the batch field "
                f"`panoptic`; field = {stream['field']!r} and data.panoptic = {wanted} are given. "
                "Set field='panoptic' and config.data.panoptic=True, or take the codec `bits`."
            )
        numbers.append(2 ** spec.get("instance_bits", PanopticBits.instance_bits) - 1)
    return min(numbers, default=2**PanopticBits.instance_bits - 1) if wanted else 0


def tokenizer(config: SystemConfig, vocabulary: tuple[str, ...]) -> data_text.Words | None:
    """The host side of the text encoder; None where text is no words."""
    if not reads_words(config):
        return None
    return data_text.Words(vocabulary=vocabulary, length=needed(config, "text")["length"])


def reads_words(config: SystemConfig) -> bool:
    """Returns True if the text encoder reads token ids rather than features made beforehand."""
    text = config.text
    return bool(text) and "vocabulary_size" in accepts(TEXTS[text["name"]])


# ------------------------------------------------------------------------------- systems


def system(
    config: SystemConfig,
    info: DatasetInfo,
    codecs: Mapping[str, Spec | None] | None = None,
    problems: Problems = RAISE,
) -> Any:
    """The system of a config; None where ``problems`` has collected why there is none.

    Args:
      info: classes and vocabulary of the data.
      codecs: specs of trained codecs by stream, in place of their ``trained`` entries; None for
        one that nobody knows, whose stream is then checked as far as it goes.
    """
    if config.name not in SYSTEMS:
        known = ", ".join(SYSTEMS)
        problems.note(f"config.system.name: {config.name!r} is unknown; one of: {known}.")
        return None
    size = tuple(config.size)
    if len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        problems.note(f"config.system.size = {size}: give (height, width) in pixels, both above 0.")
        return None
    return SYSTEMS[config.name](_Walk(config, info, codecs or {}, problems))


def codec(spec: Spec, info: DatasetInfo, where: str) -> Any:
    """One codec and those it is made of; annotation codecs are given the number of classes."""
    parts = {k: v for k, v in spec.items() if isinstance(v, Mapping) and "name" in v}
    spec = dict(spec) | {k: codec(v, info, f"{where}.{k}") for k, v in parts.items()}
    asks = "classes" not in spec and "classes" in accepts(check_spec(CODECS, spec, where=where))
    return make(CODECS, spec, where=where, **({"classes": len(info.classes)} if asks else {}))


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A walk over ``config.system``, which goes on after what cannot be made."""

    config: SystemConfig
    info: DatasetInfo
    codecs: Mapping[str, Spec | None]
    problems: Problems

    def autoencode(self) -> Autoencode | None:
        """The system that trains one codec."""
        before, fields = len(self.problems), self.config.given
        for part in ("codec", "palette"):
            if spec := fields.get(part):
                fields[part] = self.sized(spec, f"system.{part}")
        if len(self.problems) > before:
            return None
        return self.problems.collect(
            lambda: construct(Autoencode, fields, where="system", name="autoencode"), "system"
        )

    def bridge(self) -> Bridge | None:
        """Two ends in the image codec's latents, and a network that fits them."""
        before, fields, config = len(self.problems), self.config.given, self.config
        spec = self.codecs.get(IMAGE, fields.pop("image"))
        image = None if spec is None else self.sized(spec, "system.image")
        palette = self.sized(fields.pop("palette"), "system.palette")
        fields |= self.sampling()
        fields["process"] = self.problems.collect(
            lambda: process(needed(config, "process"), "system")
        )
        if image is None or len(self.problems) > before:
            self.check_denoiser()
            return None

        def make_bridge() -> Bridge:
            mask, size = Chain(first=palette, second=image), tuple(config.size)
            height, width, channels = mask.latent_shape(size)
            tokens = {"kind": "patches", "grid": (height, width), "channels": channels}
            denoiser = make(
                DENOISERS,
                {**needed(config, "denoiser"), "time_tokens": (STATE,)},
                where="system.denoiser",
                streams={STATE: tokens | fields.pop("tokens")},
            )
            made = fields | {"size": size, "mask": mask, "denoiser": denoiser}
            return construct(Bridge, made, where="system", name="bridge")

        return self.problems.collect(make_bridge, "system")

    def joint(self) -> Joint | None:
        """Streams, text, times, solver, and a network that fits the streams."""
        before, config = len(self.problems), self.config
        text = self.problems.collect(lambda: text_encoder(config.text, self.info))
        streams, tokens = {}, {}
        for name, entry in config.streams.items():
            # features of the prompt, denoised like an image
            if name == TEXT_STREAM and text is not None:
                spec = {"name": "latents", "shape": (text.length, text.width)}
            else:
                spec = self.codecs.get(name, entry["codec"])
            streams[name], tokens[name] = self.stream(name, entry, spec)
        fields = config.given | self.sampling() | {"text": text, "streams": streams}
        if None in streams.values() or len(self.problems) > before:
            self.check_denoiser()
            return None

        def make_joint() -> Joint:
            denoiser = dict(needed(config, "denoiser"))
            if text is not None and TEXT_STREAM not in streams:
                denoiser["context"] = {"kind": "tokens", "count": text.length, "width": text.width}
            network = make(DENOISERS, denoiser, where="system.denoiser", streams=tokens)
            made = fields | {"size": tuple(config.size), "denoiser": network}
            return construct(Joint, made, where="system", name="joint")

        return self.problems.collect(make_joint, "system")

    def stream(
        self, name: str, entry: Mapping[str, Any], spec: Spec | None
    ) -> tuple[Stream | None, Mapping[str, Any] | None]:
        """A stream and how its latents become tokens; None for what cannot be made."""
        where, collect = f"system.streams.{name}", self.problems.collect
        coded = None if spec is None else self.sized(spec, f"{where}.codec")
        moving = collect(lambda: process(entry["process"], where), where)
        fields = {k: v for k, v in entry.items() if k not in ("tokens", "codec", "process")}
        # What cannot be made is stood in for, so that the stream's other fields are checked too.
        parts = {"codec": coded or Pixels(), "process": moving or STANDING}
        stream = collect(
            lambda: construct(Stream, fields, where=where, name="stream", **parts), where
        )
        if coded is None:
            return None, None
        shape = coded.latent_shape(tuple(self.config.size))
        if len(shape) == 2:
            look = {"kind": "tokens", "count": shape[0], "width": shape[1]} | dict(entry["tokens"])
        else:
            look = {"kind": "patches", "grid": shape[:2], "channels": shape[2]}
            look |= dict(entry["tokens"])
            collect(lambda: spec_of(look, where=f"config.{where}.tokens"))
        return (stream if moving is not None else None), look

    def sized(self, spec: Spec, where: str) -> Any:
        """A codec that can code maps of this size; None where it cannot be made or cannot."""

        def make_codec() -> Codec:
            made = codec(spec, self.info, where)
            made.latent_shape(tuple(self.config.size))  # refuses sizes that it cannot code
            return made

        return self.problems.collect(make_codec, where)

    def sampling(self) -> dict[str, Any]:
        """What draws the times of training, and the solver."""
        config, collect, where = self.config, self.problems.collect, "system.solver"
        return {
            "times": collect(lambda: times(needed(config, "times"))),
            "solver": collect(lambda: make(SOLVERS, needed(config, "solver"), where=where)),
        }

    def check_denoiser(self) -> None:
        """A network whose streams are not known: what can be said of its other fields."""
        spec, collect, where = self.config.denoiser, self.problems.collect, "system.denoiser"
        if spec is None:
            return
        network = collect(lambda: check_spec(DENOISERS, spec, where=where, given=("streams",)))
        if network is not UViT:
            return
        unknown = ("share", "add_features", "time_tokens")
        fields = {k: v for k, v in spec.items() if k not in unknown}
        streams = {"any": {"kind": "patches", "grid": (8, 8), "channels": 1, "patch": 1}}
        known = {"streams": streams, "time_tokens": ("any",)}
        collect(lambda: make(DENOISERS, fields, where=where, **known))


def needed(config: SystemConfig, part: str) -> Spec:
    """A part that this system cannot do without.

    Raises:
      UserError: the config has none.
    """
    spec = getattr(config, part)
    if not spec:
        raise UserError(f"config.system.{part}: missing; a system `{config.name}` needs one.")
    return spec


def process(spec: Spec, where: str) -> Process:
    """One process, its schedule and the weight of its loss."""
    where += ".process"
    fields = {k: v for k, v in spec.items() if k != "name"}
    fields["schedule"] = make(SCHEDULES, spec["schedule"], where=where + ".schedule")
    if "weight" in spec:
        weight = spec["weight"]
        if not isinstance(weight, Mapping):
            raise UserError(
                f"config.{where}.weight = {weight!r}: give a mapping with `name`, one of: "
                f"{', '.join(sorted(WEIGHTS))}; a stream's own weight stands beside `process`."
            )
        fields["weight"] = make(WEIGHTS, weight, where=where + ".weight")
    return construct(Process, fields, where=where, name="process")


def times(spec: Spec) -> Any:
    """What draws training times, and its distributions."""
    spec, where = dict(spec), "system.times.distribution"
    if "distribution" in spec:
        spec["distribution"] = make(DISTRIBUTIONS, spec["distribution"], where=where)
    if "distributions" in spec:
        own = spec["distributions"].items()
        spec["distributions"] = {n: make(DISTRIBUTIONS, d, where=f"{where}s.{n}") for n, d in own}
    return make(TIMES, spec, where="system.times")


def text_encoder(spec: Spec | None, info: DatasetInfo) -> Any:
    """The text encoder, given how many words there are; None where there is no text."""
    if not spec:
        return None
    given, where = {}, "system.text"
    if "vocabulary_size" in accepts(check_spec(TEXTS, spec, where=where)):
        given["vocabulary_size"] = len(info.vocabulary) + data_text.UNKNOWN + 1
    return make(TEXTS, spec, where=where, **given)


STANDING = Process(schedule=Linear(), predicts="velocity")
"""For a stream whose own process cannot be made."""

SYSTEMS = {"joint": _Walk.joint, "bridge": _Walk.bridge, "autoencode": _Walk.autoencode}

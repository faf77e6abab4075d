"""What a config takes from data and from other runs, where these are not on this machine.

A program's size depends on its data by three things: the number of classes, the words, and the
shapes of a batch. Data that are here are read; of data that are not, the classes are those of the
published list of the data set, and there are no words. Of a cache (``config.data.cache``) its
index is enough, ``train.json`` and ``frozen/*.json``: the rows need not be here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jointseg_jax import build
from jointseg_jax.config import CodecPlace, RunConfig, SystemConfig, from_plain
from jointseg_jax.data.cached.store import (
    CacheIndex,
    classes_of,
    fields_of,
    index_path,
    read_index,
    text_of,
)
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.data.sources.layouts import published_classes
from jointseg_jax.systems.system import LATENTS, Encodable, Generator, Objective
from jointseg_jax.training.workdir import changed, copied_spec
from jointseg_jax.types import UserError

Config = Mapping[str, Any]
"""A run's config (or a part of it) as plain nested mappings."""

Shapes = dict[str, jax.ShapeDtypeStruct]
"""The fields of a batch."""


@runtime_checkable
class System(Objective, Protocol):
    """What a config trains: an objective that knows the size of its images."""

    size: tuple[int, int]


class Codecs(NamedTuple):
    """The trained codecs of a config, by name."""

    specs: dict[str, Config]
    frozen: dict[str, Any]  # shapes of their parameters


def dataset_info(config: RunConfig, classes: int | None = None) -> DatasetInfo:
    """The classes and words of a config's data, without their captions.

    Args:
      classes: if given, the number of made-up classes; there are no words then.

    Raises:
      UserError: the data are not here and their number of classes is in no list.
    """
    spec = config.data.train
    if classes is not None:
        return _without_words(Classes(names=tuple(f"class {i}" for i in range(classes))))
    # A cache knows what it was made from.
    if index := _index(config):
        return DatasetInfo(classes_of(index), tuple(index["words"]), ())
    # Made scenes have no root; they are always here.
    if "root" not in spec or Path(spec["root"]).is_dir():
        return DatasetInfo.of(build.source(config, "train"), captions=0)
    published = published_classes(spec)
    if published is None:
        raise UserError(
            f"config.data.train.root = {spec['root']}: not on this machine, and nothing says how "
            "many classes it has. Give --classes=N."
        )
    return _without_words(published)


def _without_words(classes: Classes) -> DatasetInfo:
    return DatasetInfo(classes, (), ())


def _index(config: RunConfig) -> CacheIndex | None:
    """The index of the config's cache, which must have been made with its settings."""
    if not build.from_cache(config, "train"):
        return None
    index = read_index(index_path(config.data.cache, "train"))
    build.check_cache(config, index)
    return index


def codecs(config: RunConfig, info: DatasetInfo, other: SystemConfig | None = None) -> Codecs:
    """The codecs that a config takes from other runs.

    Args:
      other: the system of the run that would train a codec that is not here.

    Raises:
      UserError: a codec's run is not here and no config replaces it, or it is not a codec's.
    """
    specs, shapes = {}, {}
    for name, place in config.system.trained_codecs().items():
        specs[name] = _cached_spec(config, name) or _trained_spec(place, other)
        codec = build.codec(specs[name], info, place.where)
        shapes[name] = jax.eval_shape(codec.init, jax.random.key(0))
    return Codecs(specs, shapes)


def _cached_spec(config: RunConfig, name: str) -> Config | None:
    """The spec of a codec that the config's cache was encoded with."""
    root = config.data.cache
    kept = copied_spec(Path(root), name) if root else None
    return None if kept is None else from_plain(kept)


def _trained_spec(place: CodecPlace, other: SystemConfig | None) -> Config:
    """The spec of a codec as its run, or the config of such a run, has it."""
    spec = _system_of(place, other)
    if spec.codec is None or spec.field != place.field:
        raise UserError(
            f"{place.where}: a codec of {place.field} is needed, and the config given for it "
            f"trains `{spec.name}` of {spec.field}. Give another --codec."
        )
    return changed(spec.codec, place)  # a scale that is to be fitted changes no shape


def _system_of(place: CodecPlace, other: SystemConfig | None) -> SystemConfig:
    path = Path(place.spec["workdir"]) / "config.json"
    if path.exists():
        return SystemConfig.parse(from_plain(json.loads(path.read_text()))["system"])
    if other is None:
        raise UserError(
            f"{place.where}: the run {place.spec['workdir']} is not on this machine. Say what it "
            "would train: --codec=CONFIG, for example --codec=configs/"
            f"{'image_codec' if place.field == 'image' else 'jodiffusion_codec'}.py"
        )
    return other


def batch_shapes(config: RunConfig, system: System, rows: int) -> Shapes:
    """The fields of a training batch on the device, as ``data.pipeline`` makes them.

    A precomputed feature that no stream and no text encoder reads has an unknown shape; it is left
    out, as the compiler leaves it out.
    """
    size = tuple(system.size)
    fields: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((*size, 3), jnp.uint8),  # [b, h, w, 3]
        "labels": (size, jnp.int16),  # [b, h, w]
    }
    text = getattr(system, "text", None)
    if build.instances(config):
        fields["panoptic"] = ((*size, 2), jnp.int16)  # [b, h, w, 2]: class, instance
    if text is not None and build.reads_words(config.system):
        fields["text"] = ((text.length,), jnp.int32)  # [b, l]
    elif text is not None:
        fields["text"] = ((text.length, text.width), jnp.float32)  # [b, l, d]
    for stream in getattr(system, "streams", {}).values():
        if stream.field not in fields:
            fields[stream.field] = (tuple(stream.codec.latent_shape(size)), jnp.float32)
    return {k: jax.ShapeDtypeStruct((rows, *shape), kind) for k, (shape, kind) in fields.items()}


def training_shapes(
    config: RunConfig, system: System, rows: int, frozen: Mapping[str, object] | None = None
) -> Shapes:
    """``batch_shapes``, or the fields of the config's cache.

    Args:
      frozen: the codecs' parameters, or their shapes. The batch holds the latents of those codecs
        that have any, as in a cache that is still to be made; None: there will be no cache.
    """
    index = _index(config)
    if index is not None:
        fields = [*fields_of(index), *filter(None, [text_of(index)])]
        return {f.name: jax.ShapeDtypeStruct((rows, *f.shape), f.read_kind) for f in fields}
    plain = batch_shapes(config, system, rows)
    if frozen is None or not isinstance(system, Encodable):
        return plain
    made = {}
    for name, value in system.inputs().items():
        # A codec without parameters has nothing to encode beforehand.
        if frozen.get(name):
            latents = jax.eval_shape(value.codec.encode, frozen[name], plain[value.field])
            made[LATENTS + name] = jax.ShapeDtypeStruct(latents.shape, jnp.float16)
        else:
            made[value.field] = plain[value.field]
    return made


def with_denoiser(config: RunConfig, **fields: object) -> RunConfig:
    """The config with other fields of its denoiser; those that are None stay as they are.

    Raises:
      UserError: the system has no denoiser.
    """
    changes = {k: v for k, v in fields.items() if v is not None}
    if not changes:
        return config
    if config.system.denoiser is None:
        raise UserError(
            f"ERROR [flags] --{', --'.join(changes)}: these change the denoiser, and a system "
            f"`{config.system.name}` has none."
        )
    return config.replace({f"system.denoiser.{name}": value for name, value in changes.items()})


def with_steps(system: Generator, steps: int | None) -> Generator:
    """The system with another number of solver steps."""
    if steps is None:
        return system
    try:
        return dataclasses.replace(system, solver=dataclasses.replace(system.solver, steps=steps))
    except (ValueError, TypeError) as error:
        raise UserError(f"ERROR [flags] --steps={steps}: {error}") from error

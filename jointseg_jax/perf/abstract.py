"""What a config takes from data and from other runs, where these are not on this machine.

A program's size depends on its data by three facts: the number of classes, the words, and the shape
of what a batch holds. Present data are asked; the classes of absent ones are those of the data
set's published list, and there are no words. Of a cache (``config.data.cache``) its index is
enough, ``train.json`` and ``frozen/*.json``: the rows themselves need not be here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jointseg_jax import build
from jointseg_jax.data.cached.index import (
    CacheIndex,
    classes_of,
    fields_of,
    index_path,
    read_index,
    text_of,
)
from jointseg_jax.data.class_lists import CLASS_LISTS
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.sources.layouts import LAYOUT_CLASSES
from jointseg_jax.systems.system import LATENTS, Encodable
from jointseg_jax.training.workdir import RESERVED_KEYS, TrainedCodec, copied_spec, trained_codecs
from jointseg_jax.types import UserError

Shapes = dict[str, jax.ShapeDtypeStruct]


class Codecs(NamedTuple):
    """The trained codecs of a config: their specs, and the shapes of their parameters, by name."""

    specs: dict[str, Any]
    frozen: dict[str, Any]


def dataset_info(config: Mapping[str, Any], classes: int | None = None) -> build.DatasetInfo:
    """The facts of a config's data, without their captions.

    Args:
      classes: so many made-up classes and no words, whatever the data.

    Raises:
      UserError: the data are not here and their number of classes is in no list.
    """
    spec = config["data"]["train"]
    if classes is not None:
        return _without_data(Classes(names=tuple(f"class {i}" for i in range(classes))))
    if index := _index(config):
        return build.DatasetInfo(classes_of(index), tuple(index["words"]), ())
    if "root" not in spec or Path(spec["root"]).is_dir():
        return build.dataset_info(build.source(config, "train"), captions=0)
    name = spec.get("classes") or LAYOUT_CLASSES.get(spec.get("layout"))
    if name not in CLASS_LISTS:
        raise UserError(
            f"config.data.train.root = {spec['root']}: not on this machine, and nothing says how "
            "many classes it has. Give --classes=N."
        )
    return _without_data(CLASS_LISTS[name])


def _without_data(classes: Classes) -> build.DatasetInfo:
    return build.DatasetInfo(classes, (), ())


def _index(config: Mapping[str, Any]) -> CacheIndex | None:
    """The index of the config's cache, which must have been made with its settings."""
    if not build.from_cache(config, "train"):
        return None
    index = read_index(index_path(config["data"]["cache"], "train"))
    build.check_cache(config, index)
    return index


def codecs(
    config: Mapping[str, Any], info: build.DatasetInfo, other: Mapping[str, Any] | None = None
) -> Codecs:
    """The codecs that a config takes from other runs.

    Args:
      other: the config of the run that would train an absent one.

    Raises:
      UserError: a codec's run is not here and no config stands in for it, or it is not a codec's.
    """
    specs, shapes = {}, {}
    for name, place in trained_codecs(config).items():
        if held := _held(config, name):
            specs[name], shapes[name] = held, _shapes(held, info, place)
            continue
        spec = _system_of(place, other)
        if spec["name"] != "autoencode" or spec.get("field", "labels") != place.field:
            raise UserError(
                f"{place.where}: a codec of {place.field} is needed, and the config given for it "
                f"trains `{spec['name']}` of {spec.get('field', 'labels')}. Give another --codec."
            )
        codec = dict(spec["codec"])
        codec |= {k: v for k, v in place.spec.items() if k not in RESERVED_KEYS}
        scale = place.spec.get("scale", codec.get("scale"))
        if scale is not None:
            codec["scale"] = 1.0 if scale == "fit" else scale  # a fitted number changes no shape
        specs[name], shapes[name] = codec, _shapes(codec, info, place)
    return Codecs(specs, shapes)


def _held(config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The spec of a codec that the config's cache was encoded with."""
    root = config["data"].get("cache")
    held = copied_spec(Path(root), name) if root else None
    return None if held is None else build.from_plain(held)


def _shapes(spec: Mapping[str, Any], info: build.DatasetInfo, place: TrainedCodec) -> Any:
    return jax.eval_shape(build.codec(spec, info, place.where).init, jax.random.key(0))


def _system_of(place: TrainedCodec, other: Mapping[str, Any] | None) -> dict[str, Any]:
    path = Path(place.spec["workdir"]) / "config.json"
    if path.exists():
        return dict(build.from_plain(json.loads(path.read_text()))["system"])
    if other is None:
        raise UserError(
            f"{place.where}: the run {place.spec['workdir']} is not on this machine. Say what it "
            "would train: --codec=CONFIG, for example --codec=configs/"
            f"{'image_codec' if place.field == 'image' else 'jodiffusion_codec'}.py"
        )
    return dict(other["system"])


def batch_shapes(config: Mapping[str, Any], system: Any, rows: int) -> Shapes:
    """The fields of a training batch on the device, as ``data.pipeline`` makes them.

    A precomputed feature that no stream and no text encoder reads has a shape that nobody knows;
    it is left out, as the compiler leaves it out.
    """
    size = tuple(system.size)
    fields: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((*size, 3), jnp.uint8),
        "labels": (size, jnp.int16),
    }
    text = getattr(system, "text", None)
    if build.instances(config):
        fields["panoptic"] = ((*size, 2), jnp.int16)
    if text is not None and config["system"]["text"]["name"] == "words":
        fields["text"] = ((text.length,), jnp.int32)
    elif text is not None:
        fields["text"] = ((text.length, text.width), jnp.float32)
    for stream in getattr(system, "streams", {}).values():
        if stream.field not in fields:
            fields[stream.field] = (tuple(stream.codec.latent_shape(size)), jnp.float32)
    return {k: jax.ShapeDtypeStruct((rows, *shape), kind) for k, (shape, kind) in fields.items()}


def training_shapes(
    config: Mapping[str, Any], system: Any, rows: int, kept: Mapping[str, Any] | None = None
) -> Shapes:
    """``batch_shapes``, or the fields of the config's cache.

    Args:
      kept: shapes of the codecs' parameters: the latents of those that have any are in the
        batch, as in a cache that is still to be made; None where there will be none.
    """
    index = _index(config)
    if index is not None:
        fields = [*fields_of(index), *filter(None, [text_of(index)])]
        return {f.name: jax.ShapeDtypeStruct((rows, *f.shape), f.read_kind) for f in fields}
    plain = batch_shapes(config, system, rows)
    if kept is None or not isinstance(system, Encodable):
        return plain
    made = {}
    for name, value in system.inputs().items():
        if kept.get(name):
            latents = jax.eval_shape(value.codec.encode, kept[name], plain[value.field])
            made[LATENTS + name] = jax.ShapeDtypeStruct(latents.shape, jnp.float16)
        else:
            made[value.field] = plain[value.field]
    return made


def with_denoiser(config: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """The config with other fields of its denoiser; those that are None stay as they are.

    Raises:
      UserError: the system has no denoiser.
    """
    changes = {k: v for k, v in fields.items() if v is not None}
    if not changes:
        return dict(config)
    if "denoiser" not in config["system"]:
        raise UserError(
            f"ERROR [flags] --{', --'.join(changes)}: these change the denoiser, and a system "
            f"`{config['system']['name']}` has none."
        )
    denoiser = dict(config["system"]["denoiser"]) | changes
    return dict(config) | {"system": dict(config["system"]) | {"denoiser": denoiser}}


def with_steps(system: Any, steps: int | None) -> Any:
    """The system with another number of solver steps."""
    if steps is None:
        return system
    try:
        return dataclasses.replace(system, solver=dataclasses.replace(system.solver, steps=steps))
    except (ValueError, TypeError) as error:
        raise UserError(f"ERROR [flags] --steps={steps}: {error}") from error

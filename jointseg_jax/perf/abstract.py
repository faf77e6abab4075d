"""The model under test, where neither its data nor the runs it builds on need be on this machine.

A program's size depends on its data by three things: the number of classes, the words, and the
shapes of a batch. Data that are here are read; of data that are not, the classes are those of the
published list of the data set, and there are no words. Of a cache (``config.data.cache``) its
index is enough, ``train.json`` and ``frozen/*.json``: the rows need not be here.

What is run has random weights and rows, never constant ones: chips draw less power, and so run
faster, on zeros.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax import build
from jointseg_jax.config import CodecPlace, RunConfig, SystemConfig, from_plain
from jointseg_jax.data.cached.loader import CachedBatches
from jointseg_jax.data.cached.store import (
    CacheIndex,
    classes_of,
    fields_of,
    index_path,
    read_index,
    text_of,
)
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.pipeline import Batches, batches
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.data.sources.layouts import published_classes
from jointseg_jax.perf.harness import BenchConfig, Config, Values
from jointseg_jax.systems.system import LATENTS, Encodable, Generator, Objective
from jointseg_jax.training.workdir import changed, copied_spec, load_run
from jointseg_jax.types import Params, UserError

Shapes = dict[str, jax.ShapeDtypeStruct]
"""The fields of a batch."""


@runtime_checkable
class System(Objective, Protocol):
    """What a config trains: an objective that knows the size of its images."""

    size: tuple[int, int]


# -------------------------------------------------------------------- sizes, without data


class Codecs(NamedTuple):
    """The trained codecs of a config, by name."""

    specs: dict[str, Config]
    frozen: Params  # shapes of their parameters


def dataset_info(config: RunConfig, classes: int | None = None) -> DatasetInfo:
    """The classes and words of a config's data, without their captions.

    Args:
      classes: if given, the number of made-up classes; there are no words then.

    Raises:
      UserError: the data are not here and their number of classes is in no list.
    """
    if classes is not None:
        names = tuple(f"class {i}" for i in range(classes))
        return DatasetInfo(Classes(names=names), (), ())
    # A cache knows what it was made from.
    if index := _index(config):
        return DatasetInfo(classes_of(index), tuple(index["words"]), ())
    spec = config.data.train
    if is_here(spec):
        return DatasetInfo.of(build.source(config, "train"), captions=0)
    published = published_classes(spec)
    if published is None:
        raise UserError(
            f"config.data.train.root = {spec['root']}: not on this machine, and nothing says how "
            "many classes it has. Give --classes=N."
        )
    return DatasetInfo(published, (), ())


def is_here(spec: Config) -> bool:
    """Returns True if a source's data are on this machine."""
    # Made scenes have no root; they are always here.
    return "root" not in spec or Path(spec["root"]).is_dir()


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
        root = config.data.cache
        # What the config's cache was encoded with comes first.
        kept = copied_spec(Path(root), name) if root else None
        specs[name] = _trained_spec(place, other) if kept is None else from_plain(kept)
        codec = build.codec(specs[name], info, place.where)
        shapes[name] = jax.eval_shape(codec.init, jax.random.key(0))
    return Codecs(specs, shapes)


def _trained_spec(place: CodecPlace, other: SystemConfig | None) -> Config:
    """The spec of a codec as its run, or the config of such a run, has it."""
    run = place.spec["workdir"]
    path = Path(run) / "config.json"
    if path.exists():
        other = SystemConfig.parse(from_plain(json.loads(path.read_text()))["system"])
    if other is None:
        raise UserError(
            f"{place.where}: the run {run} is not on this machine. Say what it would train: "
            "--codec=CONFIG, for example --codec=configs/"
            f"{'image_codec' if place.field == 'image' else 'jodiffusion_codec'}.py"
        )
    if other.codec is None or other.field != place.field:
        raise UserError(
            f"{place.where}: a codec of {place.field} is needed, and the config given for it "
            f"trains `{other.name}` of {other.field}. Give another --codec."
        )
    return changed(other.codec, place)  # a scale that is to be fitted changes no shape


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
    if text is not None:
        words = build.reads_words(config.system)  # [b, l] ids, else [b, l, d] features
        ids, features = ((text.length,), jnp.int32), ((text.length, text.width), jnp.float32)
        fields["text"] = ids if words else features
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
    if index := _index(config):
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
    if changes and config.system.denoiser is None:
        raise UserError(
            f"ERROR [flags] --{', --'.join(changes)}: these change the denoiser, and a system "
            f"`{config.system.name}` has none."
        )
    paths = {f"system.denoiser.{name}": value for name, value in changes.items()}
    return config.replace(paths) if paths else config


def sampling_system(system: object, steps: int | None, given: str | None) -> Generator:
    """The system as it samples.

    Args:
      steps: of the solver; None: the system's own.
      given: the batch field that pairs start from, if any.

    Raises:
      UserError: the system makes no pairs, not with these steps, or not from this field.
    """
    if not isinstance(system, Generator):
        raise UserError(
            "ERROR [flags] --what=sample: this config trains a codec; it makes no pairs."
        )
    if steps is not None:
        try:
            solver = dataclasses.replace(system.solver, steps=steps)
            system = dataclasses.replace(system, solver=solver)
        except (ValueError, TypeError) as error:
            raise UserError(f"ERROR [flags] --steps={steps}: {error}") from error
    try:
        system.check_condition((given,) if given else ())
    except ValueError as error:
        raise UserError(f"{error} On the command line: --given=labels or --given=image.") from error
    return system


# ----------------------------------------------------------- weights and rows, to run it


def run_config(bench: BenchConfig) -> RunConfig:
    """The config of a benchmark, with its own number of rows where it says how many."""
    return RunConfig.parse({**bench.config, **({"batch": bench.batch} if bench.batch else {})})


DESCRIBED = ("depth", "width", "heads", "dtype", "attention", "remat", "scan")
"""Fields of a network that its speed depends on."""


class ModelUnderTest(NamedTuple):
    """A system and what it needs."""

    config: RunConfig
    info: DatasetInfo
    system: System | Generator
    params: Params | None  # of a trained run; None: they are to be drawn
    frozen: Params  # of the codecs that are not trained
    notes: tuple[str, ...]

    def facts(self) -> Values:
        """Plain values that the speed depends on."""
        network = getattr(self.system, "denoiser", None)
        out: Values = {
            "system": self.config.system.name,
            "size": list(self.system.size),
            "classes": len(self.info.classes),
            "words": len(self.info.vocabulary),
        }
        if network is not None:
            out["network"] = type(network).__name__
            out["tokens"] = max(span.stop for span in network.spans().values())
            fields = {k: getattr(network, k) for k in DESCRIBED if hasattr(network, k)}
            out |= {k: v if isinstance(v, int) else str(v) for k, v in fields.items()}
        return out | {"notes": list(self.notes)}

    @property
    def dtype(self) -> str:
        """The number type of the network's products."""
        network = getattr(self.system, "denoiser", None)
        return str(jnp.dtype(getattr(network, "dtype", "float32")))


def model_under_test(bench: BenchConfig) -> ModelUnderTest:
    """The system of a benchmark: a trained run's, or its config's with random weights.

    Raises:
      UserError: sizes that are unknown without the data.
    """
    if bench.workdir:
        run = load_run(bench.workdir)
        note = f"trained: {bench.workdir}, step {run.step}"
        return ModelUnderTest(run.config, run.info, run.system, run.params, run.frozen, (note,))
    config = run_config(bench)
    info = dataset_info(config, bench.classes or None)
    other = SystemConfig.parse(bench.codec["system"]) if bench.codec else None
    specs = codecs(config, info, other).specs
    # Random weights: speed depends on shapes and dtypes alone.
    frozen = {
        name: build.codec(spec, info, name).init(jax.random.key(n))
        for n, (name, spec) in enumerate(specs.items())
    }
    system = build.system(config.system, info, specs)
    return ModelUnderTest(config, info, system, None, frozen, ("random weights",))


def random_rows(info: DatasetInfo, shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """A host batch with fields of these shapes, all of them random."""
    rng, classes = np.random.default_rng(seed), len(info.classes)
    words = max(len(info.vocabulary), 1)
    limits = {"image": 256, "labels": classes, "text": words, "panoptic": classes}

    def draw(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if np.issubdtype(dtype, np.integer):
            return rng.integers(limits[name], size=shape).astype(dtype)
        return rng.standard_normal(shape, np.float32).astype(dtype)

    return {name: draw(name, field.shape, field.dtype) for name, field in shapes.items()}


def real_batches(config: RunConfig, info: DatasetInfo) -> Batches | CachedBatches:
    """The batches of the config's training data, as a run gets them."""
    tokenizer = build.tokenizer(config.system, info.vocabulary)
    return batches(
        build.source(config, "train"),
        config.data,
        batch=config.batch,
        seed=config.seed,
        transforms=build.transforms(config.data),
        tokenizer=tokenizer.encode if tokenizer else None,
        instances=build.instances(config),
    )

"""What an encoding writes, decided from the config, the options and the first record.

Every process decides the same. A trained codec is copied into ``OUT/frozen`` first, its scale
fitted as a run would; a run from the cache takes it from there.

An input whose codec has parameters (``label_ae``, ``image_tiny``, ...) is kept as latents, in the
batch field ``latents/NAME``. One whose codec has none (pixels, bits, palette), or draws other
latents each time, is kept as it is. Text is kept once for all rows that have the same: token ids by
caption, features by record. Of validation everything is kept as it is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax import build, sharding
from jointseg_jax.codecs.codec import Codec
from jointseg_jax.config import RunConfig, plain
from jointseg_jax.data.cached.store import Field, row_bytes
from jointseg_jax.data.cached.views import ViewReader, Views
from jointseg_jax.data.labels import to_content
from jointseg_jax.data.pipeline import batches, check_source, make_rows
from jointseg_jax.data.records import DatasetInfo, Source
from jointseg_jax.rng import sample_keys
from jointseg_jax.systems.joint import TEXT_STREAM
from jointseg_jax.systems.system import LATENTS, Encodable, Input
from jointseg_jax.training import pretrained
from jointseg_jax.training.workdir import load_codecs
from jointseg_jax.types import Array, Params, UserError

Row = Mapping[str, np.ndarray]
"""The fields of one row of a batch, without the batch axis."""

DTYPES = ("float16", "bfloat16", "float32")
"""Of latents and features.

float16 has 11 significant bits, three more than the bfloat16 that denoisers compute in: its error
is 2^-12 of the value, far below the least noise of a schedule (0.03). What leaves its range (65504)
is refused; bfloat16 holds that in as little space, and float32 every bit in twice the space.
"""


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What to encode, and how it is kept."""

    out: Path  # folder of the cache
    split: str = "train"  # or "val", of config.data
    dtype: str = "float16"  # of latents and features
    latents: tuple[str, ...] | None = None  # inputs kept as latents; None: by their codecs
    keep: tuple[str, ...] = ()  # further batch fields to keep (image, labels)
    crops: int = 0  # random crops of each record; 0: the centre's
    limit: int | None = None  # at most this many records, from the first
    batch: int = 32  # rows that a device encodes at a time
    shard: int = 256 << 20  # bytes of a shard, about
    workers: int = 0  # processes that read; 0: threads of this one
    threads: int = 4  # that read, in each process

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(
                f"ERROR [encode] dtype={self.dtype!r}; one of: {', '.join(DTYPES)}. Set --dtype."
            )
        least = {"batch": 1, "shard": 1, "threads": 1, "limit": 1, "crops": 0, "workers": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UserError(f"ERROR [encode] {name}={value}; must be at least {bound}.")
        if self.split == "val" and (self.latents is not None or self.keep):
            raise UserError(
                "ERROR [flags] --split=val: all that its records have is kept, for previews and "
                "evaluation read pixels and labels; leave --latents and --keep out."
            )


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Fields of rows, and where their values come from."""

    fields: tuple[Field, ...]  # of each row
    latents: tuple[str, ...] = ()  # inputs among them that are kept as latents
    text: Field | None = None  # None where nothing reads any
    words: bool = False  # text is token ids of captions, not features of records
    plain: tuple[tuple[str, str], ...] = ()  # inputs coded in each step, and their batch fields


def contents(
    options: EncodeOptions,
    info: DatasetInfo,
    encoder: BatchEncoder | None,
    row: Row,
    length: int | None,
) -> Contents:
    """Decides what to keep by the first row of the data.

    Args:
      encoder: of the config's codecs; None for validation.
      length: token ids of a caption, where text is words.

    Raises:
      UserError: a batch field that does not exist, or latents that cannot be kept.
    """
    latents, made, inputs, wanted = (), [], {}, list(row)
    if encoder is not None:
        latents, inputs = _latents(options, encoder, row), encoder.inputs
        made = [
            Field(name=LATENTS + name, dtype=options.dtype, shape=encoder.shape(name, row))
            for name in latents
        ]
        wanted = [value.field for name, value in inputs.items() if name not in latents]
        wanted += options.keep
    text = None if length is None else Field(name=TEXT_STREAM, dtype="int32", shape=(length,))
    for name in dict.fromkeys(wanted):  # each once, in order: two inputs may read one field
        if name == TEXT_STREAM and length is not None:
            continue
        if name not in row:
            raise UserError(
                f"ERROR [encode] the batch field {name!r} is needed, and records have "
                f"{', '.join(row)}. Check config.data and --keep."
            )
        dtype = _dtype(options, info, name, row[name])
        field = Field(name=name, dtype=dtype, shape=row[name].shape)
        if name == TEXT_STREAM:
            text = field
        else:
            made.append(field)
    plain = tuple(
        (k, v.field) for k, v in inputs.items() if v.codec is not None and k not in latents
    )
    words = length is not None
    return Contents(fields=tuple(made), latents=latents, text=text, words=words, plain=plain)


def _latents(options: EncodeOptions, encoder: BatchEncoder, row: Row) -> tuple[str, ...]:
    """The inputs to keep as latents."""
    given = options.latents
    coded = [name for name, value in encoder.inputs.items() if value.codec is not None]
    unknown = sorted(set(given or ()) - set(coded))
    if unknown:
        raise UserError(
            f"ERROR [flags] --latents={','.join(unknown)}: no codec encodes that; one of: "
            f"{', '.join(coded)}."
        )
    wanted = [k for k in coded if encoder.params.get(k)] if given is None else given
    drawn = [k for k in wanted if encoder.draws(k, row)]
    if given is not None and drawn:
        raise UserError(
            f"ERROR [flags] --latents={','.join(drawn)}: this codec draws its latents anew "
            "each time (a sample, or a perturbation), and a cache holds one draw. Switch that "
            "off in the codec's config, or leave it out of --latents."
        )
    return tuple(k for k in wanted if k not in drawn)


def _dtype(options: EncodeOptions, info: DatasetInfo, name: str, values: np.ndarray) -> str:
    if np.issubdtype(values.dtype, np.floating):
        return options.dtype
    # the package's int16 or int32 of labels in a quarter of the space, VOID = -1 included
    small = name == "labels" and len(info.classes) <= np.iinfo(np.int8).max + 1
    return "int8" if small else values.dtype.name


class BatchEncoder:
    """From rows of a batch field to latents, on the devices of this process.

    Args:
      inputs: what the system reads of a batch.
      params: the codecs' parameters by the names of the inputs, ``{}`` or absent without any.
      batch: rows that each device encodes at a time; the attribute counts those of all devices.
    """

    def __init__(self, inputs: Mapping[str, Input], params: Mapping[str, Params], *, batch: int):
        # processes encode different shards: a mesh over all devices would make them wait
        self._mesh = sharding.own_mesh()
        self.inputs, self.batch = dict(inputs), batch * self._mesh.size
        self.params = jax.device_put(dict(params), sharding.replicated(self._mesh))
        self._codecs = {k: v.codec for k, v in inputs.items() if v.codec is not None}
        self._programs = {
            k: jax.jit(functools.partial(self._encode, codec)) for k, codec in self._codecs.items()
        }

    def shape(self, name: str, row: Row) -> tuple[int, ...]:
        """The shape of one row of latents."""
        encode, one = self._codecs[name].encode, row[self.inputs[name].field][None]
        return jax.eval_shape(encode, self.params.get(name, {}), one).shape[1:]

    def draws(self, name: str, row: Row) -> bool:
        """Returns True if other keys give this row other latents."""
        rows = np.repeat(row[self.inputs[name].field][None], self.batch, axis=0)
        one, other = (np.asarray(self._run(name, rows, seed)) for seed in (0, 1))
        return not np.array_equal(one, other, equal_nan=True)

    def __call__(self, name: str, values: np.ndarray) -> list[Array]:
        """Starts to encode rows; the last batch is filled up with its last row."""
        # one shape only, so that each codec is compiled once
        fill = np.repeat(values[-1:], -len(values) % self.batch, axis=0)
        whole = np.concatenate([values, fill])
        starts = range(0, len(whole), self.batch)
        return [self._run(name, whole[i : i + self.batch], 0) for i in starts]

    def _run(self, name: str, values: np.ndarray, seed: int) -> Array:
        rows = jax.device_put(values, sharding.batch_sharding(self._mesh))
        return self._programs[name](self.params.get(name, {}), rows, np.uint32(seed))

    def _encode(self, codec: Codec, params: Params, values: Array, seed: Array) -> Array:
        keys = sample_keys(seed, jnp.arange(self.batch, dtype=jnp.uint32))
        return codec.encode(params, values, keys=keys).astype(jnp.float32)


class Plan:
    """An encoding before anything is written but the codecs."""

    def __init__(self, config: RunConfig, options: EncodeOptions):
        # The data are read themselves, whatever cache the config would train from.
        self.config = config = config.replace({"data.cache": ""})
        self.options, self.train = options, options.split == "train"
        if options.split == "val" and config.evaluate.transforms:
            raise UserError(
                "ERROR [encode] --split=val: config.evaluate.transforms give evaluation a size of "
                "its own, and a cache holds one size, that of training: such a run reads "
                "config.data.val. Leave this split out."
            )
        self.source: Source = build.source(config, options.split)
        check_source(self.source)
        self.records = min(options.limit or len(self.source), len(self.source))
        self.info = DatasetInfo.of(self.source, captions=0)
        self.tokenizer = build.tokenizer(config.system, self.info.vocabulary)
        rows = make_rows(
            self.source,
            build.transforms(config.data),
            tokenizer=None,
            seed=config.seed,
            batch=1,
            train=self.train,
            bad=config.data.bad,
            mark=False,
            instances=build.instances(config),
        )
        self.views = Views(
            transforms=rows.transforms, crops=options.crops, seed=config.seed, train=self.train
        )
        self.viewer = ViewReader(rows=rows, views=self.views)
        self.encoder = self._encoder() if self.train else None  # of validation nothing is encoded
        self.contents = contents(
            options,
            self.info,
            self.encoder,
            {k: v[0] for k, v in self.viewer(0).fields.items()},
            self.tokenizer.length if self.tokenizer else None,
        )
        self.per_shard = max(1, options.shard // self._record_bytes())
        self.shards = -(-self.records // self.per_shard)
        self.bytes = self.records * self._record_bytes()  # at most: records may share texts

    def _encoder(self) -> BatchEncoder:
        options, config = self.options, self.config
        pretrained.check_unchanged(options.out, config.system, self.info)
        pretrained.import_codecs(options.out, config.system, self.info, self._training_batches())
        specs, params = load_codecs(options.out, config.system)
        system = build.system(config.system, self.info, specs)
        if not isinstance(system, Encodable):
            raise UserError(
                f"ERROR [encode] config.system.name: a system `{config.system.name}` trains "
                "its own codec, whose latents change with every step; give the config of a run "
                "that uses a trained codec."
            )
        return BatchEncoder(system.inputs(), params, batch=options.batch)

    def _training_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches that a run of this config begins with, read when a scale is fitted."""
        config = self.config
        with batches(
            self.source,
            config.data,
            batch=config.batch,
            seed=config.seed,
            transforms=build.transforms(config.data),
            instances=build.instances(config),
        ) as found:
            yield from found

    def records_of(self, shard: int) -> range:
        """The numbers of the records in a shard."""
        first = shard * self.per_shard
        return range(first, min(first + self.per_shard, self.records))

    def _record_bytes(self) -> int:
        # token ids are kept once per caption in a table of their own, not with the records
        text = self.contents.text
        size = self.views.count * row_bytes(self.contents.fields)
        return size + (row_bytes([text]) if text and not self.contents.words else 0)

    def text(self, *, begun: bool) -> str:
        """What will be in the cache, some of which is there if it was ``begun``, as text."""
        out, split = self.options.out, self.options.split
        each = "caption" if self.contents.words else "text of a record"
        kinds = [(f, "a row") for f in self.contents.fields]
        kinds += [(self.contents.text, f"for each different {each}")] if self.contents.text else []
        lines = [
            f"  {f.name:20} {f.dtype} {list(f.shape)}  {size_text(f.stride)} {of}"
            for f, of in kinds
        ]
        head = f"{'going on with' if begun else 'writing'} {out}, split {split}:"
        return "\n".join([head, *lines, *self._remarks()])

    def _remarks(self) -> list[str]:
        flip = "" if self.views.flip is None else ", each also mirrored"
        crops = f"{self.views.crops} random crops" if self.views.crops else "1 crop"
        by = f", by {jax.process_count()} processes" if jax.process_count() > 1 else ""
        lines = [
            f"  {self.records} records, {crops}{flip}: {size_text(self.bytes)} in {self.shards} "
            f"shards{by}"
        ]
        if self.train and self.views.random_crops and not self.views.crops:
            lines.append(
                "  note: training would draw random crops; the cache has the centre's. "
                "--crops=4 keeps four random ones."
            )
        return lines + [
            f"  {name}: kept as `{field}`; its codec is applied in each step"
            for name, field in self.contents.plain
        ]

    def head(self) -> dict[str, Any]:
        """The index before there are rows: settings that a later run must agree with, and sizes."""
        digests = {}
        for name in self.config.system.trained_codecs() if self.train else ():
            record = json.loads((self.options.out / "frozen" / f"{name}.json").read_text())
            digests[name] = {k: record[k] for k in ("codec", "sha256")}
        settings = {
            "config": build.cache_settings(self.config, self.options.split),
            "source": plain(self.source.fingerprint()),
            "codecs": digests,
            "latents": list(self.contents.latents),
            "seed": self.config.seed,
        }
        text = self.contents.text
        return {
            "settings": settings,
            "classes": to_content(self.info.classes),
            "words": list(self.info.vocabulary),
            "records": self.records,
            "per_shard": self.per_shard,
            "crops": max(self.options.crops, 1),
            "random_crops": self.options.crops > 0,
            "flip": self.views.flip,
            "variants": self.views.count,
            "fields": [f.plain() for f in self.contents.fields],
            "text": text.plain() if text else None,
        }


def size_text(count: int) -> str:
    """A number of bytes as text: 1.5 GB."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"

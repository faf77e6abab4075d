"""A split encoded once by the codecs that a config's system uses, so that training need not.

1. An input whose codec has parameters (``label_ae``, ``image_tiny``, ...) is kept as latents, in
   the batch field ``latents/NAME``. One whose codec has none (pixels, bits, palette) is kept as it
   is, and so is one whose codec draws its latents anew each time.
2. Floats are kept as ``dtype``. float16 has 11 significant bits, three more than the bfloat16 that
   denoisers compute in, and an error of 2^-12 of the value, far below the least noise of a schedule
   (0.03); its range is +-65504, and latents are of order 1: whatever leaves it is refused. bfloat16
   would be larger errors for a range that nobody needs. float32 keeps every bit.
3. Augmentation: a record has a row per crop and, if a flip is drawn in training, one more that is
   mirrored. ``crops=0``: the centre's, as in evaluation; else so many drawn from (seed, record).

A trained codec is copied into ``OUT/frozen`` first, its scale fitted as a run would; a run from the
cache takes it from there. Shards are shared out among processes; all of them see ``out``.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jointseg_jax import compose
from jointseg_jax.data import cache_writer
from jointseg_jax.data.cache import Field, row_bytes, shard_name
from jointseg_jax.data.class_file import to_content
from jointseg_jax.data.pipeline import Rows, batches, check_source, make_rows
from jointseg_jax.data.records import Source
from jointseg_jax.data.views import Views
from jointseg_jax.data.workers import in_order
from jointseg_jax.systems.system import LATENTS
from jointseg_jax.training import frozen as frozen_codecs
from jointseg_jax.training.encoder import Encoder
from jointseg_jax.types import UserError

DTYPES = ("float16", "float32")

log = logging.getLogger("jointseg_jax")


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What to encode, and how it is kept.

    Attributes:
      out: folder of the cache.
      split: ``train`` or ``val`` of ``config.data``.
      dtype: of latents and features.
      latents: names of the inputs to keep as latents; None decides by line 1 of the module.
      keep: further batch fields to keep (``image``, ``labels``).
      crops: random crops of each record; 0 is the centre's.
      limit: so many records only, from the first on.
      batch: rows that a device encodes at a time.
      shard: bytes of a shard, about.
      threads: that read.
    """

    out: Path
    split: str = "train"
    dtype: str = "float16"
    latents: tuple[str, ...] | None = None
    keep: tuple[str, ...] = ()
    crops: int = 0
    limit: int | None = None
    batch: int = 32
    shard: int = 256 << 20
    threads: int = 4

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(
                f"ERROR [encode] dtype={self.dtype!r}; one of: {', '.join(DTYPES)}. Set --dtype."
            )
        for name in ("batch", "shard", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"ERROR [encode] {name}={getattr(self, name)}; at least 1.")
        if self.crops < 0 or (self.limit is not None and self.limit < 1):
            raise UserError(
                f"ERROR [encode] crops={self.crops}, limit={self.limit}: crops must be 0 or more "
                "and limit 1 or more."
            )


@dataclass(frozen=True)
class Read:
    """A record as it was read: the fields of its rows, and what is noted of it."""

    fields: list[dict[str, np.ndarray]]
    note: dict[str, Any]


def encode(
    config: Mapping[str, Any],
    options: Encoding,
    *,
    progress: Callable[..., Any] = lambda items, **_: items,
    show: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Encodes a split into ``options.out``, or goes on with it, and returns a summary.

    Args:
      progress: makes a bar, as ``tqdm`` does; ``update`` is called with records.
      show: is told what will be written before anything is.
    """
    start = time.monotonic()
    job = _Job(config, options)
    text = job.plan()
    if jax.process_index() == 0:
        show(text)
    with progress(total=job.records, desc=f"encoding {options.out / options.split}") as bar:
        kept = job.write(bar)
    index = job.finish()
    seconds = time.monotonic() - start
    return {
        "out": str(options.out),
        "split": options.split,
        "records": job.records,
        "rows": job.records * job.views.count,
        "fields": {f.name: f"{f.dtype}{list(f.shape)}" for f in job.fields},
        "bytes": sum(s["bytes"] for s in index["shards"]),
        "shards": len(index["shards"]),
        "shards_kept": kept,
        "replaced": job.replaced,
        "seconds": round(seconds, 1),
    }


class _Job:
    """One process's part of an encoding."""

    def __init__(self, config: Mapping[str, Any], options: Encoding):
        self.config = config = _plainly(config)
        self.options = options
        self.source: Source = compose.source(config, options.split)
        check_source(self.source)
        self.records = min(options.limit or len(self.source), len(self.source))
        self.known = compose.facts(self.source, captions=0)
        tokenizer = compose.tokenizer(config, self.known.vocabulary)
        self.tokenizer = tokenizer.encode if tokenizer else None
        self.rows: Rows = self._rows()
        self.views = Views(
            transforms=self.rows.transforms, crops=options.crops, seed=config["seed"]
        )
        self.replaced = 0
        frozen_codecs.check_unchanged(options.out, config, self.known)
        frozen_codecs.gather(options.out, config, self.known, self._training_batches())
        self.encoder = Encoder.of(options.out, config, self.known, batch=options.batch)
        self.inputs = self.encoder.inputs
        self.first = self._read(0)
        self.latents = self._kept_as_latents()
        self.fields = self._fields()
        self.per_shard = max(1, options.shard // (self.views.count * row_bytes(self.fields)))
        self.shards = -(-self.records // self.per_shard)

    # ------------------------------------------------------------------- set-up

    def _rows(self) -> Rows:
        data = self.config["data"]
        return make_rows(
            self.source,
            compose.transforms(self.config),
            tokenizer=self.tokenizer,
            seed=self.config["seed"],
            batch=1,
            train=True,
            bad=data.get("bad", "replace"),
            mark=False,
            instances=compose.instances(self.config),
        )

    def _training_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Made only when a scale is fitted: the batches that a run of this config begins with."""
        config, data = self.config, self.config["data"]
        with batches(
            self.source,
            batch=config["batch"],
            seed=config["seed"],
            transforms=compose.transforms(config),
            threads=data.get("threads", 2),
            bad=data.get("bad", "replace"),
            bad_limit=data.get("bad_limit", 100),
            instances=compose.instances(config),
        ) as found:
            yield from found

    def _kept_as_latents(self) -> tuple[str, ...]:
        given = self.options.latents
        coded = [name for name, value in self.inputs.items() if value.codec is not None]
        strangers = sorted(set(given or ()) - set(coded))
        if strangers:
            raise UserError(
                f"ERROR [flags] --latents={','.join(strangers)}: no codec encodes that; one of: "
                f"{', '.join(coded)}."
            )
        wanted = [k for k in coded if self.encoder.params.get(k)] if given is None else given
        drawn = [k for k in wanted if self.encoder.draws(k, self.first.fields[0])]
        if given is not None and drawn:
            raise UserError(
                f"ERROR [flags] --latents={','.join(drawn)}: this codec draws its latents anew "
                "each time (a sample, or a perturbation), and a cache holds one draw. Switch that "
                "off in the codec's config, or leave it out of --latents."
            )
        return tuple(k for k in wanted if k not in drawn)

    def _fields(self) -> tuple[Field, ...]:
        """What a row holds, and as what."""
        values, made = self.first.fields[0], []
        for name in self.latents:
            shape = self.encoder.shape(name, values)
            made.append(Field(name=LATENTS + name, dtype=self.options.dtype, shape=shape))
        plain = [i.field for name, i in self.inputs.items() if name not in self.latents]
        for name in dict.fromkeys([*plain, *self.options.keep]):
            if name == "text" and self.tokenizer is not None:
                continue
            if name not in values:
                raise UserError(
                    f"ERROR [encode] the batch field {name!r} is needed, and records have "
                    f"{', '.join(values)}. Check config.data and --keep."
                )
            made.append(
                Field(name=name, dtype=self._dtype(name, values[name]), shape=values[name].shape)
            )
        return tuple(made)

    def _dtype(self, name: str, values: np.ndarray) -> str:
        if np.issubdtype(values.dtype, np.floating):
            return self.options.dtype
        small = name == "labels" and len(self.known.classes) <= np.iinfo(np.int8).max + 1
        return "int8" if small else values.dtype.name

    # ------------------------------------------------------------------ writing

    def plan(self) -> str:
        """Opens the cache, and says what will be in it.

        Raises:
          UserError: it was made with other settings, or does not fit on the disk.
        """
        options, total = self.options, self.records * self.views.count * row_bytes(self.fields)
        begun = (options.out / f"{options.split}.json").exists()
        options.out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(options.out).free
        if jax.process_index() == 0:
            if not begun and total > free:
                raise UserError(
                    f"ERROR [encode] {options.out}: {_size(total)} are needed and {_size(free)} "
                    "are free. Choose another disk, or fewer --crops, --keep or --limit."
                )
            cache_writer.begin(options.out, options.split, self._head(), compose.differences)
        multihost_utils.sync_global_devices("encoding.plan")
        lines = [f"{'going on with' if begun else 'writing'} {options.out}, split {options.split}:"]
        for f in self.fields:
            lines.append(f"  {f.name:20} {f.dtype} {list(f.shape)}  {_size(f.stride)} a row")
        flip = "" if self.views.flip is None else ", each also mirrored"
        crops = f"{self.views.crops} random crops" if self.views.crops else "1 crop"
        lines.append(
            f"  {self.records} records, {crops}{flip}: {_size(total)} in {self.shards} shards"
        )
        if self.views.random_crops and not self.views.crops:
            lines.append(
                "  note: training would draw random crops; the cache has the centre's. "
                "--crops=4 keeps four random ones."
            )
        for name, value in self.inputs.items():
            if value.codec is not None and name not in self.latents:
                lines.append(
                    f"  {name}: kept as `{value.field}`; its codec is applied in each step"
                )
        return "\n".join(lines)

    def _head(self) -> dict[str, Any]:
        digests = {}
        for name in frozen_codecs.trained_codecs(self.config):
            record = json.loads((self.options.out / "frozen" / f"{name}.json").read_text())
            digests[name] = {k: record[k] for k in ("codec", "sha256")}
        settings = {
            "config": compose.cache_settings(self.config, self.options.split),
            "source": compose.plain(self.source.fingerprint()),
            "codecs": digests,
            "latents": list(self.latents),
            "seed": self.config["seed"],
        }
        return {
            "settings": settings,
            "classes": to_content(self.known.classes),
            "words": list(self.known.vocabulary),
            "records": self.records,
            "per_shard": self.per_shard,
            "crops": max(self.options.crops, 1),
            "random_crops": self.options.crops > 0,
            "flip": self.views.flip,
            "variants": self.views.count,
            "fields": [
                {"name": f.name, "dtype": f.dtype, "shape": list(f.shape)} for f in self.fields
            ],
        }

    def write(self, bar: Any) -> int:
        """Makes the shards of this process that are not there yet; says how many were."""
        mine = range(jax.process_index(), self.shards, jax.process_count())
        kept = 0
        for number in mine:
            name = shard_name(self.options.split, number, self.shards)
            first = number * self.per_shard
            records = range(first, min(first + self.per_shard, self.records))
            if cache_writer.kept(self.options.out, name):
                kept += 1
                bar.update(len(records))
            else:
                self._shard(name, records, bar)
        return kept

    def _shard(self, name: str, records: range, bar: Any) -> None:
        rows = len(records) * self.views.count
        shard = cache_writer.ShardWriter(self.options.out, name, self.fields, rows)
        waiting = None
        for group in self._groups(records):
            following = group, self._launch(group)
            if waiting is not None:
                bar.update(self._keep(shard, *waiting))
            waiting = following  # the devices encode these while the last are written
        if waiting is not None:
            bar.update(self._keep(shard, *waiting))
        shard.close()

    def _groups(self, records: Sequence[int]) -> Iterator[list[Read]]:
        size = max(1, self.encoder.batch // self.views.count)
        group: list[Read] = []
        for read in in_order(self._read, records, self.options.threads):
            group.append(read)
            if len(group) == size:
                yield group
                group = []
        if group:
            yield group

    def _read(self, index: int) -> Read:
        record, used, reports = self.rows.read(index)
        fields = [self.rows.fields(view) for view in self.views.of(record, used)]
        note = {"id": record["id"], "captions": list(record["captions"])}
        if reports:
            note["instead_of"] = [report["error"] for report in reports]
        return Read(fields, note)

    def _launch(self, group: Sequence[Read]) -> dict[str, list[jax.Array]]:
        """Starts to encode the rows of some records."""
        return {
            LATENTS + name: self.encoder(name, self._stacked(group, self.inputs[name].field))
            for name in self.latents
        }

    def _stacked(self, group: Sequence[Read], field: str) -> np.ndarray:
        rows = [row[field] for read in group for row in read.fields]
        if len({row.shape for row in rows}) > 1:
            raise UserError(
                f"ERROR [encode] {field}: rows of shapes {sorted({r.shape for r in rows})[:4]}; "
                "all must have one. Add a resize to config.data.transforms."
            )
        return np.stack(rows)

    def _keep(
        self, shard: cache_writer.ShardWriter, group: Sequence[Read], launched: Mapping[str, Any]
    ) -> int:
        rows = len(group) * self.views.count
        values = {}
        for f in self.fields:
            if f.name in launched:
                found = np.concatenate([np.asarray(part) for part in launched[f.name]])[:rows]
            else:
                found = self._stacked(group, f.name)
            values[f.name] = self._stored(f, found, group)
        self._count(group)
        shard.add(values, [read.note for read in group])
        return len(group)

    def _stored(self, field: Field, values: np.ndarray, group: Sequence[Read]) -> np.ndarray:
        if values.shape[1:] != field.shape:
            raise UserError(
                f"ERROR [encode] {group[0].note['id']}: {field.name} has shape {values.shape[1:]}; "
                f"the first record's has {field.shape}. Add a resize to config.data.transforms."
            )
        with np.errstate(over="ignore"):
            kept = values.astype(field.dtype)
        if field.dtype not in DTYPES or np.isfinite(kept).all():
            return kept
        row = int(np.argmin(np.isfinite(kept).reshape(len(kept), -1).all(1)))
        why = "NaN or infinity" if not np.isfinite(values[row]).all() else "too large for float16"
        raise UserError(
            f"ERROR [encode] {group[row // self.views.count].note['id']}: {field.name} is {why}. "
            + ("Mend the record." if why.startswith("NaN") else "Run with --dtype=float32.")
        )

    def _count(self, group: Sequence[Read]) -> None:
        for read in group:
            for error in read.note.get("instead_of", ()):
                log.warning("%s Replaced by %s.", error, read.note["id"])
            self.replaced += "instead_of" in read.note
        limit = self.config["data"].get("bad_limit", 100)
        if self.replaced > limit:
            raise UserError(
                f"ERROR [encode] {self.replaced} bad records, more than the limit of {limit}. Mend "
                "them (launch/prepare.py lists all), or raise config.data.bad_limit."
            )

    def finish(self) -> dict[str, Any]:
        """Writes the index when all processes have written their shards."""
        multihost_utils.sync_global_devices("encoding.shards")
        out, split = self.options.out, self.options.split
        if jax.process_index() == 0:
            cache_writer.finish(out, split, self.shards, self.tokenizer)
        multihost_utils.sync_global_devices("encoding.finish")
        return json.loads((out / f"{split}.json").read_text())


def _plainly(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without a cache of its own."""
    return dict(config) | {"data": dict(config["data"]) | {"cache": ""}}


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"

"""A split encoded once by the codecs that a config's system uses, so that training need not.

Records are read ahead and encoded in whole batches on the devices of this process. A record has a
row per view (``data/cached/views.py``). Process p of n writes shards p, p + n, ...; the first one
writes texts and index when all shards are there: the same bytes, however many processes there are.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jointseg_jax.config import ReadConfig, RunConfig
from jointseg_jax.data.cached import shard_writer, texts
from jointseg_jax.data.cached.store import CacheIndex, Field, index_path, read_index, shard_name
from jointseg_jax.data.cached.views import ViewedRecord
from jointseg_jax.generation.sampler import one_ahead
from jointseg_jax.systems.system import LATENTS
from jointseg_jax.training.encode_plan import DTYPES, EncodeOptions, Plan, size_text
from jointseg_jax.types import UserError

log = logging.getLogger("jointseg_jax")

Progress = Callable[[int], object]
"""Called with the number of records that were done."""


def encode(
    config: RunConfig,
    options: EncodeOptions,
    *,
    progress: Callable[..., contextlib.AbstractContextManager],
    show: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Encodes a split into ``options.out``, or goes on with it, and returns a summary.

    Args:
      progress: makes a bar of this process's records, as ``tqdm`` does.
      show: called with what will be written, before anything is.
    """
    start = time.monotonic()
    plan = Plan(config, options)
    run = _Run(plan)
    begun = run.begin()
    if jax.process_index() == 0:
        show(plan.text(begun=begun))
    title = f"{options.out / options.split}"
    with progress(total=run.count(run.mine), desc=f"checking {title}") as bar:
        kept = run.keep(bar.update)
    with progress(total=run.count(run.todo), desc=f"encoding {title}") as bar:
        run.write(bar.update)
    index = run.finish()
    seconds = time.monotonic() - start
    made = sum(s["records"] for s in index["shards"])
    fields = [*plan.contents.fields, *filter(None, [plan.contents.text])]
    return {
        "out": str(options.out),
        "split": options.split,
        "records": made,
        "rows": made * plan.views.count,
        "fields": {f.name: f"{f.dtype}{list(f.shape)}" for f in fields},
        "texts": index["tables"]["text"].get("rows", 0) if index["tables"] else 0,
        "bytes": sum(entry["bytes"] for entry in [*index["shards"], *index["tables"].values()]),
        "shards": len(index["shards"]),
        "shards_kept": int(multihost_utils.process_allgather(np.array(kept)).sum()),
        "replaced": sum(s["replaced"] for s in index["shards"]),
        "processes": jax.process_count(),
        "seconds": round(seconds, 1),
    }


class _Run:
    """One process's part of an encoding."""

    def __init__(self, plan: Plan):
        self.plan, self.options = plan, plan.options
        self.mine = range(jax.process_index(), plan.shards, jax.process_count())
        self.todo: list[int] = list(self.mine)
        self.replaced = 0

    def begin(self) -> bool:
        """Opens the cache; returns True if it was begun before.

        Raises:
          UserError: it was made with other settings, or does not fit on the disk.
        """
        out = self.options.out
        # all look before the first one writes the index, or some would take it for an old one
        begun = index_path(out, self.options.split).exists()
        multihost_utils.sync_global_devices("encoding.look")
        out.mkdir(parents=True, exist_ok=True)
        needed, free = self.plan.bytes, shutil.disk_usage(out).free
        if jax.process_index() == 0:
            if not begun and needed > free:
                raise UserError(
                    f"ERROR [encode] {out}: {size_text(needed)} are needed and {size_text(free)} "
                    "are free. Choose another disk, or fewer --crops, --keep or --limit."
                )
            shard_writer.begin(out, self.options.split, self.plan.head())
        multihost_utils.sync_global_devices("encoding.begin")
        return begun

    def count(self, shards: Sequence[int]) -> int:
        """Records in some shards."""
        return sum(len(self.plan.records_of(number)) for number in shards)

    def keep(self, progress: Progress) -> int:
        """Leaves out the shards that are already whole; returns how many."""
        out, split = self.options.out, self.options.split
        whole = texts.is_whole(out, read_index(index_path(out, split)))
        # once the table of texts is written, the parts of the shards are gone
        part = self.plan.contents.text is not None and not self.plan.contents.words and not whole
        self.todo = []
        for number in self.mine:
            if not shard_writer.kept(out, shard_name(split, number, self.plan.shards), part=part):
                self.todo.append(number)
            progress(len(self.plan.records_of(number)))
        return len(self.mine) - len(self.todo)

    def write(self, progress: Progress) -> None:
        """Makes the shards of this process that are not there yet."""
        threads = self.options.threads
        records = [record for number in self.todo for record in self.plan.records_of(number)]
        reading = ReadConfig(workers=self.options.workers, threads=threads, prefetch=2 * threads)
        with contextlib.closing(self.plan.viewer.all(records, reading)) as found:
            for number in self.todo:
                self._shard(number, found, progress)

    def _shard(self, number: int, found: Iterator[ViewedRecord], progress: Progress) -> None:
        name = shard_name(self.options.split, number, self.plan.shards)
        made, count = self.plan.contents, len(self.plan.records_of(number))
        rows, text = count * self.plan.views.count, None if made.words else made.text
        shard = shard_writer.ShardWriter(self.options.out, name, made.fields, rows, text)
        groups = self._groups(itertools.islice(found, count))
        # the devices encode one group while the one before it is written
        for group, latents in one_ahead((group, self._launch(group)) for group in groups):
            progress(self._keep(shard, group, latents))
        shard.close()

    def _groups(self, records: Iterator[ViewedRecord]) -> Iterator[list[ViewedRecord]]:
        batch = self.plan.encoder.batch if self.plan.encoder else self.options.batch
        size = max(1, batch // self.plan.views.count)
        while group := list(itertools.islice(records, size)):
            yield group

    def _launch(self, group: Sequence[ViewedRecord]) -> dict[str, list[jax.Array]]:
        """Starts to encode the rows of some records; by the batch fields of the latents."""
        encoder = self.plan.encoder
        if encoder is None:
            return {}
        fields = {name: encoder.inputs[name].field for name in self.plan.contents.latents}
        return {LATENTS + k: encoder(k, _stacked(group, field)) for k, field in fields.items()}

    def _keep(
        self,
        shard: shard_writer.ShardWriter,
        group: Sequence[ViewedRecord],
        launched: Mapping[str, Sequence[jax.Array]],
    ) -> int:
        rows, values, text = len(group) * self.plan.views.count, {}, self.plan.contents.text
        for f in self.plan.contents.fields:
            if parts := launched.get(f.name):
                # waits for the devices; the last batch was filled up beyond `rows`
                found = np.concatenate([np.asarray(part) for part in parts])[:rows]
            else:
                found = _stacked(group, f.name)
            values[f.name] = self._stored(f, found, group)
        texts = None
        if text is not None and not self.plan.contents.words:
            found = _stacked(group, text.name)[:: self.plan.views.count]  # the same in every view
            texts = self._stored(text, found, group)
        self._report_replaced(group)
        shard.add(values, [viewed.note for viewed in group], texts)
        return len(group)

    def _stored(
        self, field: Field, values: np.ndarray, group: Sequence[ViewedRecord]
    ) -> np.ndarray:
        if values.shape[1:] != field.shape:
            raise UserError(
                f"ERROR [encode] {group[0].note['id']}: {field.name} has shape {values.shape[1:]}; "
                f"the first record's has {field.shape}. Add a resize to config.data.transforms."
            )
        with np.errstate(over="ignore"):  # looked for below, with a message
            kept = values.astype(field.kind)
        if field.dtype not in DTYPES or np.isfinite(kept).all():
            return kept
        row = int(np.argmin(np.isfinite(kept).reshape(len(kept), -1).all(1)))
        where = group[row * len(group) // len(values)].note["id"]
        if not np.isfinite(values[row]).all():
            problem = "NaN or infinity. Fix the record."
        else:
            problem = f"too large for {field.dtype}. Run with --dtype=bfloat16 or --dtype=float32."
        raise UserError(f"ERROR [encode] {where}: {field.name} is {problem}")

    def _report_replaced(self, group: Sequence[ViewedRecord]) -> None:
        for viewed in group:
            for error in viewed.note.get("instead_of", ()):
                log.warning("%s Replaced by %s.", error, viewed.note["id"])
            self.replaced += "instead_of" in viewed.note
        limit = self.plan.config.data.bad_limit
        if self.replaced > limit:
            raise UserError(
                f"ERROR [encode] {self.replaced} bad records, more than the limit of {limit}. Fix "
                "them (launch/prepare.py lists all), or raise config.data.bad_limit."
            )

    def finish(self) -> CacheIndex:
        """Writes the index when all processes have written their shards."""
        multihost_utils.sync_global_devices("encoding.shards")
        out, split = self.options.out, self.options.split
        if jax.process_index() == 0:
            tokenizer = self.plan.tokenizer.encode if self.plan.tokenizer else None
            shard_writer.finish(out, split, self.plan.shards, tokenizer)
        multihost_utils.sync_global_devices("encoding.finish")
        return read_index(index_path(out, split))


def _stacked(group: Sequence[ViewedRecord], field: str) -> np.ndarray:
    rows = [viewed.fields[field] for viewed in group]
    if len(shapes := sorted({found.shape[1:] for found in rows})) > 1:
        raise UserError(
            f"ERROR [encode] {field}: rows of shapes {shapes[:4]}; all must have one. Add a resize "
            "to config.data.transforms."
        )
    return np.concatenate(rows)

"""What an encoding writes, decided from the config, the options and the first record.

Every process decides the same. A trained codec is copied into ``OUT/frozen`` first, its scale
fitted as a run would; a run from the cache takes it from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jointseg_jax import build
from jointseg_jax.data.cached.index import row_bytes
from jointseg_jax.data.cached.views import ViewReader, Views
from jointseg_jax.data.labels import to_content
from jointseg_jax.data.pipeline import Rows, batches, check_source, make_rows
from jointseg_jax.data.records import Source
from jointseg_jax.training import pretrained
from jointseg_jax.training.batch_encoder import Encoder
from jointseg_jax.training.encode_contents import contents
from jointseg_jax.training.encode_options import Encoding
from jointseg_jax.types import UserError


class Plan:
    """An encoding before anything is written but the codecs.

    Attributes:
      records: how many.
      encoder: of the config's codecs; None for validation.
      contents: what a row holds.
      shards: how many.
      bytes: that all of it takes, at most: records may have the same text.
    """

    def __init__(self, config: Mapping[str, Any], options: Encoding):
        self.config = config = _plainly(config)
        self.options, self.train = options, options.split == "train"
        _check_validation(config, options)
        self.source: Source = build.source(config, options.split)
        check_source(self.source)
        self.records = min(options.limit or len(self.source), len(self.source))
        self.known = build.dataset_info(self.source, captions=0)
        self.tokenizer = build.tokenizer(config, self.known.vocabulary)
        rows = self._rows()
        self.views = Views(
            transforms=rows.transforms,
            crops=options.crops,
            seed=config["seed"],
            train=self.train,
        )
        self.viewer = ViewReader(rows=rows, views=self.views)
        self.encoder = self._encoder() if self.train else None
        self.contents = contents(
            options,
            self.known,
            self.encoder,
            {k: v[0] for k, v in self.viewer(0).fields.items()},
            self.tokenizer.length if self.tokenizer else None,
        )
        self.per_shard = max(1, options.shard // self._record_bytes())
        self.shards = -(-self.records // self.per_shard)
        self.bytes = self.records * self._record_bytes()

    def _rows(self) -> Rows:
        data = self.config["data"]
        return make_rows(
            self.source,
            build.transforms(self.config),
            tokenizer=None,
            seed=self.config["seed"],
            batch=1,
            train=self.train,
            bad=data.get("bad", "replace"),
            mark=False,
            instances=build.instances(self.config),
        )

    def _encoder(self) -> Encoder:
        options, config = self.options, self.config
        pretrained.check_unchanged(options.out, config, self.known)
        pretrained.import_codecs(options.out, config, self.known, self._training_batches())
        return Encoder.of(options.out, config, self.known, batch=options.batch)

    def _training_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Made only when a scale is fitted: the batches that a run of this config begins with."""
        config, data = self.config, self.config["data"]
        with batches(
            self.source,
            batch=config["batch"],
            seed=config["seed"],
            transforms=build.transforms(config),
            threads=data.get("threads", 2),
            bad=data.get("bad", "replace"),
            bad_limit=data.get("bad_limit", 100),
            instances=build.instances(config),
        ) as found:
            yield from found

    def records_of(self, shard: int) -> range:
        """The records in a shard."""
        first = shard * self.per_shard
        return range(first, min(first + self.per_shard, self.records))

    def _record_bytes(self) -> int:
        text = self.contents.text
        size = self.views.count * row_bytes(self.contents.fields)
        return size + (row_bytes([text]) if text and not self.contents.words else 0)

    def text(self, *, begun: bool) -> str:
        """What will be in the cache, for a reader.

        Args:
          begun: whether some of it is there.
        """
        out, split = self.options.out, self.options.split
        lines = [f"{'going on with' if begun else 'writing'} {out}, split {split}:"]
        for f in self.contents.fields:
            lines.append(f"  {f.name:20} {f.dtype} {list(f.shape)}  {size_text(f.stride)} a row")
        return "\n".join([*lines, *self._remarks()])

    def _remarks(self) -> list[str]:
        text, lines = self.contents.text, []
        if text is not None:
            each = "caption" if self.contents.words else "text of a record"
            lines.append(
                f"  {text.name:20} {text.dtype} {list(text.shape)}  {size_text(text.stride)} for "
                f"each different {each}"
            )
        flip = "" if self.views.flip is None else ", each also mirrored"
        crops = f"{self.views.crops} random crops" if self.views.crops else "1 crop"
        processes = jax.process_count()
        lines.append(
            f"  {self.records} records, {crops}{flip}: {size_text(self.bytes)} in {self.shards} "
            + ("shards" if processes == 1 else f"shards, by {processes} processes")
        )
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
        """What the index says before there are rows."""
        digests = {}
        for name in pretrained.trained_codecs(self.config) if self.train else ():
            record = json.loads((self.options.out / "frozen" / f"{name}.json").read_text())
            digests[name] = {k: record[k] for k in ("codec", "sha256")}
        settings = {
            "config": build.cache_settings(self.config, self.options.split),
            "source": build.plain(self.source.fingerprint()),
            "codecs": digests,
            "latents": list(self.contents.latents),
            "seed": self.config["seed"],
        }
        text = self.contents.text
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
            "fields": [f.plain() for f in self.contents.fields],
            "text": text.plain() if text else None,
        }


def _check_validation(config: Mapping[str, Any], options: Encoding) -> None:
    own = config.get("evaluate", {}).get("transforms")
    if options.split == "val" and own:
        raise UserError(
            "ERROR [encode] --split=val: config.evaluate.transforms give evaluation a size of its "
            "own, and a cache holds one size, that of training: such a run reads config.data.val. "
            "Leave this split out."
        )


def _plainly(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without a cache of its own."""
    return dict(config) | {"data": dict(config["data"]) | {"cache": ""}}


def size_text(count: int) -> str:
    """Bytes for a reader."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"

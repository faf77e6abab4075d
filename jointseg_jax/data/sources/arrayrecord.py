"""Our own shards: ArrayRecord files beside a ``dataset.json`` that says what is in them.

A record is packed without loss: the image file as it came where it decodes to the image of the
record (a JPEG stays a JPEG), PNG otherwise; labels as grey PNG; segments as RGB PNG.

    "JSR1" | length of header, 4 bytes | header, JSON | image | labels | segments

``dataset.json`` holds the classes and, per split, the shards with their counts, sizes and SHA-256,
and the words of the captions. It is written last: shards that it does not name do not exist.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

import array_record.python.array_record_module as array_record_module
import numpy as np

from jointseg_jax.data import files, images, labels
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import BadSample, Record, derive
from jointseg_jax.types import UserError

MAGIC = b"JSR1"
MANIFEST = "dataset.json"
VERSION = 1

# Groups of one: any record is one read away. Uncompressed: PNG and JPEG are compressed already.
OPTIONS = "group_size:1,uncompressed"

STORED = images.Decoding(orientation="ignore", pixel_limit=images.PILLOW_LIMIT)
"""How kept image files are decoded: exactly as they were when they were found to match."""


class ShardContent(files.SizeAndSum):
    """What ``dataset.json`` says of a shard."""

    file: str
    count: int


class SplitContent(TypedDict):
    """What ``dataset.json`` says of a split."""

    count: int
    shards: list[ShardContent]
    words: list[str]


class Manifest(TypedDict):
    """What ``dataset.json`` holds."""

    format: str
    version: int
    classes: labels.ClassesContent
    splits: dict[str, SplitContent]


def pack(record: Record, count: int, original: bytes | None = None) -> bytes:
    """Packs a record.

    Args:
      count: how many classes there are.
      original: the image file the record came from, kept if it decodes to the record's image.
    """
    # A turned or converted picture is not the file that it came from: such go as PNG.
    kept = original if original and matches(original, record["image"]) else None
    parts = {
        "image": kept or images.encode_png(record["image"]),
        "labels": labels.encode_labels(record["labels"], count),
    }
    if "segments" in record:
        parts["segments"] = images.encode_segment_ids(record["segments"])
    lengths = {name: len(data) for name, data in parts.items()}
    header = {"id": record["id"], "captions": list(record["captions"]), "parts": lengths}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join([MAGIC, len(text).to_bytes(4, "little"), text, *parts.values()])


def matches(original: bytes, image: np.ndarray) -> bool:
    """Returns True if an image file decodes to exactly this image."""
    try:
        return np.array_equal(images.decode_image(original, "", STORED), image)
    except BadSample:
        return False


def unpack(data: bytes, classes: Classes, where: str) -> Record:
    """Restores a packed record; ``where`` is for messages."""
    if data[:4] != MAGIC:
        raise damaged(where, f"it starts with {data[:4]!r}")
    end = 8 + int.from_bytes(data[4:8], "little")
    header = json.loads(data[8:end])
    # The parts follow in the order of the header, each as long as it says.
    ends = itertools.accumulate(header["parts"].values(), initial=end)
    spans = dict(zip(header["parts"], itertools.pairwise(ends)))
    parts = {name: data[start:stop] for name, (start, stop) in spans.items()}
    rule, limit = labels.stored_rule(len(classes)), images.PILLOW_LIMIT
    record = Record(
        id=header["id"],
        image=images.decode_image(parts["image"], where, STORED),
        labels=rule.read(parts["labels"], where, classes, pixel_limit=limit),
        captions=tuple(header["captions"]),
    )
    if "segments" in parts:
        record["segments"] = images.decode_segment_ids(parts["segments"], where, pixel_limit=limit)
    return record


def damaged(where: str, why: str) -> BadSample:
    """Returns the problem of a record that cannot be read."""
    remedy = "Copy the shard again from its source, or run launch/prepare.py again."
    return BadSample(where, f"the shard is damaged ({why})", "a whole shard", remedy)


def write_shards(
    packed: Iterable[bytes],
    folder: str | Path,
    *,
    split: str,
    classes: Classes,
    words: Iterable[str],
    count: int,
    shards: int = 1,
    overwrite: bool = False,
) -> SplitContent:
    """Writes the packed records of a split; returns what ``dataset.json`` now says of it.

    Args:
      count: how many records there are; record i goes to shard ``i * shards // count``.
      overwrite: replaces a split that is there already.
    """
    if not 1 <= shards <= max(count, 1):
        raise UserError(f"ERROR [data] shards={shards} given for {count} records; 1..{count}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = open_manifest(folder, split, classes, overwrite)
    names = [f"{split}-{i:05d}-of-{shards:05d}.arrayrecord" for i in range(shards)]
    # Contiguous and lazily: one record is in memory at a time.
    groups = itertools.groupby(enumerate(packed), key=lambda item: item[0] * shards // count)
    written = [write_shard((data for _, data in group), folder / names[i]) for i, group in groups]
    manifest["splits"][split] = {
        "count": sum(shard["count"] for shard in written),
        "shards": written,
        "words": sorted(words),
    }
    # Last: shards that the manifest does not name do not exist.
    files.write_json(folder / MANIFEST, manifest)
    kept = {shard["file"] for shard in written}
    for path in [*folder.glob(f"{split}-*-of-*.arrayrecord*")]:
        if path.name not in kept:
            path.unlink()  # left by an earlier or a killed run
    return manifest["splits"][split]


def open_manifest(folder: Path, split: str, classes: Classes, overwrite: bool) -> Manifest:
    """Returns the ``dataset.json`` to add a split to; refuses other classes and a split twice."""
    content = labels.to_content(classes)
    path = folder / MANIFEST
    if not path.exists():
        return Manifest(format="jointseg arrayrecord", version=VERSION, classes=content, splits={})
    manifest = read_manifest(path)
    if manifest["classes"] != content:
        raise UserError(
            f"ERROR [data] {path}: holds splits of other classes; all splits of a folder share "
            "theirs. Choose another folder."
        )
    if split in manifest["splits"] and not overwrite:
        raise UserError(
            f"ERROR [data] {path}: split {split!r} is there already, with "
            f"{manifest['splits'][split]['count']} records; overwrite it (--overwrite) or choose "
            "another folder or split name."
        )
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Reads a ``dataset.json`` of this version."""
    try:
        manifest = cast(dict, files.read_json(path))
    except BadSample as problem:
        raise UserError(
            f"{problem} Shards are made by launch/prepare.py; check config.data.*.folder."
        ) from None
    if manifest.get("version") != VERSION:
        raise UserError(
            f"ERROR [data] {path}: version {manifest.get('version')} of the shard format; this "
            f"release reads version {VERSION}. Run launch/prepare.py again."
        )
    return cast(Manifest, manifest)


def write_shard(packed: Iterable[bytes], path: Path) -> ShardContent:
    """Writes one shard: temporary file, fsync, rename."""
    writer = array_record_module.ArrayRecordWriter(str(files.temporary(path)), OPTIONS)
    count = 0
    try:
        for data in packed:
            writer.write(data)
            count += 1
    finally:
        writer.close()
    files.publish(path)
    return ShardContent(file=path.name, count=count, **files.size_and_sum(path))


@dataclass(frozen=True, kw_only=True)
class ArrayRecords:
    """A split of a folder of our shards, as a source of records."""

    folder: str
    split: str
    classes: Classes = field(init=False, repr=False)
    shards: tuple[tuple[str, int], ...] = field(init=False, repr=False)  # file, number of records
    _split: SplitContent = field(init=False, repr=False, compare=False)
    _starts: list[int] = field(init=False, repr=False, compare=False)  # first record of each shard
    # Readers are opened when first needed, by whichever thread comes first.
    _readers: dict[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        folder = Path(self.folder)
        manifest = read_manifest(folder / MANIFEST)
        if self.split not in manifest["splits"]:
            raise UserError(
                f"ERROR [data] {self.folder}: no split {self.split!r}; there are: "
                f"{', '.join(manifest['splits'])}. Set config.data.*.split."
            )
        content, split = manifest["classes"], manifest["splits"][self.split]
        files.require_sizes(
            folder,
            [(folder / shard["file"], shard["bytes"]) for shard in split["shards"]],
            what="shards",
            remedy="Copy them again from their source, or run launch/prepare.py again.",
        )
        shards = tuple((shard["file"], shard["count"]) for shard in split["shards"])
        starts = list(itertools.accumulate((n for _, n in shards), initial=0))
        derive(self, classes=labels.class_list(content["classes"], content["swaps"]))
        derive(self, shards=shards, _split=split, _starts=starts)

    def __reduce__(self) -> tuple[Callable[[], ArrayRecords], tuple[()]]:
        # A copy in a worker opens the shards itself: readers do not travel.
        return functools.partial(ArrayRecords, folder=self.folder, split=self.split), ()

    @property
    def name(self) -> str:
        """Names the source by its folder and split."""
        return f"{Path(self.folder).name}/{self.split}"

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        """Reads and decodes one record."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        position = index - self._starts[shard]
        path = str(Path(self.folder) / self.shards[shard][0])
        where = f"{path}: record {position}"
        try:
            data = self._reader(path).read([position])[0]
        except (RuntimeError, IndexError, ValueError) as error:
            self._readers.pop(path, None)  # a reader that failed once fails for good
            raise damaged(where, str(error)) from None
        return unpack(data, self.classes, where)

    def _reader(self, path: str) -> Any:
        # No lock: of two threads that open a shard at once, one's reader is kept, both read.
        if (reader := self._readers.get(path)) is None:
            # Reading ahead would fetch megabytes around every record of a shuffled epoch.
            reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
            self._readers[path] = reader
        return reader

    def words(self) -> tuple[str, ...]:
        """Lists every word its captions can contain, sorted."""
        return tuple(self._split["words"])

    def fingerprint(self) -> dict[str, object]:
        """Returns the plain values that must match when a run resumes."""
        return {
            "name": "arrayrecord",
            "split": self.split,
            "count": len(self),
            "classes": list(self.classes.names),
            "sha256": files.short_sum("".join(s["sha256"] for s in self._split["shards"])),
        }

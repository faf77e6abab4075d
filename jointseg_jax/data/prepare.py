"""From any source to a folder of shards, with a report on what went in.

OUT/SPLIT-00000-of-00004.arrayrecord ...   the records
OUT/dataset.json                           classes, and per split its shards and their SHA-256
OUT/classes.json                           the classes, as ``folders`` reads them
OUT/report.json                            per split: statistics, and every bad sample
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from jointseg_jax.data import files
from jointseg_jax.data.audit import Progress, Report, scan, silent
from jointseg_jax.data.labels import to_content
from jointseg_jax.data.records import BadSample, Record, Source
from jointseg_jax.data.sources.arrayrecord import open_manifest, pack, write_shards
from jointseg_jax.data.workers import in_order
from jointseg_jax.types import UserError

RECORDS_PER_SHARD = 1024


def prepare(
    source: Source,
    out: str | Path,
    *,
    split: str,
    strict: bool = False,
    shards: int | None = None,
    limit: int | None = None,
    threads: int = 4,
    overwrite: bool = False,
    progress: Progress = silent,
    show: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Scans a source, then writes its good records as the split ``split`` of the folder ``out``.

    Args:
      strict: raises UserError and writes nothing unless every record is good, not only one.
      shards: number of files; one per 1024 records when not given.
      limit: takes at most this many records, the first ones.
      show: called with the report before anything is written.
    """
    out = Path(out)
    # Refuses a split that exists, or other classes, before the hours of reading.
    open_manifest(out, split, source.classes, overwrite)
    report = scan(source, threads=threads, limit=limit, progress=progress)
    if strict and report.bad:
        raise UserError(
            f"{report.problems()}\nERROR [data] {report.name}: problems: {len(report.bad)}, "
            f"records looked at: {report.count}; --strict accepts none, and nothing was written. "
            "Fix them, or run without --strict to leave the bad ones out."
        )
    show(report)
    if not report.good:
        raise UserError(
            f"{report.problems()}\nERROR [data] {report.name}: none of {report.count} records can "
            "be used; at least one is needed. The causes are above."
        )
    # Read a second time: all records of a data set do not fit into memory.
    packed = in_order(lambda index: pack_record(source, index), report.good, threads)
    packed = progress(packed, total=len(report.good), desc=f"writing {out / split}")
    write(source, out, report, split, packed, shards)
    return report


def write(
    source: Source,
    out: Path,
    report: Report,
    split: str,
    packed: Iterable[bytes],
    shards: int | None,
) -> None:
    """Writes the packed records that a report found good, and the report."""
    count = len(report.good)
    write_shards(
        packed,
        out,
        split=split,
        classes=source.classes,
        words=source.words(),
        count=count,
        shards=shards or -(-count // RECORDS_PER_SHARD),
        overwrite=True,  # ``open_manifest`` has refused it before, where it was not wanted
    )
    files.write_json(out / "classes.json", to_content(source.classes))
    path = out / "report.json"
    reports = json.loads(path.read_bytes()) if path.exists() else {}
    files.write_json(path, reports | {split: report.content()})


def pack_record(source: Source, index: int) -> bytes:
    """Packs one record, with the image file behind it where the source has one."""
    try:
        record: Record = source[index]
    except BadSample as problem:
        raise UserError(
            f"{problem}\nERROR [data] {source.name}: record {index} was good when it was checked; "
            "the files changed while they were being read. Run again when they rest."
        ) from None
    original = getattr(source, "original", None)  # None: the source has no files of images
    return pack(record, len(source.classes), original and original(index))

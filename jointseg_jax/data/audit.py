"""Reads every record of a source once and says what is in it and what is wrong with it.

Counted: pixels and records per class, image sizes, caption lengths, void pixels, records that are
void all over (they teach nothing), equal images, and every bad sample with file, cause and remedy.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jointseg_jax.data.captions import describe
from jointseg_jax.data.records import BadSample, Source, check_record
from jointseg_jax.data.tokenizer import split
from jointseg_jax.data.void_check import lost_classes
from jointseg_jax.data.workers import in_order

Progress = Callable[..., Iterable[Any]]


class Finding(NamedTuple):
    """What one record holds, or what is wrong with it."""

    position: int  # its index in the source
    id: str = ""
    size: tuple[int, int] = (0, 0)  # height, width
    pixels: np.ndarray | None = None  # int [classes + 1]: per class, void last
    words: tuple[int, ...] = ()  # number of words of each caption
    made: bool = False  # its caption is the one made from the labels
    digest: bytes = b""  # of the image
    problem: BadSample | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a scan counted."""

    name: str  # of the source
    names: tuple[str, ...]  # of the classes
    count: int  # records looked at
    good: tuple[int, ...]  # indices of those that can be used
    pixels: tuple[int, ...]  # per class
    records: tuple[int, ...]  # per class, those that show it
    void: int  # pixels without annotation
    sizes: tuple[tuple[tuple[int, int], int], ...]
    """(height, width) and the number of records that have it, the commonest first."""
    captions: tuple[int, int, float, int]  # number of captions; fewest, mean and most words
    empty: tuple[str, ...]  # ids of records that are void all over
    duplicates: tuple[tuple[str, ...], ...]  # groups of ids whose images are equal
    bad: tuple[tuple[int, BadSample], ...]
    """What is wrong with the others, with their index (-1: with no record in particular)."""
    made: int = 0  # records whose caption says no more than their labels
    kinds: tuple[tuple[str, int], ...] = ()
    """Endings of image files and the number of records that have it, the commonest first."""

    @property
    def unseen(self) -> tuple[str, ...]:
        """Names the classes that no record shows."""
        return tuple(name for name, n in zip(self.names, self.records) if not n)

    @property
    def void_share(self) -> float:
        """Returns the share of all pixels that is void, in [0, 1]."""
        return self.void / max(self.void + sum(self.pixels), 1)

    @property
    def lost(self) -> str:
        """A sentence about classes that may have been read as void; "" without any."""
        return lost_classes(self.names, self.pixels, self.void, len(self.good))

    def problems(self) -> str:
        """Returns every bad sample, a line each."""
        return "\n".join(str(problem) for _, problem in self.bad)

    def content(self) -> dict[str, Any]:
        """Returns plain values for a JSON file."""
        number, fewest, mean, most = self.captions
        rows = zip(self.names, self.pixels, self.records)
        return {
            "source": self.name,
            "records": self.count,
            "good": len(self.good),
            "bad": [
                {"index": index, **dict(zip(("file", "cause", "expected", "remedy"), problem.args))}
                for index, problem in self.bad
            ],
            "sizes": {f"{h}x{w}": n for (h, w), n in self.sizes},
            "files": dict(self.kinds),
            "captions": {
                "count": number,
                "fewest": fewest,
                "mean": mean,
                "most": most,
                "made": self.made,
            },
            "void_share": self.void_share,
            "void_all_over": list(self.empty),
            "classes": [{"name": n, "pixels": p, "records": r} for n, p, r in rows],
            "never_seen": list(self.unseen),
            "duplicates": [list(group) for group in self.duplicates],
        }

    def table(self) -> str:
        """Returns the report as text."""
        number, fewest, mean, most = self.captions
        sizes = [f"{w}x{h} ({n})" for (h, w), n in self.sizes[:5]]
        more = f" and {len(self.sizes) - 5} more" if len(self.sizes) > 5 else ""
        kinds = [f"{ending or 'none'} ({n})" for ending, n in self.kinds]
        lines = [
            f"{self.name}: {len(self.good)} of {self.count} records are good",
            f"  sizes       {', '.join(sizes) or 'none'}{more}  (width x height)",
            *([f"  files       {', '.join(kinds)}"] if kinds else []),
            f"  captions    {number}, of {fewest} to {most} words, {mean:.1f} on average; "
            f"made from the labels: {self.made}",
            f"  void        {100 * self.void_share:.2f} % of pixels; "
            f"records void all over: {len(self.empty)}{listed(self.empty)}",
            f"  never seen  {', '.join(self.unseen) or 'none'}",
            f"  duplicates  groups of equal images: {len(self.duplicates)}"
            f"{listed([' = '.join(group) for group in self.duplicates])}",
            *self._histogram(),
        ]
        if self.lost:
            lines.append(f"  WARNING     {self.lost}")
        if self.bad:
            lines += [f"  bad         {len(self.bad)}:", self.problems()]
        return "\n".join(lines)

    def _histogram(self) -> list[str]:
        total = max(sum(self.pixels), 1)
        width = max(map(len, ("class", *self.names)))
        rows = sorted(zip(self.pixels, self.names, self.records), key=lambda row: -row[0])
        head = f"  {'class':<{width}}  {'share':>8}  {'pixels':>14}  {'records':>8}"
        return [head] + [
            f"  {name:<{width}}  {100 * pixels / total:7.3f}%  {pixels:14,d}  {records:8,d}"
            for pixels, name, records in rows
        ]


def listed(names: Iterable[str], most: int = 5) -> str:
    """Returns the first few names in brackets, nothing when there are none."""
    names = list(names)
    more = ", ..." if len(names) > most else ""
    return f" ({', '.join(names[:most])}{more})" if names else ""


def silent(iterable: Iterable[Any], *, total: int, desc: str) -> Iterable[Any]:
    """Returns ``iterable``: no progress is shown. Takes the arguments of ``tqdm``."""
    return iterable


def scan(
    source: Source,
    *,
    threads: int = 4,
    limit: int | None = None,
    spread: bool = False,
    progress: Progress = silent,
) -> Report:
    """Reads every record and reports.

    Args:
      limit: looks at at most this many records, the first ones.
      spread: takes these evenly from the whole source instead.
      progress: wraps the findings as they come, like ``tqdm``.
    """
    count = len(source) if limit is None else min(limit, len(source))
    wanted = [i * len(source) // count for i in range(count)] if spread else range(count)
    examined = in_order(lambda index: examine(source, index), wanted, threads)
    findings = list(progress(examined, total=count, desc=f"reading {source.name}"))
    # The listing of a folder may have problems that belong to no record.
    return summarise(source, findings, getattr(source, "problems", ()))


def examine(source: Source, index: int) -> Finding:
    """Reads and checks one record."""
    try:
        record = source[index]
        check_record(record, source.classes)
    except BadSample as problem:
        return Finding(index, problem=problem)
    labels = record["labels"]
    # VOID counts as one more class, after the others.
    values = np.where(labels < 0, len(source.classes), labels).ravel()
    return Finding(
        position=index,
        id=record["id"],
        size=(labels.shape[0], labels.shape[1]),
        pixels=np.bincount(values, minlength=len(source.classes) + 1),
        words=tuple(len(split(caption)) for caption in record["captions"]),
        made=record["captions"] == (describe(labels, source.classes),),
        # With the shape: grey stripes of two shapes may have the same bytes.
        digest=hashlib.sha256(record["image"].tobytes() + str(labels.shape).encode()).digest(),
    )


def summarise(source: Source, findings: list[Finding], others: Iterable[BadSample]) -> Report:
    """Adds findings up; ``others`` are problems that belong to no record."""
    good = [finding for finding in findings if finding.problem is None]
    rows = [finding.pixels for finding in good]
    pixels = np.array(rows, np.int64).reshape(len(good), len(source.classes) + 1)
    words = [n for finding in good for n in finding.words]
    mean = sum(words) / len(words) if words else 0.0
    same_image: dict[bytes, list[str]] = {}
    for finding in good:
        same_image.setdefault(finding.digest, []).append(finding.id)
    return Report(
        name=source.name,
        names=source.classes.names,
        count=len(findings),
        good=tuple(finding.position for finding in good),
        pixels=tuple(pixels.sum(0)[:-1].tolist()),
        records=tuple((pixels > 0).sum(0)[:-1].tolist()),
        void=int(pixels.sum(0)[-1]),
        sizes=tuple(Counter(finding.size for finding in good).most_common()),
        captions=(len(words), min(words, default=0), mean, max(words, default=0)),
        empty=tuple(f.id for f, row in zip(good, pixels) if not row[:-1].any()),
        duplicates=tuple(tuple(ids) for ids in same_image.values() if len(ids) > 1),
        made=sum(finding.made for finding in good),
        kinds=tuple(Counter(getattr(source, "kinds", dict)()).most_common()),
        bad=(
            *((f.position, f.problem) for f in findings if f.problem is not None),
            *((-1, problem) for problem in others),
        ),
    )

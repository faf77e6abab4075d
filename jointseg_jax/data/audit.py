"""Reads every record of a source once and says what is in it and what is wrong with it.

Counted per class: pixels, and records that show it. Also image sizes, caption lengths in words,
void pixels, records that are void all over (they teach nothing), classes that never occur, records
whose images are the same to the pixel, and every bad sample with file, cause and remedy.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jointseg_jax.data.records import BadSample, Source, check_record
from jointseg_jax.data.tokenizer import split
from jointseg_jax.data.workers import in_order

Progress = Callable[..., Iterable[Any]]


@runtime_checkable
class Listed(Protocol):
    """A source whose listing has problems that belong to no record."""

    @property
    def problems(self) -> tuple[BadSample, ...]:
        """Returns those problems."""
        ...


class Finding(NamedTuple):
    """What one record holds, or what is wrong with it."""

    index: int
    id: str = ""
    size: tuple[int, int] = (0, 0)
    pixels: np.ndarray | None = None  # per class, void last
    words: tuple[int, ...] = ()
    digest: bytes = b""
    problem: BadSample | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The findings of a scan.

    Args:
      count: records looked at.
      good: indices of those that can be used.
      pixels: pixels per class.
      records: records that show the class.
      bad: what is wrong with the others, with their index (-1: with no record in particular).
      sizes: (height, width) and how many records have it, the commonest first.
      captions: number of captions and fewest, mean and most words.
      void: pixels without annotation.
      empty: ids of records that are void all over.
      duplicates: groups of ids whose images are equal.
    """

    name: str
    names: tuple[str, ...]
    count: int
    good: tuple[int, ...]
    pixels: tuple[int, ...]
    records: tuple[int, ...]
    void: int
    sizes: tuple[tuple[tuple[int, int], int], ...]
    captions: tuple[int, int, float, int]
    empty: tuple[str, ...]
    duplicates: tuple[tuple[str, ...], ...]
    bad: tuple[tuple[int, BadSample], ...]

    @property
    def unseen(self) -> tuple[str, ...]:
        """Names the classes that no record shows."""
        return tuple(name for name, n in zip(self.names, self.records) if not n)

    @property
    def void_share(self) -> float:
        """Returns the part of all pixels that is void."""
        return self.void / max(self.void + sum(self.pixels), 1)

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
                {
                    "index": index,
                    "file": problem.path,
                    "cause": problem.found,
                    "expected": problem.expected,
                    "remedy": problem.remedy,
                }
                for index, problem in self.bad
            ],
            "sizes": {f"{h}x{w}": n for (h, w), n in self.sizes},
            "captions": {"count": number, "fewest": fewest, "mean": mean, "most": most},
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
        lines = [
            f"{self.name}: {len(self.good)} of {self.count} records are good",
            f"  sizes       {', '.join(sizes) or 'none'}{more}  (width x height)",
            f"  captions    {number}, of {fewest} to {most} words, {mean:.1f} on average",
            f"  void        {100 * self.void_share:.2f} % of pixels; "
            f"records void all over: {len(self.empty)}{listed(self.empty)}",
            f"  never seen  {', '.join(self.unseen) or 'none'}",
            f"  duplicates  groups of equal images: {len(self.duplicates)}"
            f"{listed([' = '.join(group) for group in self.duplicates])}",
            *self._histogram(),
        ]
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
    """Shows no progress; takes the arguments of ``tqdm``."""
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
      limit: looks at so many records only, from the first on.
      spread: takes these evenly from the whole source instead.
      progress: wraps the findings as they come, like ``tqdm``.
    """
    count = len(source) if limit is None else min(limit, len(source))
    wanted = [i * len(source) // count for i in range(count)] if spread else range(count)
    found = in_order(lambda index: examine(source, index), wanted, threads)
    findings = list(progress(found, total=count, desc=f"reading {source.name}"))
    apart = source.problems if isinstance(source, Listed) else ()
    return summarise(source, findings, apart)


def examine(source: Source, index: int) -> Finding:
    """Reads and checks one record."""
    try:
        record = source[index]
        check_record(record, source.classes)
    except BadSample as problem:
        return Finding(index, problem=problem)
    labels = record["labels"]
    values = np.where(labels < 0, len(source.classes), labels).ravel()
    return Finding(
        index=index,
        id=record["id"],
        size=labels.shape,
        pixels=np.bincount(values, minlength=len(source.classes) + 1),
        words=tuple(len(split(caption)) for caption in record["captions"]),
        digest=hashlib.sha256(
            record["image"].tobytes() + bytes(str(labels.shape), "ascii")
        ).digest(),
    )


def summarise(source: Source, findings: list[Finding], apart: Iterable[BadSample]) -> Report:
    """Adds findings up."""
    good = [finding for finding in findings if finding.problem is None]
    pixels = np.zeros((len(good), len(source.classes) + 1), np.int64)
    for row, finding in zip(pixels, good):
        row[:] = finding.pixels
    words = [n for finding in good for n in finding.words]
    return Report(
        name=source.name,
        names=source.classes.names,
        count=len(findings),
        good=tuple(finding.index for finding in good),
        pixels=tuple(pixels.sum(0)[:-1].tolist()),
        records=tuple((pixels > 0).sum(0)[:-1].tolist()),
        void=int(pixels.sum(0)[-1]),
        sizes=tuple(Counter(finding.size for finding in good).most_common()),
        captions=(len(words), min(words, default=0), mean(words), max(words, default=0)),
        empty=tuple(f.id for f, row in zip(good, pixels) if not row[:-1].any()),
        duplicates=same_images(good),
        bad=tuple((f.index, f.problem) for f in findings if f.problem is not None)
        + tuple((-1, problem) for problem in apart),
    )


def mean(numbers: list[int]) -> float:
    """Returns the mean, 0 of nothing."""
    return sum(numbers) / len(numbers) if numbers else 0.0


def same_images(good: list[Finding]) -> tuple[tuple[str, ...], ...]:
    """Groups the ids of records whose images are equal."""
    groups: dict[bytes, list[str]] = {}
    for finding in good:
        groups.setdefault(finding.digest, []).append(finding.id)
    return tuple(tuple(ids) for ids in groups.values() if len(ids) > 1)

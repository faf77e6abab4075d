"""Where the time of a program goes, read from a trace of it; no TensorFlow, no viewer.

1. An event is an operation of the program if it says of which (``hlo_op``), if it is on a TPU's
   line of operations, or if it is a kernel on a GPU's stream.
2. Its own time is its length without the events inside it on the same line, so that a loop does
   not count what its body does.
3. Operations that differ by number only (``fusion.12``, ``fusion.40``) and belong to the same part
   of the network are one row; parts are known from the program's text.
4. Shares are of the own time of all operations, over all chips; on CPU the operations of one moment
   stand on several threads.
"""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jointseg_jax.perf.costs import ELSEWHERE, part_of
from jointseg_jax.perf.harness import Values
from jointseg_jax.perf.hlo import Module

TOP = 10
"""Operations that are listed."""


class Event(NamedTuple):
    """One run of an operation, in nanoseconds."""

    name: str
    start: float
    length: float


class Row(NamedTuple):
    """Operations of one name in one part of the program."""

    name: str
    part: str
    milliseconds: float
    share: float  # of the time of all operations
    count: float  # runs in one call


def traced(run: Callable[[], object], text: str) -> Values:
    """Runs something under the profiler and says where its time went.

    Args:
      run: makes one call of the program and waits for its end.
      text: of the optimized program; without it there are no parts.
    """
    options = jax.profiler.ProfileOptions()
    # Python's own calls would fill the trace and slow what is traced.
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        lines = [line for path in Path(folder).rglob("*.xplane.pb") for line in events(path)]
    rows = table(lines, parts(text) if text else {})
    by_part = collections.Counter()
    for row in rows:
        by_part[row.part] += row.share
    return {
        "operations": [
            {"name": r.name, "part": r.part, "ms": round(r.milliseconds, 4)}
            | {"share": round(r.share, 4), "count": round(r.count, 1)}
            for r in rows[:TOP]
        ],
        "operations_ms": round(sum(row.milliseconds for row in rows), 4),
        "parts": {k: round(v, 4) for k, v in by_part.most_common(TOP)} if text else {},
    }


def events(path: Path) -> list[list[Event]]:
    """The operations in a trace file, line by line."""
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    lines = [_operations(plane.name, line) for plane in planes for line in plane.lines]
    return [line for line in lines if line]


def _operations(plane: str, line: Any) -> list[Event]:
    """The operations on a line of a plane, as JAX's ``ProfileData`` has them."""
    tpu = plane.startswith("/device:TPU") and line.name == "XLA Ops"
    gpu = plane.startswith("/device:GPU") and line.name.startswith("Stream")
    host = plane.startswith("/host:CPU") and line.name != "python"
    if not (tpu or gpu or host):
        return []
    found = []
    for event in line.events:
        name = dict(event.stats).get("hlo_op") or (None if host else event.name)
        if name:
            found.append(Event(_short(str(name)), event.start_ns, event.duration_ns))
    return found


def _short(name: str) -> str:
    """``fusion.12`` of ``%fusion.12 = bf16[...] fusion(...)``, as TPUs name their events."""
    return name.split(" = ")[0].strip().lstrip("%")


def parts(text: str) -> dict[str, str]:
    """The part of the network that each instruction of a program belongs to."""
    every = (i for found in Module(text).computations.values() for i in found.items())
    return {name: part_of(instruction) for name, instruction in every}


def own_times(line: Iterable[Event]) -> Iterator[tuple[str, float]]:
    """Each event's name and its length without the events inside it."""
    open_events: list[list[Any]] = []  # name, end, own time
    for event in sorted(line, key=lambda e: (e.start, -e.length)):
        end = event.start + event.length
        # Events nest: whatever ended before this one starts is complete.
        while open_events and open_events[-1][1] <= event.start:
            name, _, own = open_events.pop()
            yield name, own
        # It lies inside the one that is still open, whose own time it shortens.
        if open_events:
            open_events[-1][2] -= min(end, open_events[-1][1]) - event.start
        open_events.append([event.name, end, event.length])
    for name, _, own in open_events:
        yield name, own


def table(lines: Iterable[Iterable[Event]], part: dict[str, str], calls: int = 1) -> list[Row]:
    """Rows of one name and part, the longest first."""
    times, counts = collections.Counter(), collections.Counter()
    for line in lines:
        for name, own in own_times(line):
            # fusion.12.remat2 -> fusion
            row = (re.sub(r"([._]\d+|\.clone|\.remat\d*)+$", "", name), part.get(name, ELSEWHERE))
            times[row] += max(own, 0.0)
            counts[row] += 1
    total = sum(times.values()) or 1.0
    return [
        Row(name, where, own / 1e6 / calls, own / total, counts[name, where] / calls)
        for (name, where), own in times.most_common()
    ]

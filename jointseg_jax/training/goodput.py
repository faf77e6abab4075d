"""Where the time of a run went, over all its restarts.

At any moment one phase is on, by the host's clock. ``goodput.jsonl`` takes a record at the
beginning (and after a return to a checkpoint), at each log point and after each save: the step, and
the seconds of this launch by phase. From all records,

  goodput = step / (start + compile + data + step + save + evaluation + lost)

``lost`` are the seconds of steps that a later launch has thrown away, for it began before them;
``down`` is the time between launches, and what a killed one did after its last record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jointseg_jax import jsonl

PHASES = ("start", "compile", "data", "step", "save", "evaluation")
KEPT = ("start", "compile")  # not thrown away with the steps that followed them
STALL = 10.0  # seconds by which a window must have been longer than usual to count as stalled
FILE = "goodput.jsonl"
log = logging.getLogger("jointseg_jax")

Seconds = dict[str, float]


class Goodput:
    """The clock of one launch; the process that ``writes`` keeps the file, the first one."""

    def __init__(self, workdir: Path, *, writes: bool = True):
        self._path, self._writes = workdir / FILE, writes
        earlier = [r.get("launch", 0) for r in records(self._path)] if writes else []
        self._launch = max(earlier, default=0) + 1
        self._seconds: Seconds = dict.fromkeys(PHASES, 0.0)
        self.phase, self._since = "start", time.perf_counter()
        self._paces: deque[float] = deque(maxlen=20)  # seconds per step of the last windows
        self._logged: tuple[int, float] | None = None  # step and seconds of the last log point
        self._stalled = 0.0

    def enter(self, phase: str, *, behind: bool = False) -> None:
        """Ends the phase that is on and begins another.

        Args:
          behind: True if the devices worked meanwhile: the time is then that of the new phase.
        """
        now = time.perf_counter()
        self._seconds[phase if behind else self.phase] += now - self._since
        self.phase, self._since = phase, now

    def begin(self, step: int) -> None:
        """Notes the step that training goes on from, at the start or after going back."""
        self._logged = None
        self._write({"begin": step})

    def logged(self, step: int) -> None:
        """Notes how far training has come, at a log point, and whether it took unusually long."""
        self.enter(self.phase)
        spent = self._seconds["data"] + self._seconds["step"]
        if self._logged is not None and step > self._logged[0]:
            self._compare(step, step - self._logged[0], spent - self._logged[1])
        self._logged = (step, spent)
        self.reached(step)

    def _compare(self, step: int, steps: int, seconds: float) -> None:
        usual = statistics.median(self._paces) * steps if len(self._paces) >= 3 else seconds
        if seconds - usual < max(STALL, 0.2 * usual):
            self._paces.append(seconds / steps)
            return
        self._stalled += seconds - usual
        log.warning(
            f"steps {step - steps} to {step} took {jsonl.duration(seconds - usual)} longer than "
            "usual: this host was stopped or slow, or it waited for another that was"
        )

    def reached(self, step: int) -> None:
        """Notes how far training has come."""
        self._write({"step": step})

    def _write(self, what: Mapping[str, int]) -> None:
        self.enter(self.phase)
        if not self._writes:
            return
        seconds = {k: round(v, 4) for k, v in self._seconds.items()}
        record = {**what, "launch": self._launch, "time": time.time(), "seconds": seconds}
        if self._stalled:
            record["stalled"] = round(self._stalled, 4)
        append(self._path, record)


@contextlib.contextmanager
def evaluation(workdir: Path, *, writes: bool = True) -> Iterator[None]:
    """Counts what is done inside as evaluation, after the last step of a run."""
    clock = Goodput(workdir, writes=writes)
    clock.enter("evaluation")
    yield
    clock.reached(summary(workdir).step if writes else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What became of the time, in seconds."""

    step: int
    launches: int
    seconds: Seconds  # by phase, without what was lost
    lost: float
    lost_steps: int
    down: float
    stalled: float = 0.0  # seconds by which windows took far longer than usual; part of ``seconds``

    @property
    def total(self) -> float:
        """All but ``down``."""
        return sum(self.seconds.values()) + self.lost

    @property
    def goodput(self) -> float:
        """The part of the total that went into steps that count."""
        return self.seconds["step"] / self.total if self.total else 0.0

    def values(self) -> dict[str, Any]:
        """The summary as plain values."""
        parts = {**self.seconds, "lost": self.lost, "down": self.down, "total": self.total}
        parts["stalled"] = self.stalled
        counts = {"step": self.step, "launches": self.launches, "lost_steps": self.lost_steps}
        rounded = {f"{name}_s": round(seconds, 3) for name, seconds in parts.items()}
        return {"goodput": round(self.goodput, 4), **rounded, **counts}

    def line(self) -> str:
        """The summary as one readable line."""
        names = {"step": "steps", "data": "data wait"}
        order = ("step", "data", "compile", "save", "evaluation", "start")
        parts = [f"{names.get(p, p)} {jsonl.duration(self.seconds[p])}" for p in order]
        if self.stalled:
            parts[0] += f" (stalled for {jsonl.duration(self.stalled)})"
        steps = f" ({self.lost_steps} steps)" if self.lost_steps else ""
        parts.append(f"lost to restarts {jsonl.duration(self.lost)}{steps}")
        if self.launches > 1:
            parts.append(f"not counted: {jsonl.duration(self.down)} between launches")
        times = "1 launch" if self.launches == 1 else f"{self.launches} launches"
        head = f"goodput {100 * self.goodput:.1f} % of {jsonl.duration(self.total)} in {times}"
        return f"{head}: {', '.join(parts)}"


def summary(workdir: Path) -> Summary:
    """What the records of a workdir add up to."""
    zero: Seconds = dict.fromkeys(PHASES, 0.0)
    lost, lost_steps, down = dict(zero), 0, 0.0
    live: list[tuple[int, Seconds]] = [(0, zero)]  # what counts: (step, all seconds till then)
    before = now = zero  # before: all seconds of earlier launches
    launch, launches, last = None, 0, 0.0
    stalled: dict[int, float] = {}  # by launch
    for record in records(workdir / FILE):
        if record["launch"] != launch:
            launches += "begin" in record  # an evaluation is part of the launch before it
            began = record["time"] - sum(record["seconds"].values())
            down += max(began - last, 0.0) if launch is not None else 0.0
            before, launch = now, record["launch"]
        stalled[record["launch"]] = record.get("stalled", 0.0)
        now, last = {p: before[p] + record["seconds"][p] for p in PHASES}, record["time"]
        if "begin" in record:
            step, (reached, until) = record["begin"], live[-1]
            live = [(s, t) for s, t in live if s <= step]
            if reached > step:
                lost_steps += reached - step
                for phase in set(PHASES) - set(KEPT):
                    lost[phase] += until[phase] - live[-1][1][phase]
        counts = {p: now[p] - lost[p] for p in PHASES}
        live.append((record.get("step", record.get("begin", 0)), counts))
    return Summary(
        step=live[-1][0],
        launches=launches,
        seconds={p: now[p] - lost[p] for p in PHASES},
        lost=sum(lost.values()),
        lost_steps=lost_steps,
        down=down,
        stalled=sum(stalled.values()),
    )


def log_summary(workdir: Path, *, since: float = 0.0) -> None:
    """Logs the summary and adds it to the file, if anything was recorded since (Unix time)."""
    if any(record["time"] >= since for record in records(workdir / FILE)):
        found = summary(workdir)
        log.info("%s", found.line())
        append(workdir / FILE, {"summary": found.values(), "time": time.time()})


def records(path: Path) -> list[jsonl.Record]:
    """The records of a file, without summaries, torn lines and whatever else is no record."""
    return list(filter(_is_whole, jsonl.read(path))) if path.exists() else []


def append(path: Path, record: Mapping[str, object]) -> None:
    """Adds one line, if the disk allows it."""
    # a full disk ends a run where it loses something that matters: at the next checkpoint
    with contextlib.suppress(OSError):
        jsonl.append(path, record)


def _is_whole(record: jsonl.Record) -> bool:
    # a line may hold any JSON: what other programs wrote there is no record
    try:
        numbers = [record["launch"], record["time"], record.get("stalled", 0.0)]
        numbers += [record["seconds"][p] for p in PHASES]
    except (KeyError, TypeError):
        return False
    return all(isinstance(n, int | float) for n in numbers)

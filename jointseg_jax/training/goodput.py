"""Where the time of a run went, over all its restarts.

1. At any moment one phase is on; its seconds are those of the host's clock, and a phase that waits
   for the devices is given their time. So a save or a preview also counts what was left of the
   steps in flight (two at most). Reading a batch counts as data where the devices had nothing to
   do when it came, and as part of the step otherwise.
2. ``goodput.jsonl`` takes one record at the beginning (and after a return to a checkpoint), at each
   log point and after each save: the step, and the seconds of this launch by phase.
3. A launch that begins at an earlier step than the last one had reached has thrown the steps
   between away: their seconds (without start-up and compilation, which stay what they are) are
   ``lost``. What a killed launch did after its last record nobody knows: it is part of ``down``,
   the time between launches, which stands apart.
4. Seconds by which a window between two log points took longer than those before it, where they are
   many, are *stalled*: a host that was stopped or slow, or waiting for one. They stay part of their
   phase and are told apart.
5. ``goodput = step / (start + compile + data + step + save + evaluation + lost)``.
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
KEPT = ("start", "compile")
"""Phases that are not thrown away with the steps that followed them."""

STALL = 10.0
"""Seconds by which a window must have been longer than usual to count as stalled."""

FILE = "goodput.jsonl"
log = logging.getLogger("jointseg_jax")

Seconds = dict[str, float]


class Goodput:
    """The clock of one launch.

    Args:
      workdir: of the run.
      writes: whether this process keeps the file (the first one does).
    """

    def __init__(self, workdir: Path, *, writes: bool = True):
        self._path, self._writes = workdir / FILE, writes
        earlier = [r.get("launch", 0) for r in records(self._path)] if writes else []
        self._launch = max(earlier, default=0) + 1
        self._seconds: Seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = "start", time.perf_counter()
        self._paces: deque[float] = deque(maxlen=20)  # seconds per step of the last windows
        self._logged: tuple[int, float] | None = None  # step and seconds of the last log point
        self._stalled = 0.0

    @property
    def phase(self) -> str:
        """The phase that is on."""
        return self._phase

    def enter(self, phase: str, *, behind: bool = False) -> None:
        """Ends the phase that is on and begins another.

        Args:
          behind: whether the phase that ends went on behind the one that begins, which is then
            given its time.
        """
        now = time.perf_counter()
        self._seconds[phase if behind else self._phase] += now - self._since
        self._phase, self._since = phase, now

    def begin(self, step: int) -> None:
        """Notes the step that training goes on from, at the start or after going back."""
        self._logged = None
        self._write({"begin": step})

    def logged(self, step: int) -> None:
        """Notes how far training has come, at a log point, and whether it took unusually long."""
        self.enter(self._phase)
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
            "steps %d to %d took %s longer than usual: this host was stopped or slow, or it "
            "waited for another that was",
            *(step - steps, step, jsonl.duration(seconds - usual)),
        )

    def reached(self, step: int) -> None:
        """Notes how far training has come."""
        self._write({"step": step})

    def _write(self, what: Mapping[str, int]) -> None:
        self.enter(self._phase)
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
    """What became of the time, in seconds; see the module docstring."""

    step: int
    launches: int
    seconds: Seconds
    lost: float
    lost_steps: int
    down: float
    stalled: float = 0.0

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
        parts = {f"{phase}_s": self.seconds[phase] for phase in PHASES}
        parts |= {"lost_s": self.lost, "down_s": self.down, "total_s": self.total}
        parts["stalled_s"] = self.stalled
        counts = {"step": self.step, "launches": self.launches, "lost_steps": self.lost_steps}
        rounded = {name: round(seconds, 3) for name, seconds in parts.items()}
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
    lost, lost_steps, down = dict.fromkeys(PHASES, 0.0), 0, 0.0
    live: list[tuple[int, Seconds]] = []  # of what still counts: (step, all that counts till then)
    before = dict.fromkeys(PHASES, 0.0)  # all seconds of earlier launches
    now, launch, launches, last = before, None, 0, 0.0
    stalled: dict[int, float] = {}  # by launch
    for record in records(workdir / FILE):
        if record["launch"] != launch:
            launches += "begin" in record  # an evaluation is part of the launch before it
            began = record["time"] - sum(record["seconds"].values())
            down += max(began - last, 0.0) if launch is not None else 0.0
            before, launch = now, record["launch"]
        stalled[record["launch"]] = record.get("stalled", 0.0)
        now, last = {p: before[p] + record["seconds"][p] for p in PHASES}, record["time"]
        if "begin" in record and live:
            step = record["begin"]
            reached, until = live[-1]
            live = [(s, t) for s, t in live if s <= step]
            since = live[-1][1] if live else dict.fromkeys(PHASES, 0.0)
            lost_steps += max(reached - step, 0)
            for phase in set(PHASES) - set(KEPT):
                lost[phase] += until[phase] - since[phase] if reached > step else 0.0
        counts = {p: now[p] - lost[p] for p in PHASES}
        live.append((record.get("step", record.get("begin", 0)), counts))
    return Summary(
        step=live[-1][0] if live else 0,
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
    try:
        numbers = [record["launch"], record["time"], record.get("stalled", 0.0)]
        numbers += [record["seconds"][p] for p in PHASES]
    except (KeyError, TypeError):
        return False
    return all(isinstance(n, int | float) for n in numbers)

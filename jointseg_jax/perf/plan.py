"""A fixed list of benchmarks for an accelerator that is there for minutes, most valuable first.

1. A job consists of parts, each a command in a process of its own whose last line of output is one
   JSON object. A crash, or a part that is out of memory or time, loses that part only.
2. A job starts if its ``estimate`` is left of the plan's time, else it is skipped; it ends after
   its ``limit``, or when the plan's time is over.
3. ``OUT/JOB.json`` is written after every part, ``OUT/summary.json`` after every job.

Every record has a ``status``: ``done``, ``failed`` (with ``error``, the end of what the command
printed), ``out of time``, ``skipped`` (with ``reason``), or ``absent`` where a command says that
something it needs is not installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from jointseg_jax.jsonl import Record
from jointseg_jax.perf.harness import last_object, rounded

ERROR_TEXT = 3000
"""Characters of a failed command's output that its record keeps."""

ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # JAX's default leaves a quarter of the memory
    "PYTHONUNBUFFERED": "1",
}
"""Variables of every command, unless the user has set them."""

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Commands that belong together."""

    name: str
    parts: Mapping[str, Sequence[str]]  # name -> command; {seconds}: what is left for it
    estimate: int | float  # seconds; with less left, the job is skipped
    limit: int | float  # seconds after which it is ended
    # a part that failed is tried once more with these words: first key in its error -> words
    retry: Mapping[str, Sequence[str]] = field(default_factory=dict)


def run_plan(jobs: Sequence[Job], out: Path, *, minutes: float, cwd: Path, log: Log) -> Record:
    """Runs the jobs and returns the summary, which is in ``out`` too.

    Args:
      minutes: for all jobs together.
      cwd: folder that commands start in.
      log: called with a line for every job and part.
    """
    out.mkdir(parents=True, exist_ok=True)
    start, rows = time.monotonic(), []
    # In order of value: what comes last is what a short slot can do without.
    for job in jobs:
        left = 60 * minutes - (time.monotonic() - start)
        record: Record = {"job": job.name, "estimate_s": job.estimate, "limit_s": job.limit}
        if left < job.estimate:
            text = f"it needs about {job.estimate:.0f} s and {max(left, 0):.0f} s are left of "
            record |= {"status": "skipped", "reason": f"{text}--plan_minutes={minutes:g}"}
            log(f"{job.name}: skipped; {record['reason']}")
        else:
            end = time.monotonic() + min(job.limit, left)
            _run_job(job, record, out, end, cwd, log)
        _write(out / f"{job.name}.json", record)
        rows += rows_of(record)
        spent = round(time.monotonic() - start, 1)
        summary = {"minutes": minutes, "seconds": spent, "rows": rows}
        _write(out / "summary.json", summary)
    return summary


def _run_job(job: Job, record: Record, out: Path, end: float, cwd: Path, log: Log) -> None:
    """Runs the parts until the clock shows ``end``, and writes the record after each."""
    waiting, parts = list(job.parts.items()), {}
    while waiting:
        name, command = waiting.pop(0)
        found = parts[name] = run_command(command, end - time.monotonic(), cwd)
        log(f"{job.name}, {name}: {found['status']}, {found['seconds']} s")
        words = next((w for key, w in job.retry.items() if key in found.get("error", "")), None)
        if found["status"] == "failed" and words and name in job.parts:
            waiting.insert(0, (f"{name} {' '.join(words)}", (*command, *words)))
        states = [part["status"] for part in parts.values()]
        # One failure marks the job, whatever else it brought.
        worst = next((s for s in ("failed", "out of time", "absent") if s in states), "done")
        record |= {"status": worst, "parts": parts}
        _write(out / f"{job.name}.json", record)


def run_command(command: Sequence[str], seconds: float, cwd: Path) -> Record:
    """The record of one command: what it printed last, or what went wrong."""
    words = [word.replace("{seconds}", f"{max(seconds, 0):.0f}") for word in command]
    record: Record = {"command": " ".join(words), "seconds": 0.0}
    if seconds <= 0:
        return record | {"status": "out of time", "error": "not started: the job's time is over"}
    # The package of ``cwd`` is found without being installed.
    path = os.pathsep.join(filter(None, (str(cwd), os.environ.get("PYTHONPATH"))))
    environment = {**ENVIRONMENT, **os.environ, "PYTHONPATH": path}
    start, status = time.monotonic(), None
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # A group of its own, so that readers and compilers end with it, in the same session, so
        # that nothing outlives a machine that is taken back.
        process = subprocess.Popen(
            words, cwd=cwd, env=environment, stdout=out, stderr=err, process_group=0
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printed, errors = _read(out), _read(err)
    record["seconds"] = round(time.monotonic() - start, 1)
    tail = (errors.strip() or printed.strip())[-ERROR_TEXT:]
    if status is None:
        text = f"ended after {seconds:.0f} s\n{tail}"
        return record | {"status": "out of time", "error": text}
    values = last_object(printed)
    if status != 0 or values is None:
        return record | {"status": "failed", "error": f"exit status {status}\n{tail}"}
    return record | {"status": "absent" if "absent" in values else "done", "values": values}


def _read(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


def _write(path: Path, record: Record) -> None:
    """Replaces the file whole: a plan that is ended leaves no half of one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


# ------------------------------------------------------------------------------ summary


def rows_of(record: Record) -> list[Record]:
    """The lines of the summary for one job: one for each action that was timed, or each part."""
    name = record["job"]
    if "parts" not in record:
        return [{"job": name, "status": record["status"], "note": record["reason"]}]
    rows = []
    for part, found in record["parts"].items():
        head = {"job": name, "part": part, "status": found["status"]}
        values = found.get("values", {})
        if text := found.get("error") or values.get("absent"):
            rows.append(head | {"note": " ".join(text.split())[:300]})
        elif "times" in values:
            rows += [head | {"what": what} | _figures(values, what) for what in values["times"]]
        else:
            rows.append(head | values.get("summary", {}))
    # Beside a peer's time, how many times ours it is; parts are called NETWORK BACKEND.
    times = {(row["part"], row.get("what")): row.get("median_ms") for row in rows}
    for row in rows:
        network, _, backend = row["part"].rpartition(" ")
        own = times.get((f"{network} jax", row.get("what")))
        if own and "median_ms" in row and backend != "jax":
            row["times_ours"] = rounded(row["median_ms"] / own, 4)
    return rows


def _figures(values: Mapping, what: str) -> Record:
    """The figures of one timed action, of ``launch/benchmark.py`` or ``bench_peer``."""
    times, speed = values["times"][what], values.get("speed", values)
    out = {"median_ms": times["median_ms"], "images_per_second": times.get("images_per_second")}
    if what == "written":
        return out  # its time is not the network's alone
    for key in ("tflops", "mfu"):
        value = speed.get(key)
        out[key] = value.get(what) if isinstance(value, Mapping) else value
    out["ceiling_tflops"] = speed.get("ceiling_tflops")
    out["chip_peak_gib"] = values.get("memory", {}).get("chip_peak_gib")
    return out


def table(summary: Record) -> str:
    """The summary as lines of text."""
    lines = [f"{summary['seconds']} s of {summary['minutes']:g} min"]
    for row in summary["rows"]:
        head = " ".join(str(row[k]) for k in ("job", "part", "what") if k in row)
        rest = {k: v for k, v in row.items() if k not in ("job", "part", "what", "status", "note")}
        shown = ", ".join(f"{k} {v}" for k, v in rest.items() if v is not None)
        note = " ".join(str(row.get("note", "")).split())[:120]
        lines.append(f"  {head:<40} {row['status']:<12} {shown}{note}".rstrip())
    return "\n".join(lines)


# --------------------------------------------------------------------------- the GPU's


def gpu_jobs(out: Path, *, smoke: bool) -> list[Job]:
    """What one GPU is asked in ten minutes; commands start in the root of the repository.

    Args:
      smoke: the same commands at tiny sizes, for a CPU.
    """
    module, config = "-m jointseg_jax.perf.bench_", "launch/benchmark.py --config=configs/"
    codec, few = "--codec=configs/jodiffusion_codec.py", "--warmups=1 --repetitions=3"
    once = "--warmups=0 --repetitions=1 --calls=1 --notrace"
    quickstart = "--launcher=launch/train.py --grid=OUT/quickstart_grid.png"
    if smoke:
        attention = "--backends=packed --tokens=20,33 --rows=1 --heads=8 --size=16"
        jodiffusion = f"{config}jodiffusion.py:smoke {codec}:smoke --batch=8 {once}"
        pdm = f"{config}pdm.py:smoke --batch=8 {once}"
        train, sample, pairs = "", "--steps=2", "--steps=2"
        quickstart += " --config=configs/quickstart.py:smoke --trial_steps=4 --seconds=1"
        networks = {"tiny": ("jax", "eager")}
    else:
        attention = "--backends=cudnn --tokens=77,590,593,2129"
        jodiffusion = f"{config}jodiffusion.py:data=voc {codec}:data=voc --batch=16"
        pdm = f"{config}pdm.py:data=coco_panoptic {few}"
        train, sample, pairs = few, f"--steps=50 {once}", "--batch=64"
        quickstart += " --seconds={seconds}"
        networks = dict.fromkeys(("small", "large"), ("jax", "eager", "compiled"))
    peers = [("check", "--backend=check")]
    peers += [(f"{n} {b}", f"--network={n} --backend={b}") for n in networks for b in networks[n]]
    # Out of memory: recompute all. Anything else: the attention kernel, which was new here.
    retry = {"RESOURCE_EXHAUSTED": ("--remat=full",), "": ("--attention=xla",)}

    def job(name: str, estimate: int, limit: int, **parts: str) -> Job:
        # Placed after the split: a folder may have blanks in its name.
        folder = str(out.resolve())
        commands = {
            part: [sys.executable, *(word.replace("OUT", folder) for word in text.split())]
            for part, text in parts.items()
        }
        limit = 4 * limit if smoke else limit  # a CPU that does other work too
        again = retry if name in ("jodiffusion", "pdm") else {}
        return Job(name=name, parts=commands, estimate=estimate, limit=limit, retry=again)

    train = f"{jodiffusion} --what=train --cached --remat=dots {train}"
    return [
        job("attention", 30, 90, numerics=f"{module}attention {attention}"),
        job("jodiffusion", 90, 330, train=train, sample=f"{jodiffusion} --what=sample {sample}"),
        job("pdm", 60, 150, train=f"{pdm} --what=train", sample=f"{pdm} --what=sample {pairs}"),
        job("peer", 60, 200, **{k: f"{module}peer {words}" for k, words in peers}),
        # Four minutes, and the start and end of two runs; less if less is left.
        job("quickstart", 120, 300, train=f"{module}quickstart {quickstart}"),
    ]

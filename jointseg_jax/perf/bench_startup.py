"""From the start of ``launch/train.py`` to its first update, in processes of their own.

1. ``cold``: with an empty compile cache. ``warm``: the same again with the cache that this left.
2. The clock stops when the run logs the loss of its first update; from then on it is not needed and
   ends. Everything a user waits for is in it: interpreter, imports, data, parameters, compilation.
3. Whatever Linux keeps in memory of Python's files is as it is after many starts.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from jointseg_jax import jsonl
from jointseg_jax.perf import abstract
from jointseg_jax.perf.harness import Action, BenchConfig, Benchmark, Values
from jointseg_jax.types import UserError

PATIENCE = 1800
"""Seconds until a run without an update counts as stuck."""

POLL = 0.01

CONFIG = '''"""Written by launch/benchmark.py."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config of the run to start."""
    return ConfigDict({config!r}).lock()
'''


class Startup(Benchmark):
    """The benchmark of ``--what startup``: starts runs, each in a new workdir."""

    def __init__(self, bench: BenchConfig):
        quiet = {"log.every": 1, "finish.num": 0, "preview.every": 0}
        config = abstract.run_config(bench).replace(quiet)
        if config.steps < 2:
            raise UserError("ERROR [flags] --what=startup: config.steps must be 2 or more.")
        self.launcher = bench.launcher
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        (self.root / "config.py").write_text(CONFIG.format(config=config.values))
        self.runs = 0
        kinds = {kind: functools.partial(self.start, kind) for kind in ("cold", "warm")}
        self.actions = {kind: Action(run, warm=False) for kind, run in kinds.items()}
        timed = "seconds from the start of the process to its first update, compile cache empty "
        self.facts = {"timed": timed + "(cold) and filled (warm)", "batch": config.batch}
        # Seconds of the compiler in each start, as the runs say (-1: one did not).
        self.compiled: dict[str, list[float]] = {"cold": [], "warm": []}

    def start(self, kind: str, count: int) -> float:
        """Seconds until the first update; ``warm`` starts have the cache of the last cold one."""
        return sum(self._start(kind) for _ in range(count))

    def _start(self, kind: str) -> float:
        self.runs += 1
        workdir, output = self.root / f"run{self.runs}", self.root / f"output{self.runs}.txt"
        if kind == "cold":
            self.cache = self.root / f"cache{self.runs}"
        command = [sys.executable, self.launcher]
        command += [f"--config={self.root}/config.py", f"--workdir={workdir}"]
        # A cache of its own, so that the user's neither helps nor is filled.
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(self.cache)}
        with output.open("w") as out:
            # From here on everything counts that a user waits for.
            start = time.perf_counter()
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
            try:
                while not _updated(workdir / "metrics.jsonl"):
                    seconds = time.perf_counter() - start
                    if process.poll() is not None or seconds > PATIENCE:
                        raise UserError(
                            f"ERROR [startup] {' '.join(command)}: no update after {seconds:.0f} "
                            f"s. It said:\n{output.read_text()[-3000:]}"
                        )
                    time.sleep(POLL)
                seconds = time.perf_counter() - start
            finally:
                process.kill()
                process.wait()
        found = re.search(r"update compiled in ([\d.]+) s", output.read_text())
        self.compiled[kind].append(float(found.group(1)) if found else -1.0)
        return seconds

    def after(self, medians: Mapping[str, float]) -> Values:
        """Seconds of it that the compiler took."""
        del medians
        return {"compile_s": self.compiled}

    def close(self) -> None:
        """Removes the runs."""
        self.folder.cleanup()


def _updated(metrics: Path) -> bool:
    """Returns True if a run has logged the loss of an update."""
    # The last line may still be half of one.
    return metrics.exists() and any("loss" in r for r in jsonl.read_until_damaged(metrics))

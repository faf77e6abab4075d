"""One config under measurement, in this process or in one of its own, and two in turns.

On CPU two programs in one process disturb each other: the threads of the one that rests keep
spinning. So there each config gets a process, which waits on its input while the other works. An
accelerator belongs to one process, and both configs share it, one resting while the other works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import jax

from jointseg_jax.perf import (
    bench_codec,
    bench_input,
    bench_masks,
    bench_model,
    bench_startup,
    harness,
)
from jointseg_jax.perf.harness import BenchConfig, Timing, Values
from jointseg_jax.types import UserError

JOBS = {
    "train": bench_model.prepare_training,
    "sample": bench_model.prepare_sampling,
    "data": bench_input.prepare,
    "masks": bench_masks.prepare,
    "codec": bench_codec.prepare,
    "startup": bench_startup.prepare,
}
"""What can be measured: name -> ``(BenchConfig) -> Benchmark``."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Timings and derived figures of one measured config."""

    name: str
    machine: Values
    facts: Values
    timings: dict[str, Timing]
    after: Values

    def values(self) -> Values:
        """Everything as plain values, for the last line."""
        times = {name: timing.values() for name, timing in self.timings.items()}
        return {"config": self.name, **self.facts, "times": times, **self.after}


class InProcess:
    """A config measured in this process."""

    def __init__(self, bench: BenchConfig):
        self.bench = bench
        self.benchmark = JOBS[bench.what](bench)
        self.timings = {k: Timing(images=a.images) for k, a in self.benchmark.actions.items()}

    def warm_up(self) -> None:
        """Makes the first calls of every action."""
        for name, action in self.benchmark.actions.items():
            self.timings[name].warm_up(action, self.bench.warmups, self.bench.calls)

    def repeat(self) -> None:
        """Makes one repetition of every action."""
        for name, action in self.benchmark.actions.items():
            self.timings[name].repeat(action)

    def result(self) -> Result:
        """The figures so far; may run the actions once more, for a trace."""
        after = self.benchmark.after({name: timing.median for name, timing in self.timings.items()})
        return Result(self.bench.name, harness.machine(), self.benchmark.facts, self.timings, after)

    def close(self) -> None:
        """Frees what it holds."""
        self.benchmark.close()


class Subprocess:
    """A config measured in a process of its own, which gets JSON lines that say what to do next."""

    def __init__(self, bench: BenchConfig):
        environment = dict(os.environ)
        # Set by flag in this process, which the other does not see.
        if folder := jax.config.jax_compilation_cache_dir:
            environment["JAX_COMPILATION_CACHE_DIR"] = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jointseg_jax.perf.bench"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = bench.name
        self._ask(bench.values())

    def _ask(self, what: object) -> Values:
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        # An empty answer: it has ended, and its own words are on stderr.
        if not line:
            status = self.process.wait()
            raise RuntimeError(f"the process of {self.name} ended with status {status}; see above")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"{self.name}: {answer['error']}")
        return answer

    def warm_up(self) -> None:
        """Makes the first calls of every action."""
        self._ask("warm_up")

    def repeat(self) -> None:
        """Makes one repetition of every action."""
        self._ask("repeat")

    def result(self) -> Result:
        """The figures so far."""
        values = self._ask("result")
        timings = {name: Timing(**timing) for name, timing in values.pop("timings").items()}
        return Result(timings=timings, **values)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def interleave(
    benches: Sequence[BenchConfig], repetitions: int, log: Callable[[str], None]
) -> list[Result]:
    """Measures one config, or two in turns; the results in the order of the configs.

    All are prepared and warmed up first; then each repetition is one turn of all of them.

    Args:
      log: called with a line at each stage.
    """
    # Threads of a resting program spin on CPU; an accelerator belongs to one process.
    apart = len(benches) > 1 and jax.default_backend() == "cpu"
    processes: list[InProcess | Subprocess] = []
    with contextlib.ExitStack() as stack:
        for bench in benches:
            log(f"preparing {bench.what} of {bench.name}")
            processes.append((Subprocess if apart else InProcess)(bench))
            # At once, so that the first is closed if preparing the second fails.
            stack.callback(processes[-1].close)
            processes[-1].warm_up()
        for turn in range(repetitions):
            log(f"repetition {turn + 1} of {repetitions}")
            for process in processes:
                process.repeat()
        log("speed, memory, trace")
        return [process.result() for process in processes]


def ratios(one: Result, other: Result) -> dict[str, dict[str, float]]:
    """For each action that both have: how many times as long the second takes.

    Where actions are about images, times are of one image, so that batches may differ.
    """
    return {
        name: harness.ratio(timing.per_image, other.timings[name].per_image)
        for name, timing in one.timings.items()
        if name in other.timings
    }


# --------------------------------------------------- the process at the other end of Subprocess


def set_cache(on: bool) -> None:
    """Allows compiled programs from the compile cache, or not; before anything compiles."""
    jax.config.update("jax_enable_compilation_cache", on)


def main() -> None:
    """Reads one ``BenchConfig``, then the name of a method a line until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    with contextlib.ExitStack() as stack:
        try:
            bench = BenchConfig.of(json.loads(sys.stdin.readline()))
            set_cache(bench.cache)
            process = InProcess(bench)
            stack.callback(process.close)
            print("{}", file=answers, flush=True)
            for line in sys.stdin:
                found = getattr(process, json.loads(line))()
                values = {} if found is None else dataclasses.asdict(found)
                print(json.dumps(values), file=answers, flush=True)
        except UserError as error:
            print(json.dumps({"error": str(error)}), file=answers, flush=True)


if __name__ == "__main__":
    main()

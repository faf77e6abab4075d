"""One config under measurement, in this process or in one of its own, and two in turns.

On CPU two programs in one process disturb each other: the threads of the one that rests keep
spinning. So there each config gets a process, which waits on its input while the other works. An
accelerator belongs to one process, and both configs share it, one resting while the other works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

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
    "train": bench_model.Update,
    "sample": bench_model.Sampling,
    "data": bench_input.Input,
    "masks": bench_masks.Cleanup,
    "codec": bench_codec.Codecs,
    "startup": bench_startup.Startup,
}
"""What can be measured: name -> the ``Benchmark`` of it, made of a ``BenchConfig``."""


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
    """A config measured in a process of its own, which is sent the names of methods to call."""

    def __init__(self, bench: BenchConfig):
        # Not forked: it would get locks without the threads that hold them.
        context = multiprocessing.get_context("spawn")
        self.name, (self.pipe, other) = bench.name, context.Pipe()
        # The cache is set by flag in this process, which the other does not see.
        arguments = (other, bench, jax.config.jax_compilation_cache_dir)
        self.process = context.Process(target=serve, args=arguments)
        self.process.start()
        # Else the end of the process would not be the end of the pipe.
        other.close()
        self._answer()

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            status = self.process.exitcode
            text = f"the process of {self.name} ended with status {status}; see above"
            raise RuntimeError(text) from None
        if isinstance(answer, UserError):
            raise UserError(f"{self.name}: {answer}")
        return answer

    def _ask(self, method: str) -> Any:
        # Of a process that has ended the answer says so.
        with contextlib.suppress(ConnectionError):
            self.pipe.send(method)
        return self._answer()

    def warm_up(self) -> None:
        """Makes the first calls of every action."""
        self._ask("warm_up")

    def repeat(self) -> None:
        """Makes one repetition of every action."""
        self._ask("repeat")

    def result(self) -> Result:
        """The figures so far."""
        return self._ask("result")

    def close(self) -> None:
        """Ends the process."""
        self.pipe.close()
        self.process.join(timeout=60)
        self.process.kill()
        self.process.join()


def serve(pipe: Connection, bench: BenchConfig, cache: str | None) -> None:
    """Does what a ``Subprocess`` asks for until it closes the pipe."""
    os.dup2(2, 1)  # what libraries print must not get into the page
    jax.config.update("jax_compilation_cache_dir", cache)
    set_cache(bench.cache)
    try:
        ended = contextlib.suppress(EOFError, ConnectionError)
        with contextlib.closing(InProcess(bench)) as process, ended:
            pipe.send(None)
            while True:
                pipe.send(getattr(process, pipe.recv())())
    except UserError as error:
        pipe.send(error)


def set_cache(on: bool) -> None:
    """Allows compiled programs from the compile cache, or not; before anything compiles."""
    jax.config.update("jax_enable_compilation_cache", on)


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

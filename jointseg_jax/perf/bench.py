"""One config under measurement, in this process or in one of its own.

On CPU two programs in one process disturb each other: the threads of the one that rests keep
spinning. So there each contender is a process, which waits on its input while the other works. An
accelerator belongs to one process, and both contenders share it, one resting while the other works.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax

from jointseg_jax.perf import machine
from jointseg_jax.perf.harness import Request
from jointseg_jax.perf.table import JOBS
from jointseg_jax.perf.timing import Timing
from jointseg_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out; plain values but for the timings."""

    name: str
    machine: dict[str, Any]
    facts: dict[str, Any]
    timings: dict[str, Timing]
    after: dict[str, Any]

    def values(self) -> dict[str, Any]:
        """Everything as plain values, for the last line."""
        times = {name: timing.values() for name, timing in self.timings.items()}
        return {"config": self.name, **self.facts, "times": times, **self.after}


class Here:
    """A contender in this process."""

    def __init__(self, request: Request):
        self.request = request
        self.job = JOBS[request.what](request)
        self.timings = {k: Timing(images=a.images) for k, a in self.job.actions.items()}

    def warm_up(self) -> None:
        """First calls."""
        for name, action in self.job.actions.items():
            self.timings[name].warm_up(action, self.request.warmups, self.request.calls)

    def repeat(self) -> None:
        """One repetition of every action."""
        for name, action in self.job.actions.items():
            self.timings[name].repeat(action)

    def result(self) -> Result:
        """What came out."""
        after = self.job.after({name: timing.median for name, timing in self.timings.items()})
        facts = self.job.facts
        return Result(self.request.name, machine.machine(), facts, self.timings, after)

    def close(self) -> None:
        """Frees what it holds."""
        self.job.close()


class Child:
    """A contender in a process of its own, which is told in JSON lines what to do next."""

    def __init__(self, request: Request):
        command = [sys.executable, "-m", "jointseg_jax.perf.bench"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = dict(os.environ)
        if folder := jax.config.jax_compilation_cache_dir:
            environment["JAX_COMPILATION_CACHE_DIR"] = folder
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.name = request.name
        self._ask(request.values())

    def _ask(self, what: Any) -> Any:
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            raise RuntimeError(f"the process of {self.name} ended with status {status}; see above")
        answer = json.loads(line)
        if "mistake" in answer:
            raise UserError(f"{self.name}: {answer['mistake']}")
        return answer

    def warm_up(self) -> None:
        """First calls."""
        self._ask("warm_up")

    def repeat(self) -> None:
        """One repetition of every action."""
        self._ask("repeat")

    def result(self) -> Result:
        """What came out."""
        found = self._ask("result")
        timings = {name: Timing(**values) for name, values in found.pop("timings").items()}
        return Result(timings=timings, **found)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def set_cache(on: bool) -> None:
    """Says whether compiled programs may come from the compile cache; before anything compiles."""
    jax.config.update("jax_enable_compilation_cache", on)


def serve(contender: Here, word: str) -> Mapping[str, Any]:
    """Does what a ``Child`` asks for."""
    if word == "result":
        return dataclasses.asdict(contender.result())
    getattr(contender, word)()
    return {}


def main() -> None:
    """The other end of ``Child``: one request, then one word a line until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers

    def answer(values: Mapping[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    contender = None
    try:
        for line in sys.stdin:
            if contender is None:
                request = Request.of(json.loads(line))
                set_cache(request.cache)
                contender = Here(request)
                answer({})
            else:
                answer(serve(contender, json.loads(line)))
    except UserError as error:
        answer({"mistake": str(error)})
    finally:
        if contender is not None:
            contender.close()


if __name__ == "__main__":
    main()

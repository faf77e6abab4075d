"""What a benchmark is asked and what it consists of: actions that can be done again and again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jointseg_jax import build
from jointseg_jax.types import UserError


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be measured, in plain values, so that another process can be asked.

    Attributes:
      what: a name of ``table.JOBS``.
      name: how the config is called on the page.
      config: plain nested mapping; empty where the job needs none.
      codec: config of the run that would train a codec that is not on this machine.
      classes: number of classes, for data that are not on this machine.
      batch: rows over all chips; 0: the config's (train), 16 a chip (sample), 8 (codec).
      real: train on the config's data, through its pipeline, in place of random batches.
      steps: of the solver; 0: the config's.
      given: the batch field that sampling starts from, or empty.
      workdir: a trained run whose parameters and codecs take the place of random ones.
      size: side of the label maps (masks).
      area: regions of fewer pixels are absorbed (masks).
      step_ms: length of the synthetic step (data).
      warmups: calls before the repetitions, after the first.
      calls: in one repetition; 0: as many as take about ``LENGTH`` seconds.
      cache: whether compiled programs may come from the compile cache.
      launcher: path of ``launch/train.py`` (startup).
    """

    what: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    codec: Mapping[str, Any] = field(default_factory=dict)
    classes: int = 0
    batch: int = 0
    real: bool = False
    steps: int = 0
    given: str = ""
    workdir: str = ""
    size: int = 512
    area: int = 50
    step_ms: float = 100.0
    warmups: int = 2
    calls: int = 0
    cache: bool = False
    launcher: str = ""

    def values(self) -> dict[str, Any]:
        """What ``of`` makes an equal request from."""
        return build.plain(dataclasses.asdict(self))

    @staticmethod
    def of(values: Mapping[str, Any]) -> Request:
        """The request with these values."""
        return Request(**build.from_plain(values))

    def batch_of(self, default: int, shards: int) -> int:
        """The rows of a batch.

        Raises:
          UserError: so many cannot be shared evenly.
        """
        rows = self.batch or default
        if rows % shards:
            raise UserError(
                f"ERROR [flags] --batch={rows}: must be a multiple of the {shards} devices."
            )
        return rows


class Action(NamedTuple):
    """Something to time.

    Attributes:
      run: does it so many times and returns the seconds that it took, by a clock of its choice.
      images: images (or maps, or pairs) that one call is about; 0: it is not about images.
      warm: whether the first calls are slower and do not count.
      calls: in one repetition, where nobody says; 0: as many as make it long enough.
    """

    run: Callable[[int], float]
    images: int = 0
    warm: bool = True
    calls: int = 0


class Job(NamedTuple):
    """A prepared measurement.

    Attributes:
      actions: by name, in the order in which they are timed.
      facts: what was prepared, plain values.
      after: from the median seconds of the actions to what only then can be said; it may run the
        actions again, for a trace.
      close: frees what the job holds outside this process.
    """

    actions: Mapping[str, Action]
    facts: dict[str, Any]
    after: Callable[[Mapping[str, float]], dict[str, Any]] = lambda medians: {}
    close: Callable[[], None] = lambda: None


def wall(call: Callable[[], Any]) -> Callable[[int], float]:
    """An action's ``run`` by the wall clock."""
    return _timed(call, time.perf_counter)


def on_processor(call: Callable[[], Any]) -> Callable[[int], float]:
    """An action's ``run`` by the time of all processors that worked for this process."""
    return _timed(call, time.process_time)


def _timed(call: Callable[[], Any], clock: Callable[[], float]) -> Callable[[int], float]:
    def run(count: int) -> float:
        start = clock()
        for _ in range(count):
            call()
        return clock() - start

    return run

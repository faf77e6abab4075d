"""What a benchmark is asked, what it consists of, how it is timed, and on which machine.

1. The first call and ``warmups`` further ones are shown and do not count.
2. A repetition is ``calls`` calls in a row; its figure is the mean of one call.
3. The median of the repetitions is the figure, their lowest and highest its spread.
4. Two configs are timed in turns, A B A B ...; their ratio is the quotient of the medians, its
   spread the lowest and highest quotient of one turn.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import math
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jointseg_jax import jsonl
from jointseg_jax.chips import peak_flops
from jointseg_jax.types import UserError

Config = Mapping[str, Any]
"""A run's config (or a part of it) as plain nested mappings."""

Values = dict[str, Any]
"""Plain values, ready for JSON."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is to be measured, in plain values, so that another process can be asked.

    Fields with the name of a flag of ``launch/benchmark.py`` are set by it.
    """

    what: str  # a name of ``bench.JOBS``
    name: str  # how the config is called on the page
    config: Config = field(default_factory=dict)  # empty where the benchmark needs none
    codec: Config = field(default_factory=dict)  # of the run that would train an absent codec
    classes: int = 0  # number of classes, for data that are not on this machine
    batch: int = 0  # rows over all chips; 0: the config's (train), 16 a chip (sample), 8 (codec)
    data: bool = False  # train: batches of the config's data, through its pipeline
    cached: bool = False  # train: random batches as a cache that is still to be made would hold
    steps: int = 0  # of the solver; 0: the config's
    given: str = ""  # the batch field that sampling starts from, or empty
    workdir: str = ""  # a trained run; its parameters and codecs replace random ones
    size: int = 512  # masks: side of the label maps
    area: int = 50  # masks: regions of fewer pixels are absorbed
    step_ms: float = 100.0  # data: length of the synthetic step
    warmups: int = 2  # calls before the repetitions, after the first
    calls: int = 0  # in one repetition; 0: as many as take about ``LENGTH`` seconds
    trace: bool = True  # train, sample: one more call under the profiler
    cache: bool = False  # compiled programs may come from the compile cache
    launcher: str = ""  # startup: path of ``launch/train.py``

    def batch_of(self, default: int, shards: int) -> int:
        """The rows of a batch.

        Raises:
          UserError: they cannot be shared evenly among the devices.
        """
        rows = self.batch or default
        # Every device gets the same number of rows, as in a run.
        if rows % shards:
            raise UserError(
                f"ERROR [flags] --batch={rows}: must be a multiple of the {shards} devices."
            )
        return rows


class Action(NamedTuple):
    """Something to time."""

    run: Callable[[int], float]  # does it n times; the seconds it took, by a clock of its choice
    images: int = 0  # images (or maps, or pairs) that one call is about; 0: not about images
    warm: bool = True  # the first calls are slower and do not count
    calls: int = 0  # in one repetition by default; 0: as many as make it long enough


class Benchmark:
    """A prepared measurement."""

    actions: Mapping[str, Action]  # in the order in which they are timed
    facts: Values  # what was prepared

    def after(self, medians: Mapping[str, float]) -> Values:
        """What follows from the median seconds of the actions; may run them again."""
        del medians
        return {"memory": memory()}

    def close(self) -> None:
        """Frees what is held outside this process."""


def last_object(text: str) -> dict | None:
    """What a command printed last as one JSON object; libraries may print after it."""
    found = (jsonl.parse(line.encode()) for line in reversed(text.splitlines()))
    return next((record for record in found if record is not None), None)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a module, whose docstring is its help."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


# ------------------------------------------------------------------------------- timing

LENGTH = 1.0
"""Seconds that a repetition takes at least, unless the number of its calls is given."""

MAX_CALLS = 200
"""Most calls in a repetition, unless their number is given."""


def wall(
    call: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> Callable[[int], float]:
    """An action's ``run``: seconds of so many calls, by the wall clock."""

    def run(count: int) -> float:
        start = clock()
        for _ in range(count):
            call()
        return clock() - start

    return run


on_processor = functools.partial(wall, clock=time.process_time)
"""``wall`` by the time of all processors that worked for this process."""


@dataclass(kw_only=True)
class Timing:
    """Everything that was timed of one action, in seconds of one call."""

    images: int
    first: float = math.nan
    warmups: list[float] = field(default_factory=list)
    calls: int = 1
    repetitions: list[float] = field(default_factory=list)

    def warm_up(self, action: Action, warmups: int, calls: int) -> None:
        """Makes the first calls and settles how many there are in a repetition."""
        calls = calls or action.calls
        if not action.warm:
            self.calls = calls or 1
            return
        # The first call compiles what is not compiled yet, and fills caches.
        self.first = action.run(1)
        self.warmups = [action.run(1) for _ in range(warmups)]
        # The shortest call decides: the first one holds compilation and cold caches.
        shortest = max(min([self.first, *self.warmups]), 1e-9)
        self.calls = calls or min(max(math.ceil(LENGTH / shortest), 1), MAX_CALLS)

    def repeat(self, action: Action) -> None:
        """Makes one repetition."""
        self.repetitions.append(action.run(self.calls) / self.calls)

    @property
    def median(self) -> float:
        """The figure."""
        return median(self.repetitions)

    @property
    def rate(self) -> float:
        """Images per second; 0.0 where the action is not about images."""
        return self.images / self.median if self.images and self.median > 0 else 0.0

    @property
    def per_image(self) -> list[float]:
        """Seconds of one image in each repetition, or of one call where there are no images."""
        return [seconds / max(self.images, 1) for seconds in self.repetitions]

    def values(self) -> Values:
        """Plain values: times in ms, and images/s where the action is about images."""
        figures = (self.median, min(self.repetitions), max(self.repetitions))
        names = ("median_ms", "min_ms", "max_ms")
        out: Values = {k: rounded(1e3 * v) for k, v in zip(names, figures)}
        if math.isfinite(self.first):
            out["first_ms"] = rounded(1e3 * self.first)
            out["warmup_ms"] = [rounded(1e3 * v) for v in self.warmups]
        out |= {"repetitions": len(self.repetitions), "calls": self.calls}
        if self.rate:
            out |= {"images": self.images, "images_per_second": rounded(self.rate)}
        return out


def timed(action: Action, *, warmups: int, calls: int = 0, repetitions: int = 3) -> Timing:
    """Warms one action up and repeats it."""
    timing = Timing(images=action.images)
    timing.warm_up(action, warmups, calls)
    for _ in range(repetitions):
        timing.repeat(action)
    return timing


def ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times as long the second takes: above 1, the first is the faster one."""
    # Pairs of one turn ran at the same time, so their quotients share what else the machine did.
    turns = [b / a for a, b in zip(one, other)]
    values = (median(other) / median(one), min(turns), max(turns))
    return dict(zip(("median", "min", "max"), map(rounded, values)))


def rounded(value: float, digits: int = 5) -> float:
    """Five significant digits: more than any of this is worth."""
    return float(f"{value:.{digits}g}")


# ------------------------------------------------------------------------------ machine

PACKAGES = ("jointseg_jax", "jax", "jaxlib", "libtpu", "flax", "numpy", "scipy", "numba", "grain")


def machine() -> Values:
    """The machine that figures are taken on: chips, host, versions, load, as of now."""
    device, versions = jax.devices()[0], {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "chips": num_chips(),
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_chips() -> int:
    """Devices that compute at the same time."""
    # XLA's several CPU devices share the cores of one processor.
    return 1 if jax.devices()[0].platform == "cpu" else jax.device_count()


def memory() -> dict[str, float]:
    """GiB: the most that a chip held so far, and the most that this process did on the host."""
    unit = 2**10 if platform.system() == "Darwin" else 1  # bytes there, KiB elsewhere
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit / 2**20
    # CPU devices have no statistics.
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    chip = max((peak for peak in peaks if peak is not None), default=None)
    out = {"host_peak_gib": round(host, 3)}
    return out if chip is None else out | {"chip_peak_gib": round(chip / 2**30, 3)}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


# --------------------------------------------------------- what the machine can do at most

SIZES = {"cpu": (512, 1024, 2048)}
OTHER_SIZES = (4096, 8192)
"""Sides of the matrices, by platform."""

TRIES = 5
"""How often each size is timed; the fastest counts."""


class Ceiling(NamedTuple):
    """FLOP/s of one chip, and the matrix product that reached it."""

    flops: float
    size: int
    dtype: str


def ceiling(dtype: str, sizes: tuple[int, ...] = (), seconds: float = 0.1) -> Ceiling:
    """Times products of random matrices; the best of all sizes is what MFU is measured by.

    A maker's peak is reached by nothing, and XLA:CPU has none; a product of two large square
    matrices in the network's own dtype is the most that any network can hope for.

    Args:
      seconds: length of a run of products, of which ``TRIES`` are made.
    """
    sizes = sizes or SIZES.get(jax.devices()[0].platform, OTHER_SIZES)
    rates = {size: 2.0 * size**3 / _product_seconds(size, dtype, seconds) for size in sizes}
    best = max(rates, key=rates.__getitem__)
    return Ceiling(rates[best], best, jnp.dtype(dtype).name)


def _product_seconds(size: int, dtype: str, length: float) -> float:
    device = jax.local_devices()[0]
    # Random, never constant: chips draw less power, and so run faster, on zeros.
    draw = jax.jit(lambda key: jax.random.normal(key, (size, size), dtype))
    keys = jax.random.split(jax.random.key(size))
    left, right = (jax.device_put(draw(key), device) for key in keys)
    product = jax.jit(jnp.matmul)
    # Compiles, so that it is not timed.
    product(left, right).block_until_ready()

    def run(count: int) -> float:
        start = time.perf_counter()
        # Dispatched one after the other: the device waits for none of them.
        for _ in range(count):
            made = product(left, right)
        made.block_until_ready()
        return time.perf_counter() - start

    count = min(max(int(length / run(1)), 1), 32)  # no more than fit into memory side by side
    return min(run(count) / count for _ in range(TRIES))


def speed(flops: float | None, seconds: float, dtype: str) -> Values:
    """FLOP/s of one chip, and their part of the measured ceiling and of the maker's peak.

    Args:
      flops: that the network needs for one call on one chip; None: not known.
      dtype: of the network's products.
    """
    measured, peak = ceiling(dtype), peak_flops(jax.devices()[0].device_kind)
    out: Values = {
        "ceiling_tflops": measured.flops / 1e12,
        "ceiling_of": f"{measured.size} x {measured.size} {measured.dtype} product",
        "dtype": dtype,
    }
    if flops:
        rate = flops / seconds
        out |= {"tflop": flops / 1e12, "tflops": rate / 1e12, "mfu": rate / measured.flops}
        if peak:
            out |= {"datasheet_tflops": peak / 1e12, "mfu_datasheet": rate / peak}
    return {k: rounded(v) if isinstance(v, float) else v for k, v in out.items()}

"""The input pipeline of a config: its own source, transforms and tokenizer, without a network.

1. ``pair``: one record read, checked, transformed and tokenized, by processor time: its inverse is
   the pairs per second of one core.
2. ``batch``: one batch as the pipeline delivers it, with the config's threads and workers, after
   what it had ready is used up.
3. ``wait``: of a step that keeps the chip, not the host, busy for ``step_ms``, the time spent
   waiting for its batch and bringing it to the devices.

An encoded data set (``data.cache``) is read by whole batches and has no ``pair``; its ``batch`` is
the rate of cached samples.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping

from jointseg_jax import build, sharding
from jointseg_jax.data.cached.loader import CachedSource
from jointseg_jax.data.pipeline import make_rows
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.perf import abstract, harness
from jointseg_jax.perf.harness import Action, BenchConfig, Benchmark, Values, rounded

STRIDE = 7919
"""From one record to the next: far apart, so that no file is in any cache by its neighbour."""

STEPS = 10
"""Steps in one repetition of ``wait``."""


class Input(Benchmark):
    """The benchmark of ``--what data``: the config's source, and its batches."""

    def __init__(self, bench: BenchConfig):
        config = abstract.run_config(bench)
        self.batch = config.batch
        self.source = build.source(config, "train")
        self.encoded = isinstance(self.source, CachedSource)
        info = DatasetInfo.of(self.source, captions=0)
        self.config, self.step = config, bench.step_ms / 1e3
        self.mesh = sharding.make_mesh((-1, 1, 1))
        tokenizer = build.tokenizer(config.system, info.vocabulary)
        self.rows = make_rows(
            self.source,
            build.transforms(config.data),
            tokenizer=tokenizer.encode if tokenizer else None,
            seed=config.seed,
            batch=self.batch,
            train=True,
            bad=config.data.bad,
            mark=False,
            instances=build.instances(config),
        )
        self.at = itertools.count()
        self.batches = abstract.real_batches(config, info)
        # Batches that may be ready: of the pipeline, and two windows of each worker.
        self.ahead = config.data.prefetch * (1 + 2 * config.data.workers)
        single = {} if self.encoded else {"pair": Action(harness.on_processor(self.pair), 1)}
        self.actions = single | {
            "batch": Action(self.deliver, self.batch, warm=False, calls=self.calls()),
            "wait": Action(self.wait, calls=STEPS),
        }

    def pair(self) -> None:
        """Makes one pair, of a record that none was made of."""
        position = next(self.at)
        self.rows(position, position * STRIDE % len(self.source))

    def deliver(self, count: int) -> float:
        """Seconds for ``count`` batches, beyond those that were ready."""
        # What was ready says nothing of the rate.
        for _ in range(self.ahead + 1):
            next(self.batches)
        start = time.perf_counter()
        for _ in range(count):
            next(self.batches)
        return time.perf_counter() - start

    def calls(self) -> int:
        """Batches in a repetition: one more than can be ready, or a second's worth.

        One batch alone says nothing, for the next ones are half made when it comes.
        """
        self.deliver(1)  # threads and compiled code start
        least = self.ahead + 1
        count = math.ceil(harness.LENGTH * least / self.deliver(least))
        return min(max(count, least), harness.MAX_CALLS)

    def wait(self, count: int) -> float:
        """Seconds that a device waits in ``count`` steps, after what was ready is used up.

        The device is a clock; as in training, the host runs one step ahead of it and no further.
        """
        waited, free = 0.0, 0.0
        for n in range(self.ahead + count):
            sharding.global_batch(next(self.batches), self.mesh)
            come = time.perf_counter()
            # (3) The device waits from the end of a step until the next batch has come.
            waited += max(come - free, 0.0) if n >= self.ahead else 0.0
            begun = max(come, free)
            time.sleep(max(begun - come, 0.0))  # until the step before this one is done
            free = begun + self.step
        return waited

    @property
    def facts(self) -> Values:
        """What was prepared."""
        pair = "" if self.encoded else "pair: processor seconds of one, in one thread; "
        return {
            "timed": pair + "batch: seconds between batches once none is ready; wait: seconds "
            "a device with synthetic steps has none",
            "source": self.source.name,
            "records": len(self.source),
            "batch": self.batch,
            "transforms": [] if self.encoded else list(self.config.data.transforms),
            **{k: getattr(self.config.data, k) for k in ("threads", "workers", "prefetch")},
            "step_ms": 1e3 * self.step,
        }

    def after(self, medians: Mapping[str, float]) -> Values:
        """Rates, and the part of a step that is waiting."""
        wait, found = medians["wait"], {}
        if "pair" in medians:
            found["pairs_per_second_per_core"] = rounded(1 / medians["pair"])
        rate = "cached_samples_per_second" if self.encoded else "pairs_per_second"
        found[rate] = rounded(self.batch / medians["batch"])
        wait = rounded(wait / (wait + self.step), 4)
        return found | {"data_wait": wait, "memory": harness.memory()}

    def close(self) -> None:
        """Ends the pipeline."""
        self.batches.close()

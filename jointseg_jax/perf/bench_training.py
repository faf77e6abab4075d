"""The update of a training run: ``training.step``'s, with the config's mesh, rules and batch.

1. FLOPs of one update = 3 x forward of the network on its unpadded tokens x rows; recomputation,
   codecs and optimizer get no credit. A codec's training counts what the compiler counts.
2. MFU = FLOPs / time / chips / (FLOP/s of the fastest matrix product measured here).
3. Batches are random and on the chip already; with ``real`` they come from the config's data, as in
   a run, and the time spent waiting for them is reported.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Mapping

import jax

from jointseg_jax import profiling, sharding
from jointseg_jax.perf import harness, under_test
from jointseg_jax.perf.harness import Action, BenchConfig, Benchmark, Values
from jointseg_jax.training.clock import InFlight
from jointseg_jax.training.step import check_batch, make_train_step

NUM_BATCHES = 2
"""Random batches that take turns."""


class _Update:
    """The compiled update and the state that it works on."""

    def __init__(self, bench: BenchConfig):
        config = bench.run_config()
        self.mesh, self.batch = sharding.make_mesh(config.mesh), config.batch
        check_batch(config, self.mesh)
        self.bench = bench
        self.model = under_test.model_under_test(bench)
        self.program = make_train_step(self.model.system, config, self.mesh)
        self.real = under_test.real_batches(config, self.model.info) if bench.real else None
        self.waits: list[float] = []  # part of each run that was waiting for batches
        with jax.set_mesh(self.mesh):
            self._prepare(config.seed)

    def _prepare(self, seed: int) -> None:
        everywhere = sharding.replicated(self.mesh)
        self.frozen = jax.device_put(self.model.frozen, everywhere)
        # Initialised where it belongs: the state of a large network fits on no single chip.
        init = jax.jit(self.program.init, out_shardings=self.program.shardings)
        self.state = jax.block_until_ready(init(jax.random.key(seed), {}))
        self.batches = self._batches()
        start = time.perf_counter()
        lowered = self.program.update.lower(self.state, self.frozen, next(self.batches))
        self.update = under_test.Program(lowered, time.perf_counter() - start)

    def _batches(self) -> Iterator[dict[str, jax.Array]]:
        if self.real is not None:
            return (sharding.global_batch(rows, self.mesh) for rows in self.real)
        # Few and on the chip already, so that nothing but the update is timed.
        options = {"cached": True, "to_cache": self.bench.cached}
        rows = (
            under_test.random_rows(self.model, self.batch, n, **options) for n in range(NUM_BATCHES)
        )
        return itertools.cycle([under_test.on_mesh(r, self.mesh) for r in rows])

    def run(self, count: int) -> float:
        """``count`` updates in a row; the seconds until the last one is done."""
        waited, flight, start = 0.0, InFlight(), time.perf_counter()
        with jax.set_mesh(self.mesh):
            for _ in range(count):
                asked = time.perf_counter()
                batch = next(self.batches)
                # While the step before this one still runs, reading costs no time.
                waited += 0.0 if flight.busy() else time.perf_counter() - asked
                self.state, self.metrics = self.update.run(self.state, self.frozen, batch)
                flight.add(self.metrics)  # one update in flight, as in a run
            jax.block_until_ready((self.state, self.metrics))
        seconds = time.perf_counter() - start
        self.waits.append(waited / seconds)
        return seconds

    def facts(self) -> Values:
        """What was prepared."""
        known = profiling.forward_flops(self.model.system) is not None
        return {
            **self.model.facts(),
            "parameters": sum(x.size for x in jax.tree.leaves(self.state.params)),
            "batch": self.batch,
            "accumulate": self.model.config.accumulate,
            "mesh": list(self.mesh.devices.shape),
            "sharding": str(self.model.config.sharding),
            "input": "the config's data" if self.real is not None else "random, on the chip",
            "flops_by": "3 x forward" if known else "the compiler",
            **self.update.facts(),
        }

    def after(self, medians: Mapping[str, float]) -> Values:
        """Memory, speed, wait and trace."""
        loss = float(self.metrics["loss"])
        out: Values = {"loss": loss, "finite": math.isfinite(loss), "memory": harness.memory()}
        if self.real is not None:
            # The first call and the warm-ups found their batches ready, or none at all.
            out["data_wait"] = round(statistics.median(self.waits[1 + self.bench.warmups :]), 4)
        flops = profiling.step_flops(self.model.system, self.update.run, self.batch)
        run = (lambda: self.run(1)) if self.bench.trace else None
        return out | self.update.after(flops, medians["update"], self.model.dtype, run)

    def close(self) -> None:
        """Ends the input pipeline."""
        if self.real is not None:
            self.real.close()


def prepare(bench: BenchConfig) -> Benchmark:
    """The benchmark of ``--what train``."""
    update = _Update(bench)
    action = Action(update.run, update.batch)
    return Benchmark({"update": action}, update.facts(), update.after, update.close)

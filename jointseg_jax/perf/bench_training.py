"""The update of a training run: ``training.program``'s, with the config's mesh, rules and batch.

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
from typing import Any

import jax

from jointseg_jax import profiling, sharding
from jointseg_jax.perf import machine, subject, trace
from jointseg_jax.perf.ceiling import ceiling
from jointseg_jax.perf.harness import Action, Job, Request
from jointseg_jax.training.flight import InFlight
from jointseg_jax.training.program import check_batch, make_program

BATCHES = 2
"""Random batches that take turns."""


class _Update:
    """The compiled update and the state that it works on."""

    def __init__(self, request: Request):
        config = dict(request.config)
        self.mesh = sharding.make_mesh(config["mesh"])
        config["batch"] = self.batch = request.batch or config["batch"]
        check_batch(config, self.mesh)
        self.subject = subject.subject(request)._replace(config=config)
        self.program = make_program(self.subject.system, config, self.mesh)
        self.real = subject.real_batches(self.subject) if request.real else None
        self.waits, self.warmups = [], request.warmups
        with jax.set_mesh(self.mesh):
            self._prepare(config["seed"])

    def _prepare(self, seed: int) -> None:
        everywhere = sharding.replicated(self.mesh)
        self.frozen = jax.device_put(self.subject.frozen, everywhere)
        init = jax.jit(self.program.init, out_shardings=self.program.shardings)
        self.state = jax.block_until_ready(init(jax.random.key(seed), {}))
        self.batches = self._batches()
        start = time.perf_counter()
        lowered = self.program.update.lower(self.state, self.frozen, next(self.batches))
        self.lower_s = time.perf_counter() - start
        self.compiled = lowered.compile()
        self.compile_s = time.perf_counter() - start - self.lower_s

    def _batches(self) -> Iterator[Any]:
        if self.real is not None:
            return (sharding.global_batch(rows, self.mesh) for rows in self.real)
        rows = (
            subject.random_rows(self.subject, self.batch, n, cached=True) for n in range(BATCHES)
        )
        return itertools.cycle([subject.on_mesh(r, self.mesh) for r in rows])

    def run(self, count: int) -> float:
        """So many updates in a row; the seconds until the last one is done."""
        waited, flight, start = 0.0, InFlight(), time.perf_counter()
        with jax.set_mesh(self.mesh):
            for _ in range(count):
                asked = time.perf_counter()
                batch = next(self.batches)
                waited += 0.0 if flight.busy() else time.perf_counter() - asked
                self.state, self.metrics = self.compiled(self.state, self.frozen, batch)
                flight.add(self.metrics)
            jax.block_until_ready((self.state, self.metrics))
        seconds = time.perf_counter() - start
        self.waits.append(waited / seconds)
        return seconds

    def flops(self) -> float | None:
        """FLOPs of one update."""
        return profiling.step_flops(self.subject.system, self.compiled, self.batch)

    def facts(self) -> dict[str, Any]:
        """What was prepared."""
        known = profiling.forward_flops(self.subject.system) is not None
        plan = self.compiled.memory_analysis()
        total = plan.argument_size_in_bytes + plan.temp_size_in_bytes if plan else 0
        return {
            **subject.facts(self.subject),
            "parameters": sum(x.size for x in jax.tree.leaves(self.state.params)),
            "batch": self.batch,
            "accumulate": self.subject.config.get("accumulate", 1),
            "mesh": list(self.mesh.devices.shape),
            "sharding": str(self.subject.config["sharding"]),
            "input": "the config's data" if self.real is not None else "random, on the chip",
            "flops_by": "3 x forward" if known else "the compiler",
            "lower_s": round(self.lower_s, 2),
            "compile_s": round(self.compile_s, 2),
            "planned_gib": round(total / 2**30, 3),
        }

    def after(self, medians: Mapping[str, float]) -> dict[str, Any]:
        """Memory, speed, wait and trace."""
        loss = float(self.metrics["loss"])
        out: dict[str, Any] = {"loss": loss, "finite": math.isfinite(loss)}
        out["memory"] = machine.memory()
        if self.real is not None:
            out["data_wait"] = round(statistics.median(self.waits[1 + self.warmups :]), 4)
        dtype, flops = subject.number_type(self.subject.system), self.flops()
        share = flops / machine.chips() if flops else None
        measured, peak = ceiling(dtype), machine.datasheet_flops()
        out["speed"] = subject.speed(share, medians["update"], dtype, measured, peak)
        text = self.compiled.as_text()
        out["trace"] = trace.traced(lambda: self.run(1), text)
        return out

    def close(self) -> None:
        """Ends the input pipeline."""
        if self.real is not None:
            self.real.close()


def prepare(request: Request) -> Job:
    """The job of ``--what train``."""
    update = _Update(request)
    action = Action(update.run, update.batch)
    return Job({"update": action}, update.facts(), update.after, update.close)

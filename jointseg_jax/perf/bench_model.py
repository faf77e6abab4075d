"""A config's own programs with random or trained weights: the update, and the sampler.

The update is ``training.step``'s, with the config's mesh, rules and batch:

1. FLOPs of one update = 3 x forward (3.5 with self-conditioning) of the network on its unpadded
   tokens x rows; recomputation, codecs and optimizer get no credit. A codec's training counts what
   the compiler counts.
2. MFU = FLOPs / time / chips / (FLOP/s of the fastest matrix product measured here).
3. Batches are random and on the chip already; with ``data`` they come from the config's data, as in
   a run, and the time spent waiting for them is reported.

The sampler has solver and decoders in one jit:

4. ``sampler``: one batch of pairs on the devices; time until the last chip is done.
5. ``written``: the same with its copy to the host, clean-up and files, one batch made ahead of the
   one that is written, as in ``generation.sample``.
6. FLOPs = forward x calls of the network x 2 where there is guidance; codecs get no credit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from jointseg_jax import profiling, sharding
from jointseg_jax.generation.pair_writer import PairWriter
from jointseg_jax.generation.sample import cleaned
from jointseg_jax.generation.sampler import (
    ANNOTATIONS,
    PER_DEVICE,
    Sampler,
    jit_sample_batch,
    one_ahead,
    pending_batches,
    sampling_params,
)
from jointseg_jax.perf import abstract, harness, trace
from jointseg_jax.perf.harness import Action, BenchConfig, Benchmark, Values
from jointseg_jax.training.clock import InFlight
from jointseg_jax.training.step import check_batch, make_train_step
from jointseg_jax.types import UserError

NUM_BATCHES = 2
"""Random batches that take turns."""

MIN_INSTANCE = 16  # the default of launch/sample.py


class Program:
    """A compiled program, and what compiling it took."""

    def __init__(self, lower: Callable[[], jax.stages.Lowered]):
        start = time.perf_counter()
        lowered = lower()
        self.lower_s = time.perf_counter() - start
        self.run = lowered.compile()
        self.compile_s = time.perf_counter() - start - self.lower_s

    def facts(self) -> Values:
        """Seconds of lowering and compiling, and GiB of one chip by the compiler's plan."""
        plan = self.run.memory_analysis()
        total = plan.argument_size_in_bytes + plan.temp_size_in_bytes if plan else 0
        return {
            "lower_s": round(self.lower_s, 2),
            "compile_s": round(self.compile_s, 2),
            "planned_gib": round(total / 2**30, 3),
        }

    def after(
        self, flops: float | None, seconds: float, dtype: str, run: Callable[[], object] | None
    ) -> Values:
        """Memory, the speed of a call, and where the time of one more goes.

        Args:
          flops: that the network needs for one call, over all chips; None: unknown.
          seconds: of one call.
          run: makes one call and waits for its end; None: no trace.
        """
        # Memory first: the product that speed is compared with takes some too.
        out: Values = {"memory": harness.memory()}
        share = flops / harness.num_chips() if flops else None
        out["speed"] = harness.speed(share, seconds, dtype)
        if run is None:
            return out
        try:
            return out | {"trace": trace.traced(run, self.run.as_text())}
        except Exception as error:  # a profiler that fails costs no figure but its own
            return out | {"trace_error": f"{type(error).__name__}: {error}"[:500]}


# ----------------------------------------------------------------------------- update


class Update(Benchmark):
    """The benchmark of ``--what train``: the compiled update, and the state that it works on."""

    def __init__(self, bench: BenchConfig):
        config = abstract.run_config(bench)
        self.mesh, self.batch = sharding.make_mesh(config.mesh), config.batch
        check_batch(config, self.mesh)
        self.bench = bench
        self.model = abstract.model_under_test(bench)
        train_step = make_train_step(self.model.system, config, self.mesh)
        self.real = abstract.real_batches(config, self.model.info) if bench.data else None
        self.batches = self._batches()
        self.waits: list[float] = []  # part of each run that was waiting for batches
        with jax.set_mesh(self.mesh):
            self.frozen = jax.device_put(self.model.frozen, sharding.replicated(self.mesh))
            # Initialised where it belongs: the state of a large network fits on no single chip.
            init = jax.jit(train_step.init, out_shardings=train_step.shardings)
            self.state = jax.block_until_ready(init(jax.random.key(config.seed), {}))
            inputs = (self.state, self.frozen, next(self.batches))
            self.update = Program(lambda: train_step.update.lower(*inputs))
        self.actions = {"update": Action(self.run, self.batch)}

    def _batches(self) -> Iterator[dict[str, jax.Array]]:
        if self.real is not None:
            return (sharding.global_batch(rows, self.mesh) for rows in self.real)
        # Few and on the chip already, so that nothing but the update is timed.
        model = self.model
        # Latents as a cache that is still to be made would hold them; else the config's own cache.
        frozen = model.frozen if self.bench.cached else None
        shapes = abstract.training_shapes(model.config, model.system, self.batch, frozen)
        hosts = (abstract.random_rows(model.info, shapes, n) for n in range(NUM_BATCHES))
        made = [sharding.global_batch(rows, self.mesh) for rows in hosts]
        return itertools.cycle(jax.block_until_ready(made))

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

    @property
    def facts(self) -> Values:
        """What was prepared."""
        system = self.model.system
        known = profiling.forward_flops(system) is not None
        return {
            **self.model.facts(),
            "parameters": sum(x.size for x in jax.tree.leaves(self.state.params)),
            "batch": self.batch,
            "accumulate": self.model.config.accumulate,
            "mesh": list(self.mesh.devices.shape),
            "sharding": str(self.model.config.sharding),
            "input": "the config's data" if self.real is not None else "random, on the chip",
            "flops_by": f"{profiling.passes(system):g} x forward" if known else "the compiler",
            **self.update.facts(),
        }

    def after(self, medians: Mapping[str, float]) -> Values:
        """Loss, memory, speed, wait and trace."""
        loss = float(self.metrics["loss"])
        out: Values = {"loss": loss, "finite": math.isfinite(loss)}
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


# ---------------------------------------------------------------------------- sampler


class Sampling(Benchmark):
    """The benchmark of ``--what sample``: the sampler, its inputs, and a folder for its pairs."""

    def __init__(self, bench: BenchConfig):
        self.bench = bench
        self.mesh = sharding.own_mesh()
        self.batch = bench.batch_of(PER_DEVICE * self.mesh.size, self.mesh.size)
        model = abstract.model_under_test(bench)
        self.system = abstract.sampling_system(model.system, bench.steps or None, bench.given)
        self.model = model._replace(system=self.system)
        shapes = abstract.batch_shapes(model.config, self.system, self.batch)
        rows = abstract.random_rows(model.info, shapes, 0)
        self.given = {bench.given: rows[bench.given]} if bench.given else {}
        self.text = rows["text"] if self.system.text is not None else None
        self.folder = tempfile.TemporaryDirectory()
        self.writer = PairWriter(Path(self.folder.name), model.info.classes, {})
        with jax.set_mesh(self.mesh):
            sampler = self._sampler()
            self.program = Program(lambda: self._lowered(sampler))
        self.sampler = dataclasses.replace(sampler, sample_batch=self.program.run)
        self.actions = {"sampler": Action(self.run, self.batch)}
        if self.decodes():
            self.actions["written"] = Action(self.write, self.batch)

    def _sampler(self) -> Sampler:
        everywhere, params = sharding.replicated(self.mesh), self.model.params
        if params is None:
            params = jax.jit(self.system.init, out_shardings=everywhere)(jax.random.key(0))
        # As in generation: a bfloat16 network's kernels are rounded once, not in every product.
        params = sampling_params(self.system, params)
        params, frozen = jax.device_put((params, self.model.frozen), everywhere)
        return Sampler(
            sample_batch=jit_sample_batch(self.system, self.mesh),
            mesh=self.mesh,
            params=params,
            frozen=frozen,
            batch_size=self.batch,
        )

    def _lowered(self, sampler: Sampler) -> jax.stages.Lowered:
        inputs = sampler.inputs(0, np.arange(self.batch), self.text, self.given)
        lowered = sampler.sample_batch.lower(sampler.params, sampler.frozen, *inputs)
        # Without an output, XLA drops the whole program.
        if not jax.tree.leaves(lowered.out_info):
            raise UserError(
                "ERROR [flags] --what=sample: all streams of this config are latents that nothing "
                "decodes. A sampler without a result is compiled to nothing, and its time would "
                "be none. Give one of its streams a codec that decodes."
            )
        return lowered

    def run(self, count: int) -> float:
        """``count`` batches in a row; the seconds until the last one is done."""
        start = time.perf_counter()
        for n in range(count):
            pairs = self.sampler(n, np.arange(self.batch), self.text, self.given)
        jax.block_until_ready(pairs)
        return time.perf_counter() - start

    def write(self, count: int) -> float:
        """Seconds for ``count`` batches, all the way to their files."""
        first, classes, start = self.writer.done, self.model.info.classes, time.perf_counter()
        batches = pending_batches(first, first + count * self.batch, self.batch)
        started = ((b, self.sampler(0, b.indices, self.text, self.given)) for b in batches)
        # The next batch is made while this one is written.
        for batch, made in one_ahead(started):
            pairs = {k: np.asarray(v) for k, v in made.items()}
            for row, index in enumerate(batch.indices.tolist()):
                pair = {k: v[row] for k, v in pairs.items()}
                pair = cleaned(pair, classes, absorb=0, min_instance=MIN_INSTANCE)
                shown = pair["image"], pair["labels"]
                self.writer.write(index, "", *shown, {"seed": 0}, pair.get("segments"))
        return time.perf_counter() - start

    def decodes(self) -> bool:
        """Returns True if a pair has pixels; cached latents need a codec that this config lacks."""
        kinds = {stream.codec.kind for stream in self.system.streams.values()}
        return not kinds or ("image" in kinds and bool(ANNOTATIONS & kinds))

    @property
    def facts(self) -> Values:
        """What was prepared."""
        return {
            **self.model.facts(),
            "parameters": sum(x.size for x in jax.tree.leaves(self.sampler.params)),
            "batch": self.batch,
            "steps": self.system.solver.steps,
            "guidance": {k: s.guidance for k, s in self.system.streams.items()},
            "given": sorted(self.given),
            "decoded": self.decodes(),
            **self.program.facts(),
        }

    def after(self, medians: Mapping[str, float]) -> Values:
        """Memory, speed and trace."""
        each = profiling.sampling_flops(self.system, self.given)
        run = (lambda: self.run(1)) if self.bench.trace else None
        flops = each * self.batch if each else None
        return self.program.after(flops, medians["sampler"], self.model.dtype, run)

    def close(self) -> None:
        """Removes the pairs."""
        self.writer.close()
        self.folder.cleanup()

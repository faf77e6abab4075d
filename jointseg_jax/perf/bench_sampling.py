"""The sampler of a trained run, with random or trained weights: solver and decoders in one jit.

1. ``sampler``: one batch of pairs on the devices; time until the last chip is done.
2. ``written``: the same with its copy to the host, clean-up and files, one batch made ahead of the
   one that is written, as in ``generation.sample``.
3. FLOPs = forward x calls of the network x 2 where there is guidance; codecs get no credit.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping
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
from jointseg_jax.perf import abstract, harness, under_test
from jointseg_jax.perf.harness import Action, BenchConfig, Benchmark, Values
from jointseg_jax.systems.system import Generator
from jointseg_jax.types import UserError

MIN_INSTANCE = 16  # the default of launch/sample.py


class _Sampling:
    """The compiled sampler, its inputs, and a folder for its pairs."""

    def __init__(self, bench: BenchConfig):
        self.bench = bench
        self.mesh = sharding.own_mesh()
        self.batch = bench.batch_of(PER_DEVICE * self.mesh.size, self.mesh.size)
        model = under_test.model_under_test(bench)
        if not isinstance(model.system, Generator):
            raise UserError("ERROR [flags] --what=sample: this config trains a codec; it has none.")
        self.system = abstract.with_steps(model.system, bench.steps or None)
        self.model = model._replace(system=self.system)
        rows = under_test.random_rows(self.model, self.batch, 0)
        self.given = {bench.given: rows[bench.given]} if bench.given else {}
        try:
            self.system.check_condition(self.given)
        except ValueError as error:
            raise UserError(f"{error} On the command line: --given=labels or image.") from error
        self.text = rows["text"] if self.system.text is not None else None
        self.folder = tempfile.TemporaryDirectory()
        self.writer = PairWriter(Path(self.folder.name), model.info.classes, {})
        with jax.set_mesh(self.mesh):
            self._prepare()

    def _prepare(self) -> None:
        everywhere = sharding.replicated(self.mesh)
        params = self.model.params
        if params is None:
            params = jax.jit(self.system.init, out_shardings=everywhere)(jax.random.key(0))
        # As in generation: a bfloat16 network's kernels are rounded once, not in every product.
        params = sampling_params(self.system, params)
        params, frozen = jax.device_put((params, self.model.frozen), everywhere)
        start = time.perf_counter()
        jitted = jit_sample_batch(self.system, self.mesh)
        sampler = Sampler(
            sample_batch=jitted,
            mesh=self.mesh,
            params=params,
            frozen=frozen,
            batch_size=self.batch,
        )
        inputs = sampler.inputs(0, np.arange(self.batch), self.text, self.given)
        lowered = jitted.lower(params, frozen, *inputs)
        # Without an output, XLA drops the whole program.
        if not jax.tree.leaves(lowered.out_info):
            raise UserError(
                "ERROR [flags] --what=sample: all streams of this config are latents that nothing "
                "decodes. A sampler without a result is compiled to nothing, and its time would "
                "be none. Give one of its streams a codec that decodes."
            )
        self.program = under_test.Program(lowered, time.perf_counter() - start)
        self.sampler = dataclasses.replace(sampler, sample_batch=self.program.run)

    def run(self, count: int) -> float:
        """``count`` batches in a row; the seconds until the last one is done."""
        start = time.perf_counter()
        for n in range(count):
            pairs = self.sampler(n, np.arange(self.batch), self.text, self.given)
        jax.block_until_ready(pairs)
        return time.perf_counter() - start

    def write(self, count: int) -> float:
        """Seconds for ``count`` batches, all the way to their files."""
        first, start = self.writer.done, time.perf_counter()
        batches = pending_batches(first, first + count * self.batch, self.batch)
        started = ((b, self.sampler(0, b.indices, self.text, self.given)) for b in batches)
        # The next batch is made while this one is written.
        for batch, made in one_ahead(started):
            pairs = {k: np.asarray(v) for k, v in made.items()}
            for row, index in enumerate(batch.indices.tolist()):
                self._write(index, {k: v[row] for k, v in pairs.items()})
        return time.perf_counter() - start

    def _write(self, index: int, made: dict[str, np.ndarray]) -> None:
        pair = cleaned(made, self.model.info.classes, absorb=0, min_instance=MIN_INSTANCE)
        self.writer.write(
            index, "", pair["image"], pair["labels"], {"seed": 0}, pair.get("segments")
        )

    def decodes(self) -> bool:
        """Returns True if a pair has pixels; cached latents need a codec that this config lacks."""
        kinds = {stream.codec.kind for stream in self.system.streams.values()}
        return not kinds or ("image" in kinds and bool(ANNOTATIONS & kinds))

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
        flops = each * self.batch if each else None
        run = (lambda: self.run(1)) if self.bench.trace else None
        speed = self.program.after(flops, medians["sampler"], self.model.dtype, run)
        return {"memory": harness.memory()} | speed

    def close(self) -> None:
        """Removes the pairs."""
        self.writer.close()
        self.folder.cleanup()


def prepare(bench: BenchConfig) -> Benchmark:
    """The benchmark of ``--what sample``."""
    sampling = _Sampling(bench)
    actions = {"sampler": Action(sampling.run, sampling.batch)}
    if sampling.decodes():
        actions["written"] = Action(sampling.write, sampling.batch)
    return Benchmark(actions, sampling.facts(), sampling.after, sampling.close)

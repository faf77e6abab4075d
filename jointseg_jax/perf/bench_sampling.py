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
from typing import Any

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
from jointseg_jax.perf import abstract, machine, subject, trace
from jointseg_jax.perf.ceiling import ceiling
from jointseg_jax.perf.harness import Action, Job, Request
from jointseg_jax.systems.system import Generator
from jointseg_jax.types import UserError

MIN_INSTANCE = 16


class _Sampling:
    """The compiled sampler, its inputs, and a folder for its pairs."""

    def __init__(self, request: Request):
        self.mesh = sharding.own_mesh()
        self.batch = request.batch_of(PER_DEVICE * self.mesh.size, self.mesh.size)
        found = subject.subject(request)
        if not isinstance(found.system, Generator):
            raise UserError("ERROR [flags] --what=sample: this config trains a codec; it has none.")
        self.system = abstract.with_steps(found.system, request.steps or None)
        self.subject = found._replace(system=self.system)
        rows = subject.random_rows(self.subject, self.batch, 0)
        self.known = {request.given: rows[request.given]} if request.given else {}
        try:
            self.system.check_condition(self.known)
        except ValueError as error:
            raise UserError(f"{error} On the command line: --given=labels or image.") from error
        self.text = rows["text"] if self.system.text is not None else None
        self.folder = tempfile.TemporaryDirectory()
        self.writer = PairWriter(Path(self.folder.name), found.known.classes, {})
        with jax.set_mesh(self.mesh):
            self._prepare()

    def _prepare(self) -> None:
        everywhere = sharding.replicated(self.mesh)
        params = self.subject.params
        if params is None:
            params = subject.parameters(self.system, everywhere)
        params = sampling_params(self.system, params)
        params, frozen = jax.device_put((params, self.subject.frozen), everywhere)
        start = time.perf_counter()
        jitted = jit_sample_batch(self.system, self.mesh)
        sampler = Sampler(
            sample_batch=jitted,
            mesh=self.mesh,
            params=params,
            frozen=frozen,
            batch_size=self.batch,
        )
        inputs = sampler.inputs(0, np.arange(self.batch), self.text, self.known)
        lowered = jitted.lower(params, frozen, *inputs)
        if not jax.tree.leaves(lowered.out_info):
            raise UserError(
                "ERROR [flags] --what=sample: all streams of this config are latents that nothing "
                "decodes. A sampler without a result is compiled to nothing, and its time would "
                "be none. Give one of its streams a codec that decodes."
            )
        self.lower_s = time.perf_counter() - start
        self.compiled = lowered.compile()
        self.compile_s = time.perf_counter() - start - self.lower_s
        self.sampler = dataclasses.replace(sampler, sample_batch=self.compiled)

    def run(self, count: int) -> float:
        """So many batches in a row; the seconds until the last one is done."""
        start = time.perf_counter()
        for n in range(count):
            pairs = self.sampler(n, np.arange(self.batch), self.text, self.known)
        jax.block_until_ready(pairs)
        return time.perf_counter() - start

    def write(self, count: int) -> float:
        """So many batches, all the way to their files."""
        first, start = self.writer.done, time.perf_counter()
        batches = pending_batches(first, first + count * self.batch, self.batch)
        started = ((b, self.sampler(0, b.indices, self.text, self.known)) for b in batches)
        for batch, made in one_ahead(started):
            pairs = {k: np.asarray(v) for k, v in made.items()}
            for row, index in enumerate(batch.indices.tolist()):
                self._write(index, {k: v[row] for k, v in pairs.items()})
        return time.perf_counter() - start

    def _write(self, index: int, made: dict[str, np.ndarray]) -> None:
        classes = self.subject.known.classes
        pair = cleaned(made, classes, absorb=0, min_instance=MIN_INSTANCE)
        self.writer.write(
            index, "", pair["image"], pair["labels"], {"seed": 0}, pair.get("segments")
        )

    def decodes(self) -> bool:
        """Whether a pair has pixels; cached latents need a codec that this config lacks."""
        kinds = {stream.codec.kind for stream in self.system.streams.values()}
        return not kinds or ("image" in kinds and bool(ANNOTATIONS & kinds))

    def facts(self) -> dict[str, Any]:
        """What was prepared."""
        plan = self.compiled.memory_analysis()
        total = plan.argument_size_in_bytes + plan.temp_size_in_bytes if plan else 0
        return {
            **subject.facts(self.subject),
            "parameters": sum(x.size for x in jax.tree.leaves(self.sampler.params)),
            "batch": self.batch,
            "steps": self.system.solver.steps,
            "guidance": {k: s.guidance for k, s in self.system.streams.items()},
            "given": sorted(self.known),
            "decoded": self.decodes(),
            "lower_s": round(self.lower_s, 2),
            "compile_s": round(self.compile_s, 2),
            "planned_gib": round(total / 2**30, 3),
        }

    def after(self, medians: Mapping[str, float]) -> dict[str, Any]:
        """Memory, speed and trace."""
        out: dict[str, Any] = {"memory": machine.memory()}
        each = profiling.sampling_flops(self.system, self.known)
        share = each * self.batch / machine.chips() if each else None
        dtype, peak = subject.number_type(self.system), machine.datasheet_flops()
        out["speed"] = subject.speed(share, medians["sampler"], dtype, ceiling(dtype), peak)
        out["trace"] = trace.traced(lambda: self.run(1), self.compiled.as_text())
        return out

    def close(self) -> None:
        """Removes the pairs."""
        self.writer.close()
        self.folder.cleanup()


def prepare(request: Request) -> Job:
    """The job of ``--what sample``."""
    sampling = _Sampling(request)
    actions = {"sampler": Action(sampling.run, sampling.batch)}
    if sampling.decodes():
        actions["written"] = Action(sampling.write, sampling.batch)
    return Job(actions, sampling.facts(), sampling.after, sampling.close)

"""The model under test: a config's system with random weights, and batches of the right shapes.

Nothing is read but what tells the sizes (classes, words), so neither data nor checkpoints have to
be there. Values are random, never constant: chips draw less power, and so run faster, on zeros.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax import build, sharding
from jointseg_jax.config import RunConfig
from jointseg_jax.data.cached.loader import CachedBatches
from jointseg_jax.data.pipeline import Batches, batches
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.perf import abstract, harness, trace
from jointseg_jax.perf.abstract import System
from jointseg_jax.perf.harness import BenchConfig, Values
from jointseg_jax.systems.system import Generator
from jointseg_jax.training.workdir import load_run

DESCRIBED = ("depth", "width", "heads", "dtype", "attention", "remat", "scan")
"""Fields of a network that its speed depends on."""


class ModelUnderTest(NamedTuple):
    """A system and what it needs."""

    config: RunConfig
    info: DatasetInfo
    system: System | Generator
    params: Mapping[str, Any] | None  # of a trained run; None: they are to be drawn
    frozen: Mapping[str, Any]  # parameters of the codecs that are not trained
    notes: tuple[str, ...]

    def facts(self) -> Values:
        """Plain values that the speed depends on."""
        network = getattr(self.system, "denoiser", None)
        out: Values = {
            "system": self.config.system.name,
            "size": list(self.system.size),
            "classes": len(self.info.classes),
            "words": len(self.info.vocabulary),
        }
        if network is not None:
            out["network"] = type(network).__name__
            out["tokens"] = max(span.stop for span in network.spans().values())
            fields = {k: getattr(network, k) for k in DESCRIBED if hasattr(network, k)}
            out |= {k: v if isinstance(v, int) else str(v) for k, v in fields.items()}
        return out | {"notes": list(self.notes)}

    @property
    def dtype(self) -> str:
        """The number type of the network's products."""
        network = getattr(self.system, "denoiser", None)
        return str(jnp.dtype(getattr(network, "dtype", "float32")))


def model_under_test(bench: BenchConfig) -> ModelUnderTest:
    """The system of a benchmark: a trained run's, or its config's with random weights.

    Raises:
      UserError: sizes that are unknown without the data; see ``abstract``.
    """
    if bench.workdir:
        run = load_run(bench.workdir)
        note = f"trained: {bench.workdir}, step {run.step}"
        return ModelUnderTest(run.config, run.info, run.system, run.params, run.frozen, (note,))
    config = bench.run_config()
    info = abstract.dataset_info(config, bench.classes or None)
    specs = abstract.codecs(config, info, bench.codec_system()).specs
    # Random weights: speed depends on shapes and dtypes alone.
    frozen = {
        name: build.codec(spec, info, name).init(jax.random.key(n))
        for n, (name, spec) in enumerate(specs.items())
    }
    system = build.system(config.system, info, specs)
    return ModelUnderTest(config, info, system, None, frozen, ("random weights",))


def random_rows(
    model: ModelUnderTest, rows: int, seed: int, *, cached: bool = False, to_cache: bool = False
) -> dict[str, np.ndarray]:
    """A host batch with the fields of a training batch, all of them random.

    Args:
      cached: the fields of the config's cache, if it has one, as training reads them.
      to_cache: latents of the frozen codecs, as a cache that is still to be made would hold.
    """
    rng = np.random.default_rng(seed)
    limits = {
        "image": 256,
        "labels": len(model.info.classes),
        "text": max(len(model.info.vocabulary), 1),
        "panoptic": len(model.info.classes),
    }

    def draw(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if np.issubdtype(dtype, np.integer):
            return rng.integers(limits[name], size=shape).astype(dtype)
        return rng.standard_normal(shape, np.float32).astype(dtype)

    if cached or to_cache:
        # Shapes of latents follow from the codecs' parameters.
        frozen = model.frozen if to_cache else None
        shapes = abstract.training_shapes(model.config, model.system, rows, frozen)
    else:
        shapes = abstract.batch_shapes(model.config, model.system, rows)
    return {name: draw(name, s.shape, s.dtype) for name, s in shapes.items()}


def real_batches(config: RunConfig, info: DatasetInfo) -> Batches | CachedBatches:
    """The batches of the config's training data, as a run gets them."""
    tokenizer = build.tokenizer(config.system, info.vocabulary)
    return batches(
        build.source(config, "train"),
        config.data,
        batch=config.batch,
        seed=config.seed,
        transforms=build.transforms(config.data),
        tokenizer=tokenizer.encode if tokenizer else None,
        instances=build.instances(config),
    )


def on_mesh(rows: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """A host batch on the devices, all there."""
    return jax.block_until_ready(sharding.global_batch(rows, mesh))


class Program:
    """A compiled program, and what compiling it took."""

    def __init__(self, lowered: jax.stages.Lowered, lower_s: float):
        start = time.perf_counter()
        self.lower_s = lower_s
        self.run = lowered.compile()
        self.compile_s = time.perf_counter() - start

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
        """Speed of a call, and where the time of one more goes.

        Args:
          flops: that the network needs for one call, over all chips; None: unknown.
          seconds: of one call.
          run: makes one call and waits for its end; None: no trace.
        """
        share = flops / harness.num_chips() if flops else None
        out: Values = {"speed": harness.speed(share, seconds, dtype)}
        if run is None:
            return out
        try:
            return out | {"trace": trace.traced(run, self.run.as_text())}
        except Exception as error:  # a profiler that fails costs no figure but its own
            return out | {"trace_error": f"{type(error).__name__}: {error}"[:500]}

"""What is measured: a config's system with random weights, and batches of the right shapes.

Nothing is read but what tells the sizes (classes, words), so neither data nor checkpoints have to
be there. Values are random, never constant: chips draw less power, and so run faster, on zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax import build, sharding
from jointseg_jax.data.cached.loader import CachedBatches
from jointseg_jax.data.pipeline import Batches, batches
from jointseg_jax.perf import abstract
from jointseg_jax.perf.harness import Request
from jointseg_jax.training.workdir import load_run

DESCRIBED = ("depth", "width", "heads", "dtype", "attention", "remat", "scan")
"""Fields of a network that its speed depends on."""


class Subject(NamedTuple):
    """A system and what it needs.

    Attributes:
      params: of a trained run, or None: they are to be drawn.
      frozen: parameters of the codecs that are not trained.
    """

    config: Mapping[str, Any]
    known: build.DatasetInfo
    system: Any
    params: Any
    frozen: dict[str, Any]
    notes: tuple[str, ...]


def subject(request: Request) -> Subject:
    """The system of a request: a trained run's, or its config's with random weights.

    Raises:
      UserError: sizes that nobody knows; see ``standin``.
    """
    if request.workdir:
        run = load_run(request.workdir)
        note = f"trained: {request.workdir}, step {run.step}"
        return Subject(run.config, run.info, run.system, run.params, run.frozen, (note,))
    config = request.config
    known = abstract.dataset_info(config, request.classes or None)
    specs = abstract.codecs(config, known, request.codec or None).specs
    frozen = {
        name: build.codec(spec, known, name).init(jax.random.key(n))
        for n, (name, spec) in enumerate(specs.items())
    }
    system = build.system(config, known, specs)
    return Subject(config, known, system, None, frozen, ("random weights",))


def facts(subject: Subject) -> dict[str, Any]:
    """Plain values that the speed depends on."""
    system, network = subject.system, getattr(subject.system, "denoiser", None)
    out: dict[str, Any] = {
        "system": subject.config["system"]["name"],
        "size": list(system.size),
        "classes": len(subject.known.classes),
        "words": len(subject.known.vocabulary),
    }
    if network is not None:
        out["network"] = type(network).__name__
        out["tokens"] = max(span.stop for span in network.spans().values())
        out |= {k: _said(getattr(network, k)) for k in DESCRIBED if hasattr(network, k)}
    return out | {"notes": list(subject.notes)}


def _said(value: Any) -> Any:
    return value if isinstance(value, int) else str(value)


def number_type(system: Any) -> str:
    """The number type of the network's products."""
    return str(jnp.dtype(getattr(getattr(system, "denoiser", None), "dtype", "float32")))


def random_rows(
    subject: Subject, rows: int, seed: int, *, cached: bool = False
) -> dict[str, np.ndarray]:
    """A host batch with the fields of a training batch, all of them random.

    Args:
      cached: the fields of the config's cache, if it has one, as training reads them.
    """
    rng = np.random.default_rng(seed)
    limits = {
        "image": 256,
        "labels": len(subject.known.classes),
        "text": max(len(subject.known.vocabulary), 1),
        "panoptic": len(subject.known.classes),
    }

    def draw(name: str, shape: tuple[int, ...], kind: Any) -> np.ndarray:
        if np.issubdtype(kind, np.integer):
            return rng.integers(limits[name], size=shape).astype(kind)
        return rng.standard_normal(shape, np.float32).astype(kind)

    shapes = abstract.training_shapes if cached else abstract.batch_shapes
    wanted = shapes(subject.config, subject.system, rows)
    return {name: draw(name, s.shape, s.dtype) for name, s in wanted.items()}


def real_batches(subject: Subject, *, start: int = 0) -> Batches | CachedBatches:
    """The batches of the config's training data, as a run gets them."""
    config, data = subject.config, subject.config["data"]
    tokenizer = build.tokenizer(config, subject.known.vocabulary)
    return batches(
        build.source(config, "train"),
        batch=config["batch"],
        seed=config["seed"],
        transforms=build.transforms(config),
        tokenizer=tokenizer.encode if tokenizer else None,
        start_step=start,
        workers=data.get("workers", 0),
        threads=data.get("threads", 2),
        prefetch=data.get("prefetch", 4),
        bad=data.get("bad", "replace"),
        bad_limit=data.get("bad_limit", 100),
        instances=build.instances(config),
    )


def parameters(system: Any, place: Any) -> Any:
    """Fresh parameters, where they belong."""
    return jax.jit(system.init, out_shardings=place)(jax.random.key(0))


def on_mesh(rows: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """A host batch on the devices, all there."""
    return jax.block_until_ready(sharding.global_batch(rows, mesh))


def speed(
    flops: float | None, seconds: float, dtype: str, measured: Any, datasheet: float | None
) -> dict[str, Any]:
    """FLOP/s of one chip and their part of what a chip can do.

    Args:
      flops: that the network needs for one call on one chip.
      measured: the ``Ceiling`` of the same machine.
    """
    out: dict[str, Any] = {
        "ceiling_tflops": measured.flops / 1e12,
        "ceiling_of": f"{measured.size} x {measured.size} {measured.dtype} product",
        "dtype": dtype,
    }
    if flops:
        rate = flops / seconds
        out |= {"tflop": flops / 1e12, "tflops": rate / 1e12, "mfu": rate / measured.flops}
        if datasheet:
            out |= {"datasheet_tflops": datasheet / 1e12, "mfu_datasheet": rate / datasheet}
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in out.items()}

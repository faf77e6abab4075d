"""What a compiled step costs, and a trace of a few steps on request."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from jointseg_jax.models import two_stream, unet, uvit
from jointseg_jax.models.backbone import Backbone

log = logging.getLogger("jointseg_jax")

NETWORKS = {uvit.UViT: uvit, unet.UNet: unet, two_stream.TwoStream: two_stream}
"""Network -> the module that counts its FLOPs and its tokens, by its sizes."""


def lengths(system: object) -> tuple[int, ...]:
    """Numbers of tokens that attend to each other in the system's network; () if unknown."""
    denoiser: Any = getattr(system, "denoiser", None)
    counts = NETWORKS.get(type(denoiser))
    return counts.lengths(denoiser) if counts else ()


def attention_share(system: object) -> float:
    """Part of ``forward_flops`` that are scores and weighted sums of attention."""
    total = forward_flops(system)
    if not total:
        return 0.0
    denoiser: Any = getattr(system, "denoiser", None)
    products = Backbone.of(denoiser).attention_products
    return 2 * sum(products(denoiser.width, n) for n in lengths(system)) / total


def forward_flops(system: object) -> int | None:
    """FLOPs of the network on one sample; None where its sizes do not tell them."""
    denoiser: Any = getattr(system, "denoiser", None)
    counts = NETWORKS.get(type(denoiser))
    return counts.forward_flops(denoiser) if counts else None


def sampling_flops(system: Any, given: Container[str] = ()) -> float | None:
    """FLOPs of one generated pair: all calls of the network, guidance included; no codec.

    Args:
      given: batch fields that are known, whose streams need no guidance.
    """
    forward, table = forward_flops(system), getattr(system.solver, "table", None)
    if not forward or table is None:
        return None
    streams = {k: s for k, s in system.streams.items() if s.field not in given}
    processes = {k: s.process for k, s in streams.items()} or {"state": system.process}
    # A stream that is known has nothing to be guided to.
    free = [s for k, s in streams.items() if k not in system.known] if streams else []
    guided = system.text is not None and any(s.guidance != 1 for s in free)
    # Guidance calls the network with and without text, each time the solver calls it.
    return float(forward * len(table(processes).t_network) * (2 if guided else 1))


def training_flops(system: object, batch: int) -> float | None:
    """FLOPs of a training step: 3 x forward on the unpadded tokens, no credit for recomputation.

    With self-conditioning half of the rows have a forward pass more (``systems/joint.py`` (4)).
    """
    forward = forward_flops(system)
    return passes(system) * forward * batch if forward else None


def passes(system: object) -> float:
    """Forward passes that an update of one row is worth."""
    # A backward pass has two products for each of the forward pass.
    return 3.5 if getattr(getattr(system, "denoiser", None), "estimated", ()) else 3.0


def step_flops(system: object, compiled: jax.stages.Compiled, batch: int) -> float | None:
    """FLOPs of one training step: ``training_flops``.

    Without an analytic count of the network, the compiler's own count (only right without scans).
    """
    if flops := training_flops(system, batch):
        return flops
    cost = compiled.cost_analysis() or {}
    return float(cost["flops"]) * jax.device_count() if cost.get("flops", 0) > 0 else None


def summary(
    params: PyTree, compiled: jax.stages.Compiled, seconds: float, flops: float | None
) -> str:
    """One line: parameters, memory of the step per device, FLOPs, compile time."""
    count = sum(x.size for x in jax.tree.leaves(params))
    memory = compiled.memory_analysis()
    parts = [f"{count:,} parameters"]
    if memory is not None:
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        parts.append(f"{total / 2**30:.2f} GiB per device")
    if flops:
        parts.append(f"{flops / 1e9:,.1f} GFLOP per step")
    return f"update compiled in {seconds:.1f} s: " + ", ".join(parts)


@contextlib.contextmanager
def window(folder: Path, step: int, start: int, steps: int) -> Iterator[None]:
    """Traces steps ``start .. start + steps - 1`` into ``folder`` (view with XProf)."""
    if steps <= 0 or not start <= step < start + steps:
        yield
        return
    if step == start:
        jax.profiler.start_trace(str(folder))
        log.info("profiling steps %d to %d into %s", start, start + steps - 1, folder)
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
        yield
    if step == start + steps - 1:
        # Steps are dispatched ahead; the trace would end before their work does.
        jax.block_until_ready(jax.live_arrays())
        jax.profiler.stop_trace()

"""Compiles a lowered program and says whether it fits, what it does, and how long that may take.

1. HBM: the compiler's own plan for one chip; a program that does not fit is refused by it.
2. ``estimate_ms`` = estimated cycles x trip counts / clock. Kernels of our own (Pallas) and waiting
   for other chips are not in it. It is the compiler's, not measured: good for comparing programs.
3. ``roofline_ms`` = analytic FLOPs / chips / peak: no program of this network can be faster.
4. ``kernel_ms`` = FLOPs of attention kernels / (peak x ``Chip.attention``), for what 2 leaves out:
   the share of the peak that the packed kernel reaches by the compiler's schedule of it
   (``schedule``; splash stays behind that). ``step_ms`` = ``estimate_ms + kernel_ms + ici_ms``, as
   if nothing were hidden behind anything, ``image_ms`` its part for one row, and ``mfu`` =
   ``roofline_ms / step_ms``. Made for choosing between programs, not for quoting.
5. ``matmul_ratio`` = products in the program / those of the network, attention left out of both
   where kernels do it. 1 is none too many; remat ``full`` recomputes the forward pass: 4/3.
6. ``collective_ratio`` = bytes of collectives / those that there must be (``ideal``).
7. ``ici_ms`` = bytes of all collectives on one chip / its links together: less cannot be waited for
   unless it is hidden behind computation.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from jointseg_jax.chips import Chip
from jointseg_jax.perf.costs import Costs, costs
from jointseg_jax.perf.hlo import Module
from jointseg_jax.perf.programs import Lowered
from jointseg_jax.types import UserError

GIB = 2**30
TIGHT = 0.85
"""Part of HBM above which little is left for what the compiler does not know of."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """GiB of one chip's HBM by the compiler's plan."""

    arguments: float
    outputs: float
    shared: float  # outputs that take the place of arguments
    temporaries: float
    code: float
    peak: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the compiler made of a program; without ``memory`` and ``costs`` where it refused."""

    lowered: Lowered
    chip: Chip
    seconds: float
    memory: Memory | None = None
    costs: Costs | None = None
    refusal: str = ""
    unknown_loops: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def chips(self) -> int:
        """Number of chips."""
        total = 1
        for n in self.lowered.mesh:
            total *= n
        return total

    @property
    def roofline_ms(self) -> float | None:
        """See the module docstring's 3."""
        if self.lowered.flops is None:
            return None
        return self.lowered.flops / self.chips / self.chip.peak / 1e9

    @property
    def estimate_ms(self) -> float | None:
        """See the module docstring's 2."""
        if self.costs is None or not self.costs.cycles:
            return None
        return sum(self.costs.cycles.values()) / self.chip.clock / 1e6

    @property
    def kernel_ms(self) -> float | None:
        """See the module docstring's 4."""
        if self.roofline_ms is None or self.costs is None:
            return None
        if not self.costs.kernels:
            return 0.0
        share = self.lowered.attention * self.lowered.passes
        return self.roofline_ms * share / self.chip.attention

    @property
    def matmul_ratio(self) -> float | None:
        """See the module docstring's 5."""
        if self.lowered.flops is None or self.costs is None:
            return None
        share = 1.0 - (self.lowered.attention if self.costs.kernels else 0.0)
        return self.costs.flops * self.chips / (self.lowered.flops * share)

    @property
    def collective_bytes(self) -> int | None:
        """Bytes of all collectives on one chip."""
        if self.costs is None:
            return None
        return sum(traffic.bytes for traffic in self.costs.collectives.values())

    @property
    def collective_ratio(self) -> float | None:
        """See the module docstring's 6."""
        if not self.lowered.ideal or self.costs is None:
            return None
        return self.collective_bytes / self.lowered.ideal

    @property
    def ici_ms(self) -> float | None:
        """See the module docstring's 7."""
        moved = self.collective_bytes
        return None if moved is None else moved / self.chip.ici / 1e6

    @property
    def step_ms(self) -> float | None:
        """See the module docstring's 4."""
        parts = (self.estimate_ms, self.kernel_ms, self.ici_ms)
        return None if None in parts else sum(parts)

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilization if a run took ``step_ms``."""
        return None if None in (self.step_ms, self.roofline_ms) else self.roofline_ms / self.step_ms

    @property
    def image_ms(self) -> float | None:
        """``step_ms`` over the rows that one chip does."""
        return None if self.step_ms is None else self.step_ms * self.chips / self.lowered.batch

    def values(self) -> dict[str, Any]:
        """The report as plain values: sizes in GiB, traffic in GB (10^9), times in ms."""
        found: dict[str, Any] = {
            "fits": self.memory is not None,
            "chips": self.chips,
            "mesh": list(self.lowered.mesh),
            "batch": self.lowered.batch,
            "hbm_limit_gb": self.chip.hbm,
            "compile_s": round(self.seconds, 1),
            "analytic_tflop": _rounded(self.lowered.flops, 1e12 * self.chips),
            "roofline_ms": _rounded(self.roofline_ms),
            "notes": list(self.lowered.notes),
            "compiler_options": dict(self.options),
        }
        if self.refusal:
            return found | {"refusal": self.refusal}
        return found | self._memory_values() | self._cost_values()

    def _memory_values(self) -> dict[str, Any]:
        m = self.memory
        sizes = {
            "hbm_gb": m.peak,
            "arguments_gb": m.arguments,
            "outputs_gb": m.outputs,
            "shared_gb": m.shared,
            "temporaries_gb": m.temporaries,
            "code_gb": m.code,
        }
        share = {"hbm_share": _rounded(m.peak, self.chip.hbm)}
        return {k: _rounded(v) for k, v in sizes.items()} | share

    def _cost_values(self) -> dict[str, Any]:
        traffic = self.costs.collectives
        return {
            "matmul_tflop": _rounded(self.costs.flops, 1e12),
            "estimate_ms": _rounded(self.estimate_ms),
            "estimate_parts_ms": {
                k: _rounded(v, 1e6 * self.chip.clock) for k, v in self.costs.cycles.items()
            },
            "not_estimated": self.costs.kernels,
            "kernel_ms": _rounded(self.kernel_ms),
            "step_ms": _rounded(self.step_ms),
            "image_ms": _rounded(self.image_ms),
            "mfu": _rounded(self.mfu),
            "matmul_ratio": _rounded(self.matmul_ratio),
            "squares": list(self.costs.squares),
            "collective_gb": _rounded(self.collective_bytes, 1e9),
            "collective_ratio": _rounded(self.collective_ratio),
            "collectives": {
                k: {"count": t.count, "gb": _rounded(t.bytes, 1e9)} for k, t in traffic.items()
            },
            "ici_ms": _rounded(self.ici_ms),
            "unknown_loops": list(self.unknown_loops),
        }


def _rounded(value: int | float | None, unit: float = 1.0) -> float | None:
    return None if value is None else float(f"{value / unit:.5g}")


def compiled(
    lowered: Lowered, chip: Chip, options: Mapping[str, str] | None = None
) -> tuple[Report, str]:
    """Compiles, and returns the report and the optimized program's text (empty where refused).

    Raises:
      UserError: the compiler refuses for another reason than memory (an option it does not know).
    """
    start, given = time.perf_counter(), dict(options or {})
    try:
        done = lowered.program.compile(compiler_options=given)
    except jax.errors.JaxRuntimeError as error:
        seconds = time.perf_counter() - start
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"ERROR [compiler] {_shortened(str(error))}") from error
        refusal = _shortened(str(error))
        facts = {"lowered": lowered, "chip": chip, "seconds": seconds, "options": given}
        return Report(**facts, refusal=refusal), ""
    seconds = time.perf_counter() - start
    text = done.as_text()
    module = Module(text)
    report = Report(
        lowered=lowered,
        chip=chip,
        seconds=seconds,
        memory=_memory(done.memory_analysis()),
        costs=costs(module, lowered.lengths),
        unknown_loops=tuple(sorted(module.unknown_loops)),
        options=given,
    )
    return report, text


def _memory(stats: Any) -> Memory:
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    shared, temporaries = stats.alias_size_in_bytes, stats.temp_size_in_bytes
    sum_of_all = arguments + outputs - shared + temporaries
    peak = getattr(stats, "peak_memory_in_bytes", 0) or sum_of_all  # older jaxlibs do not say
    sizes = (arguments, outputs, shared, temporaries, stats.generated_code_size_in_bytes, peak)
    names = ("arguments", "outputs", "shared", "temporaries", "code", "peak")
    return Memory(**{name: size / GIB for name, size in zip(names, sizes)})


def _shortened(message: str, lines: int = 24) -> str:
    """The compiler's message without source traces, links and the far end of long lists."""
    dropped = re.compile(r"=== Source|^See https|^\s*$|^\S+\.cc:\d+|^\s*Unpadded size|^\s*=+\s*$")
    kept = [line[:240] for line in message.splitlines() if not dropped.search(line)]
    return "\n".join([*kept[:lines], *(["..."] if len(kept) > lines else [])])

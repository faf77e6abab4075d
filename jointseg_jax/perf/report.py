"""Compiles a lowered program and says whether it fits, what it does, and how long that may take.

1. HBM: the compiler's own plan for one chip; a program that does not fit is refused by it.
2. ``estimate_ms`` = estimated cycles x trip counts / clock. Kernels of our own (Pallas) and waiting
   for other chips are not in it. It is the compiler's, not measured: good for comparing programs.
3. ``step_ms`` = ``estimate_ms + kernel_ms + ici_ms``, as if nothing were hidden behind anything,
   and ``mfu`` = ``roofline_ms / step_ms``. Made for choosing between programs, not for quoting.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax

from jointseg_jax.chips import Chip
from jointseg_jax.perf.costs import Costs, costs
from jointseg_jax.perf.harness import Values
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
        return math.prod(self.lowered.mesh)

    @property
    def roofline_ms(self) -> float | None:
        """Analytic FLOPs / chips / peak: no program of this network can be faster."""
        if self.lowered.flops is None:
            return None
        return self.lowered.flops / self.chips / self.chip.peak / 1e9

    @property
    def estimate_ms(self) -> float | None:
        """Estimated cycles x trip counts / clock."""
        if self.costs is None or not self.costs.cycles:
            return None
        return sum(self.costs.cycles.values()) / self.chip.clock / 1e6

    @property
    def kernel_ms(self) -> float | None:
        """FLOPs of attention kernels / (peak x ``Chip.attention``), which the estimate leaves out.

        ``Chip.attention`` is the part of the peak that the packed kernel reaches by the compiler's
        schedule of it (``schedule``); splash stays behind that.
        """
        if self.roofline_ms is None or self.costs is None:
            return None
        if not self.costs.kernels:
            return 0.0
        # Attention's part of the network's FLOPs, times the kernel's products for one forward pass.
        share = self.lowered.attention * self.lowered.passes
        return self.roofline_ms * share / self.chip.attention

    @property
    def matmul_ratio(self) -> float | None:
        """Products in the program / those of the network; remat ``full`` makes it 4/3.

        Attention is left out of both where kernels do it.
        """
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
        """Bytes of collectives / those that there must be (``costs.ideal_bytes``)."""
        if not self.lowered.ideal or self.costs is None:
            return None
        return self.collective_bytes / self.lowered.ideal

    @property
    def ici_ms(self) -> float | None:
        """Bytes of all collectives on one chip / its links together.

        Waiting takes at least this long unless it is hidden behind computation.
        """
        moved = self.collective_bytes
        return None if moved is None else moved / self.chip.ici / 1e6

    @property
    def step_ms(self) -> float | None:
        """``estimate_ms + kernel_ms + ici_ms``."""
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

    def values(self) -> Values:
        """The report as plain values: sizes in GiB, traffic in GB (10^9), times in ms."""
        found: Values = {
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
        if self.memory is None or self.costs is None:
            return found | {"refusal": self.refusal}
        return found | self._memory_values(self.memory) | self._cost_values(self.costs)

    def _memory_values(self, m: Memory) -> Values:
        # GiB in spite of the names, which scripts read.
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

    def _cost_values(self, costs: Costs) -> Values:
        cycles_per_ms = 1e6 * self.chip.clock
        return {
            "matmul_tflop": _rounded(costs.flops, 1e12),
            "estimate_ms": _rounded(self.estimate_ms),
            "estimate_parts_ms": {k: _rounded(v, cycles_per_ms) for k, v in costs.cycles.items()},
            "not_estimated": costs.kernels,
            "kernel_ms": _rounded(self.kernel_ms),
            "step_ms": _rounded(self.step_ms),
            "image_ms": _rounded(self.image_ms),
            "mfu": _rounded(self.mfu),
            "matmul_ratio": _rounded(self.matmul_ratio),
            "squares": list(costs.squares),
            "collective_gb": _rounded(self.collective_bytes, 1e9),
            "collective_ratio": _rounded(self.collective_ratio),
            "collectives": {
                k: {"count": t.count, "gb": _rounded(t.bytes, 1e9)}
                for k, t in costs.collectives.items()
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
    start, options = time.perf_counter(), dict(options or {})
    # The compiler plans memory; what does not fit is an error of compiling, not of running.
    try:
        done = lowered.program.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        seconds, refusal = time.perf_counter() - start, _shortened(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"ERROR [compiler] {refusal}") from error
        report = Report(
            lowered=lowered, chip=chip, seconds=seconds, options=options, refusal=refusal
        )
        return report, ""
    seconds = time.perf_counter() - start
    text = done.as_text()
    module = Module(text)
    report = Report(
        lowered=lowered,
        chip=chip,
        seconds=seconds,
        memory=_memory(done),
        costs=costs(module, lowered.lengths),
        unknown_loops=tuple(sorted(module.unknown_loops)),  # filled while ``costs`` counted
        options=options,
    )
    return report, text


def _memory(done: jax.stages.Compiled) -> Memory:
    stats = done.memory_analysis()
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    shared, temporaries = stats.alias_size_in_bytes, stats.temp_size_in_bytes
    sum_of_all = arguments + outputs - shared + temporaries
    peak = getattr(stats, "peak_memory_in_bytes", 0) or sum_of_all  # older jaxlibs do not say
    sizes = (arguments, outputs, shared, temporaries, stats.generated_code_size_in_bytes, peak)
    names = ("arguments", "outputs", "shared", "temporaries", "code", "peak")
    return Memory(**{name: size / GIB for name, size in zip(names, sizes)})


def _shortened(message: str, lines: int = 24) -> str:
    """The compiler's message without source traces, links and the far end of long lists."""
    # Source traces, links, alignment tables: nothing of it helps who has to make the run smaller.
    dropped = re.compile(r"=== Source|^See https|^\s*$|^\S+\.cc:\d+|^\s*Unpadded size|^\s*=+\s*$")
    kept = [line[:240] for line in message.splitlines() if not dropped.search(line)]
    return "\n".join([*kept[:lines], *(["..."] if len(kept) > lines else [])])

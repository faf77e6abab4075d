"""Compiles a lowered program and says whether it fits, what it does, and how long that may take.

1. HBM: the compiler's own plan for one chip; a program that does not fit is refused by it.
2. ``estimate_ms`` = estimated cycles x trip counts / clock. Kernels of our own (Pallas) and waiting
   for other chips are not in it. It is the compiler's, not measured: good for comparing programs.
3. ``step_ms`` = ``estimate_ms + kernel_ms + ici_ms``, as if nothing were hidden behind anything,
   and ``mfu`` = ``roofline_ms / step_ms``. Made for choosing between programs, not for quoting.
"""

from __future__ import annotations

import functools
import math
import operator
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax

from jointseg_jax.chips import Chip
from jointseg_jax.perf.costs import Costs, costs
from jointseg_jax.perf.harness import Values, rounded
from jointseg_jax.perf.hlo import Module
from jointseg_jax.perf.programs import Lowered
from jointseg_jax.types import UserError

GIB = 2**30
TIGHT = 0.85
"""Part of HBM above which little is left for what the compiler does not know of."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """GiB of one chip's HBM by the compiler's plan."""

    peak: float
    arguments: float
    outputs: float
    shared: float  # outputs that take the place of arguments
    temporaries: float
    code: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the compiler made of a program; without ``memory`` and ``costs`` where it refused.

    Figures are of one chip, and None where something they follow from is unknown.
    """

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
        return _over(self.lowered.flops, self.chips, self.chip.peak, 1e9)

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
        # Attention's part of the network's FLOPs, times the kernel's products for one forward pass.
        share = self.lowered.attention * self.lowered.passes
        return self.roofline_ms * share / self.chip.attention if self.costs.kernels else 0.0

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
        """Bytes of all collectives."""
        traffic = self.costs.collectives.values() if self.costs is not None else None
        return None if traffic is None else sum(t.bytes for t in traffic)

    @property
    def collective_ratio(self) -> float | None:
        """Bytes of collectives / those that there must be (``costs.ideal_bytes``)."""
        return _over(self.collective_bytes, self.lowered.ideal) if self.lowered.ideal else None

    @property
    def ici_ms(self) -> float | None:
        """Bytes of all collectives / a chip's links together.

        Waiting takes at least this long unless it is hidden behind computation.
        """
        return _over(self.collective_bytes, self.chip.ici, 1e6)

    @property
    def step_ms(self) -> float | None:
        """``estimate_ms + kernel_ms + ici_ms``."""
        parts = (self.estimate_ms, self.kernel_ms, self.ici_ms)
        return None if None in parts else sum(parts)

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilization if a run took ``step_ms``."""
        return _over(self.roofline_ms, self.step_ms) if self.step_ms else None

    @property
    def image_ms(self) -> float | None:
        """``step_ms`` over the rows that one chip does."""
        return _over(self.step_ms and self.step_ms * self.chips, self.lowered.batch)

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
        # GiB in spite of the names, which scripts read.
        sizes = {f"{k}_gb".replace("peak", "hbm"): v for k, v in vars(self.memory).items()}
        found |= {k: _rounded(v) for k, v in sizes.items()}
        found["hbm_share"] = _rounded(self.memory.peak, self.chip.hbm)
        return found | self._cost_values(self.costs)

    def _cost_values(self, costs: Costs) -> Values:
        per_ms = 1e6 * self.chip.clock
        traffic = costs.collectives.items()
        return {
            "matmul_tflop": _rounded(costs.flops, 1e12),
            "estimate_ms": _rounded(self.estimate_ms),
            "estimate_parts_ms": {k: _rounded(v, per_ms) for k, v in costs.cycles.items()},
            "not_estimated": costs.kernels,
            **{k: _rounded(getattr(self, k)) for k in ("kernel_ms", "step_ms", "image_ms", "mfu")},
            "matmul_ratio": _rounded(self.matmul_ratio),
            "squares": list(costs.squares),
            "collective_gb": _rounded(self.collective_bytes, 1e9),
            "collective_ratio": _rounded(self.collective_ratio),
            "collectives": {
                k: {"count": t.count, "gb": _rounded(t.bytes, 1e9)} for k, t in traffic
            },
            "ici_ms": _rounded(self.ici_ms),
            "unknown_loops": list(self.unknown_loops),
        }


def _over(value: int | float | None, *units: int | float) -> float | None:
    """The value divided by each of the units; None of None."""
    return None if value is None else functools.reduce(operator.truediv, units, value)


def _rounded(value: int | float | None, unit: float = 1.0) -> float | None:
    return None if value is None else rounded(value / unit)


def compiled(
    lowered: Lowered, chip: Chip, options: Mapping[str, str] | None = None
) -> tuple[Report, str]:
    """Compiles, and returns the report and the optimized program's text (empty where refused).

    Raises:
      UserError: the compiler refuses for another reason than memory (an option it does not know).
    """
    start, options = time.perf_counter(), dict(options or {})
    report = functools.partial(Report, lowered=lowered, chip=chip, options=options)
    # The compiler plans memory; what does not fit is an error of compiling, not of running.
    try:
        done = lowered.program.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        seconds, refusal = time.perf_counter() - start, _shortened(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"ERROR [compiler] {refusal}") from error
        return report(seconds=seconds, refusal=refusal), ""
    seconds, text = time.perf_counter() - start, done.as_text()
    module = Module(text)
    found = costs(module, lowered.lengths)
    loops = tuple(sorted(module.unknown_loops))  # filled while ``costs`` counted
    return report(seconds=seconds, memory=_memory(done), costs=found, unknown_loops=loops), text


def _memory(done: jax.stages.Compiled) -> Memory:
    stats = done.memory_analysis()
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "shared": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    # Older jaxlibs do not say.
    together = sizes["arguments"] + sizes["outputs"] - sizes["shared"] + sizes["temporaries"]
    sizes["peak"] = getattr(stats, "peak_memory_in_bytes", 0) or together
    return Memory(**{name: size / GIB for name, size in sizes.items()})


def _shortened(message: str, lines: int = 24) -> str:
    """The compiler's message without source traces, links and the far end of long lists."""
    # Source traces, links, alignment tables: nothing of it helps who has to make the run smaller.
    dropped = re.compile(r"=== Source|^See https|^\s*$|^\S+\.cc:\d+|^\s*Unpadded size|^\s*=+\s*$")
    kept = [line[:240] for line in message.splitlines() if not dropped.search(line)]
    return "\n".join([*kept[:lines], *(["..."] if len(kept) > lines else [])])

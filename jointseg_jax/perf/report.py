"""Compiles a lowered program and says whether it fits, what it does, and how long that may take.

1. HBM: the compiler's own plan for one chip; a program that does not fit is refused by it.
2. ``estimate_ms`` = estimated cycles x trip counts / clock. Kernels of our own (Pallas) and waiting
   for other chips are not in it. It is the compiler's, not measured: good for comparing programs.
3. ``kernel_ms``, ``ici_ms``: FLOPs of attention kernels / a part of the peak, and bytes of all
   collectives / a chip's links together.
4. ``step_ms`` = ``estimate_ms + kernel_ms + ici_ms``, as if nothing were hidden behind anything,
   and ``mfu`` = ``roofline_ms / step_ms``. Made for choosing between programs, not for quoting.
"""

from __future__ import annotations

import functools
import math
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

    @functools.cached_property
    def figures(self) -> dict[str, float]:
        """Figures of one chip by name; NaN where something they follow from is unknown."""
        lowered, chip, found = self.lowered, self.chip, self.costs
        flops = math.nan if lowered.flops is None else lowered.flops
        # No program of this network can be faster.
        roofline = flops / self.chips / chip.peak / 1e9
        out = {"analytic_tflop": flops / (1e12 * self.chips), "roofline_ms": roofline}
        if found is None:
            return out
        moved = sum(traffic.bytes for traffic in found.collectives.values())
        # Where kernels do attention, neither cycles nor products of it are in the program's text.
        hidden = lowered.attention if found.kernels else 0.0
        estimate = sum(found.cycles.values()) / chip.clock / 1e6 if found.cycles else math.nan
        # chip.attention: the part of the peak that the packed kernel reaches by the compiler's
        # schedule of it; splash stays behind that.
        kernel = roofline * (hidden * lowered.passes) / chip.attention
        # With every link busy; waiting takes at least this long unless it is hidden.
        ici = moved / chip.ici / 1e6
        step = estimate + kernel + ici
        return out | {
            "matmul_tflop": found.flops / 1e12,
            # Products in the program / those of the network; remat ``full`` makes it 4/3.
            "matmul_ratio": found.flops * self.chips / (flops * (1.0 - hidden)),
            "collective_gb": moved / 1e9,
            "collective_ratio": moved / lowered.ideal if lowered.ideal else math.nan,
            "estimate_ms": estimate,
            "kernel_ms": kernel,
            "ici_ms": ici,
            "step_ms": step,
            "image_ms": step * self.chips / lowered.batch,
            "mfu": roofline / step if step else math.nan,
        }

    def values(self) -> Values:
        """The report as plain values: sizes in GiB, traffic in GB (10^9), times in ms."""
        out: Values = {
            "fits": self.memory is not None,
            "chips": self.chips,
            "mesh": list(self.lowered.mesh),
            "batch": self.lowered.batch,
            "hbm_limit_gb": self.chip.hbm,
            "compile_s": round(self.seconds, 1),
            "notes": list(self.lowered.notes),
            "compiler_options": dict(self.options),
            **{k: None if math.isnan(v) else rounded(v) for k, v in self.figures.items()},
        }
        if self.memory is None or self.costs is None:
            return out | {"refusal": self.refusal}
        # GiB in spite of the names, which scripts read.
        sizes = {f"{k}_gb".replace("peak", "hbm"): v for k, v in vars(self.memory).items()}
        out |= {k: rounded(v) for k, v in sizes.items()}
        cycles, traffic = self.costs.cycles.items(), self.costs.collectives.items()
        return out | {
            "hbm_share": rounded(self.memory.peak / self.chip.hbm),
            "estimate_parts_ms": {k: rounded(v / (1e6 * self.chip.clock)) for k, v in cycles},
            "not_estimated": self.costs.kernels,
            "squares": list(self.costs.squares),
            "collectives": {
                k: {"count": t.count, "gb": rounded(t.bytes / 1e9)} for k, t in traffic
            },
            "unknown_loops": list(self.unknown_loops),
        }


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

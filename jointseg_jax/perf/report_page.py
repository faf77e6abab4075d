"""A report as a page of text that explains itself."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

from jointseg_jax.perf.report import TIGHT, Report

PARTS = 10
"""Parts of the estimate that are shown."""


def page(report: Report, heading: str) -> str:
    """The report, one fact a line."""
    values = report.values()
    lines = [heading, *_program(report, values)]
    if report.refusal:
        return "\n".join([*lines, *_refused(report)])
    return "\n".join([*lines, *_memory(values), *_traffic(values), *_work(report, values)])


def _row(name: str, figure: str, remark: str = "") -> str:
    return f"  {name:<26}{figure:>14}  {remark}".rstrip()


def _number(value: int | float | None, unit: str) -> str:
    return "not known" if value is None else f"{value:,.4g} {unit}"


def _program(report: Report, values: dict[str, Any]) -> list[str]:
    data, fsdp, model = report.lowered.mesh
    rows = values["batch"] / (data * fsdp)
    return [
        "",
        _row("chips", f"{values['chips']:,}", f"mesh data {data} x fsdp {fsdp} x model {model}"),
        _row("batch", f"{values['batch']:,}", f"{rows:g} per data-parallel shard"),
        _row("compiled in", f"{values['compile_s']:.1f} s", "; ".join(values["notes"])),
        *(_row("option", "", f"{k}={v}") for k, v in values["compiler_options"].items()),
    ]


def _refused(report: Report) -> list[str]:
    return [
        "",
        "DOES NOT FIT. The compiler says:",
        *("  " + part for line in report.refusal.splitlines() for part in wrap(line, 96)),
        "",
        "What takes memory away: fewer rows per chip (--batch_per_chip), --remat=full, more chips",
        "to split the state over (--config.sharding=zero1 or fsdp with --config.mesh), accumulate.",
    ]


def _memory(values: dict[str, Any]) -> list[str]:
    share = values["hbm_share"]
    verdict = "fits" if share <= TIGHT else f"fits, but above {TIGHT:.0%}: tight"
    gib = {k: f"{values[k]:.3f} GiB" for k in values if k.endswith("_gb")}
    return [
        "",
        "HBM per chip, the compiler's plan",
        _row("arguments", gib["arguments_gb"], "parameters, optimizer state, batch"),
        _row("outputs", gib["outputs_gb"], f"{gib['shared_gb']} of it in the arguments' place"),
        _row("temporaries", gib["temporaries_gb"], "activations, gradients"),
        _row("code", gib["code_gb"]),
        _row("peak", gib["hbm_gb"], f"{share:.1%} of {values['hbm_limit_gb']} GiB: {verdict}"),
    ]


def _traffic(values: dict[str, Any]) -> list[str]:
    rows = [
        _row(kind, f"{t['gb']:.4f} GB", f"{t['count']:,} per run")
        for kind, t in values["collectives"].items()
    ]
    total = f"{values['ici_ms']:.3f} ms with every link busy"
    if ratio := values["collective_ratio"]:
        total += f"; {ratio:.3f} x what there must be"
    rows.append(_row("together", f"{values['collective_gb']:.4f} GB", total))
    return ["", "Collectives per chip, bytes x trip count", *rows]


def _work(report: Report, values: dict[str, Any]) -> list[str]:
    matmul, ratio = values["matmul_tflop"], ""
    if values["matmul_ratio"]:
        apart = "no attention; " if values["not_estimated"] else ""
        ratio = f"{values['matmul_ratio']:.3f} x analytic ({apart}remat, padding, codecs)"
    lines = [
        "",
        "Work per chip and run",
        _row(
            "analytic FLOPs",
            _number(values["analytic_tflop"], "TFLOP"),
            "of the network alone, by its sizes",
        ),
        _row("matmul FLOPs", _number(matmul, "TFLOP"), ratio),
        _row("roofline", _number(values["roofline_ms"], "ms"), f"at {report.chip.peak} TFLOP/s"),
        _row(
            "estimated computation",
            _number(values["estimate_ms"], "ms"),
            "by the compiler's cycles; not measured",
        ),
    ]
    parts = list(values["estimate_parts_ms"].items())
    lines += [_row("  " + name, f"{ms:.3f} ms") for name, ms in parts[:PARTS]]
    if parts[PARTS:]:
        lines.append(_row("  the rest", f"{sum(ms for _, ms in parts[PARTS:]):.3f} ms"))
    for kernel, count in values["not_estimated"].items():
        lines.append(_row("not in the estimate", f"{count:,} x", kernel))
    if values["not_estimated"]:
        remark = f"if at {report.chip.attention:.0%} of the peak, as packed is by its schedule"
        lines.append(_row("attention kernels", _number(values["kernel_ms"], "ms"), remark))
    together = "with collectives, nothing hidden; to compare"
    lines.append(_row("step", _number(values["step_ms"], "ms"), together))
    if values["mfu"] is not None:
        lines.append(_row("MFU", f"{values['mfu']:.1%}", "roofline / step: of that estimate"))
    squares = ", ".join(values["squares"][:2]) + (", ..." if values["squares"][2:] else "")
    lines.append(_row("N x N buffers", str(len(values["squares"])), squares))
    for loop in values["unknown_loops"]:
        lines.append(_row("counted once", loop, "a loop that ends when its data say so"))
    return lines

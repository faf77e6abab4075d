"""Reports and results as pages of text that explain themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from textwrap import wrap
from typing import Any

from jointseg_jax.perf.bench import Result
from jointseg_jax.perf.harness import Timing
from jointseg_jax.perf.report import TIGHT, Report

WIDTH = 100

Row = Mapping[str, Any]
"""Plain values of which a page shows some."""

# ------------------------------------------------------------- what the compiler says

MAX_PARTS = 10
"""Parts of the estimate that are shown."""

REFUSED = """
What takes memory away: fewer rows per chip (--batch_per_chip), --remat=full, more chips
to split the state over (--config.sharding=zero1 or fsdp with --config.mesh), accumulate."""


def report_page(report: Report, heading: str) -> str:
    """A compiler's report, one fact a line."""
    values = report.values()
    data, fsdp, model = report.lowered.mesh
    rows = values["batch"] / (data * fsdp)
    lines = [
        heading,
        "",
        _figure("chips", f"{values['chips']:,}", f"mesh data {data} x fsdp {fsdp} x model {model}"),
        _figure("batch", f"{values['batch']:,}", f"{rows:g} per data-parallel shard"),
        _figure("compiled in", f"{values['compile_s']:.1f} s", "; ".join(values["notes"])),
        *(_figure("option", "", f"{k}={v}") for k, v in values["compiler_options"].items()),
        "",
    ]
    if report.refusal:
        said = ("  " + part for line in report.refusal.splitlines() for part in wrap(line, 96))
        return "\n".join([*lines, "DOES NOT FIT. The compiler says:", *said, REFUSED])
    return "\n".join([*lines, *_hbm(values), *_traffic(values), *_work(report, values)])


def _figure(name: str, figure: str, remark: str = "") -> str:
    return f"  {name:<26}{figure:>14}  {remark}".rstrip()


def _number(value: int | float | None, unit: str) -> str:
    return "not known" if value is None else f"{value:,.4g} {unit}"


def _hbm(values: Row) -> list[str]:
    share = values["hbm_share"]
    verdict = "fits" if share <= TIGHT else f"fits, but above {TIGHT:.0%}: tight"
    remarks = {
        "arguments": "parameters, optimizer state, batch",
        "outputs": f"{values['shared_gb']:.3f} GiB of it in the arguments' place",
        "temporaries": "activations, gradients",
        "code": "",
    }
    rows = [_figure(k, f"{values[f'{k}_gb']:.3f} GiB", text) for k, text in remarks.items()]
    peak = f"{share:.1%} of {values['hbm_limit_gb']} GiB: {verdict}"
    rows.append(_figure("peak", f"{values['hbm_gb']:.3f} GiB", peak))
    return ["HBM per chip, the compiler's plan", *rows, ""]


def _traffic(values: Row) -> list[str]:
    rows = [
        _figure(kind, f"{t['gb']:.4f} GB", f"{t['count']:,} per run")
        for kind, t in values["collectives"].items()
    ]
    total = f"{values['ici_ms']:.3f} ms with every link busy"
    if ratio := values["collective_ratio"]:
        total += f"; {ratio:.3f} x what there must be"
    rows.append(_figure("together", f"{values['collective_gb']:.4f} GB", total))
    return ["Collectives per chip, bytes x trip count", *rows, ""]


def _work(report: Report, values: Row) -> list[str]:
    kernels, ratio, peak = values["not_estimated"], values["matmul_ratio"], report.chip.peak
    # Kernels of our own are not in the program's text, so neither side counts attention then.
    apart = "no attention; " if kernels else ""
    products = f"{ratio:.3f} x analytic ({apart}remat, padding, codecs)" if ratio else ""
    rows = [
        ("analytic FLOPs", "analytic_tflop", "TFLOP", "of the network alone, by its sizes"),
        ("matmul FLOPs", "matmul_tflop", "TFLOP", products),
        ("roofline", "roofline_ms", "ms", f"at {peak} TFLOP/s"),
        ("estimated computation", "estimate_ms", "ms", "by the compiler's cycles; not measured"),
    ]
    lines = [_figure(name, _number(values[k], unit), text) for name, k, unit, text in rows]
    parts = list(values["estimate_parts_ms"].items())
    if rest := parts[MAX_PARTS:]:
        parts = [*parts[:MAX_PARTS], ("the rest", sum(ms for _, ms in rest))]
    lines += [_figure("  " + name, f"{ms:.3f} ms") for name, ms in parts]
    lines += [_figure("not in the estimate", f"{n:,} x", kernel) for kernel, n in kernels.items()]
    if kernels:
        text = f"if at {report.chip.attention:.0%} of the peak, as packed is by its schedule"
        lines.append(_figure("attention kernels", _number(values["kernel_ms"], "ms"), text))
    together = "with collectives, nothing hidden; to compare"
    lines.append(_figure("step", _number(values["step_ms"], "ms"), together))
    if values["mfu"] is not None:
        lines.append(_figure("MFU", f"{values['mfu']:.1%}", "roofline / step: of that estimate"))
    squares = ", ".join(values["squares"][:2]) + (", ..." if values["squares"][2:] else "")
    lines.append(_figure("N x N buffers", str(len(values["squares"])), squares))
    once = "a loop that ends when its data say so"
    lines += [_figure("counted once", loop, once) for loop in values["unknown_loops"]]
    return ["Work per chip and run", *lines]


# ------------------------------------------------------------------ what was measured

BUSY = 0.5
"""Load per core above which other work disturbs a measurement."""


def bench_page(results: list[Result], what: str) -> str:
    """All results, one after the other, under what is true of all of them."""
    lines = [f"{what} of {' against '.join(r.name for r in results)}", ""]
    lines += _machine(results[0].machine)
    for result in results:
        if len(results) > 1:
            lines += ["", f"--- {result.name}"]
            if result.machine["platform"] != "cpu":
                text = "both configs are on the chip: its peak memory is that of both"
                lines += _row("NOTE", text)
        lines += ["", "Measured", *_pairs(result.facts), "", *_times(result.timings), ""]
        lines += _after(result)
    return "\n".join(lines)


def comparison(one: Result, other: Result, ratios: Mapping[str, Mapping[str, float]]) -> str:
    """The ratio of two results."""
    rows = [
        f"  {name:<20}{r['median']:>8.3f} x  {r['min']:.3f} to {r['max']:.3f} in one turn"
        + ("; the turns disagree on which is faster" if r["min"] < 1 < r["max"] else "")
        for name, r in ratios.items()
    ]
    names = f"seconds of {other.name} / seconds of {one.name}, an image or a call"
    head = "\n".join(_row("Ratio", names)).lstrip()
    foot = "Above 1, the first is the faster. Below 5 %, repeat it with the two swapped."
    return "\n".join(["", head, *rows, foot])


def _machine(machine: Row) -> list[str]:
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    rows = {
        "device": f"{machine['devices']} x {machine['device']} ({machine['platform']})",
        "host": f"{machine['processor']}, {machine['cores']} cores; {machine['date']}",
        "versions": f"python {machine['python']}, {versions}",
    }
    if machine["xla_flags"]:
        rows["XLA_FLAGS"] = machine["xla_flags"]
    # One core's worth of load is the measurement's own.
    if machine["load"] > 1 + BUSY * machine["cores"]:
        rows["NOTE"] = f"load {machine['load']}: other work runs here; times are too long"
    return _rows(rows.items())


def _row(name: str, text: str) -> list[str]:
    head, margin = f"  {name:<20}", " " * 22
    if len(name) > 19:
        return [head, *wrap(text, WIDTH, initial_indent=margin, subsequent_indent=margin)]
    return wrap(text, WIDTH, initial_indent=head, subsequent_indent=margin) or [head.rstrip()]


def _rows(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [line for name, text in pairs for line in _row(name, text)]


TOGETHER = {
    "network": "tokens depth width heads parameters dtype attention remat scan",
    "system": "size classes words",
    "batch": "accumulate mesh sharding input",
    "solver": "steps guidance given decoded",
    "compiler": "lower_s compile_s planned_gib",
    "source": "records transforms",
    "reading": "threads workers prefetch step_ms",
}
"""Facts that share a row, by the first of them or by what the row is called."""


def _pairs(values: Row) -> list[str]:
    rest, lines = dict(values), []
    # Whatever has no row of its own comes last, so that nothing measured is left out.
    for head, names in TOGETHER.items():
        own = {k: rest.pop(k) for k in names.split() if k in rest}
        first = [text_of(rest.pop(head))] if head in rest else []
        texts = [*first, *(f"{k.replace('_', ' ')} {text_of(v)}" for k, v in own.items())]
        lines += _row(head, "; ".join(texts)) if texts else []
    return lines + _rows((k.replace("_", " "), text_of(v)) for k, v in rest.items())


def text_of(value: object, inside: bool = False) -> str:
    """A plain value for a reader; a list or mapping inside of a mapping stands in brackets."""
    if isinstance(value, Mapping | list | tuple):
        if isinstance(value, Mapping):
            texts = [f"{k} {text_of(v, True)}" for k, v in value.items()]
        else:
            texts = [*map(text_of, value)]
        text = ", ".join(texts) or "none"
        return f"({text})" if inside and not isinstance(value, tuple) else text
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _times(timings: Mapping[str, Timing]) -> list[str]:
    heads = "".join(f"{head:>10}" for head in ("first", "warm-up", "median", "min", "max"))
    lines = [f"  {'seconds of a call':<20}{heads}     calls  images/s"]
    for name, t in timings.items():
        last = t.warmups[-1] if t.warmups else t.first
        shown = (t.first, last, t.median, min(t.repetitions), max(t.repetitions))
        # NaN: there was no such call.
        figures = "".join(f"{'-' if s != s else f'{s:.4g}':>10}" for s in shown)
        calls, rate = f"{len(t.repetitions)} x {t.calls}", f"{t.rate:,.4g}" if t.rate else "-"
        lines.append(f"  {name:<20}{figures}{calls:>10}{rate:>10}")
    return lines


def _after(result: Result) -> list[str]:
    rest = dict(result.after)
    speed, trace, memory = (rest.pop(k, None) for k in ("speed", "trace", "memory"))
    lines = [] if speed is None else _speed(speed, result)
    if memory is not None:
        chip = memory.get("chip_peak_gib")  # CPUs do not count
        device = f"{chip} GiB on a chip" if chip else "not reported by this device"
        host = f"{memory['host_peak_gib']} GiB on the host, in this process"
        lines += _row("peak memory", f"{device}; {host}")
    return lines + _pairs(rest) + ([] if trace is None else _trace(trace))


def _speed(speed: Row, result: Result) -> list[str]:
    timing, chips = next(iter(result.timings.values())), result.machine["chips"]
    rows = {"images/s": f"{timing.rate:,.4g}; {timing.rate / chips:,.4g} per chip ({chips})"}
    ceiling = f"{speed['ceiling_tflops']:.4g} TFLOP/s, measured: {speed['ceiling_of']}"
    if "mfu" not in speed:
        return _rows((rows | {"ceiling": ceiling, "model FLOPs": "not known"}).items())
    work = f"{speed['tflop']:.4g} TFLOP a call and chip, {speed['tflops']:.4g} TFLOP/s"
    rows |= {"model FLOPs": work, "ceiling": ceiling}
    rows["MFU"] = f"{speed['mfu']:.1%} of the measured ceiling"
    if "mfu_datasheet" in speed:
        peak = f"{speed['datasheet_tflops']:.4g} TFLOP/s dense bfloat16, the maker's figure"
        rows[""] = f"{speed['mfu_datasheet']:.1%} of {peak}"
    return _rows(rows.items())


def _trace(trace: Row) -> list[str]:
    total = f"Operations of one call, {trace['operations_ms']:.4g} ms together, from its trace"
    head = f"  {'operation':<34}{'part of the network':<26}{'ms':>10}{'share':>8}{'runs':>7}"
    lines = ["", total, head]
    for row in trace["operations"]:
        figures = f"{row['ms']:>10.4g}{row['share']:>8.1%}{row['count']:>7,.0f}"
        lines.append(f"  {row['name'][:32]:<34}{row['part']:<26}{figures}")
    if trace["parts"]:
        shares = ", ".join(f"{k} {v:.1%}" for k, v in trace["parts"].items())
        lines += ["", *_row("by part", shares)]
        lines += _row("", "(outside the network: codecs, loss, optimizer; sampling: the solver)")
    return lines

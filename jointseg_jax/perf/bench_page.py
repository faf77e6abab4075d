"""Results as a page of text that explains itself."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap
from typing import Any

from jointseg_jax.perf.bench import Result
from jointseg_jax.perf.timing import Timing

WIDTH = 100

BUSY = 0.5
"""Load per core above which other work disturbs a measurement."""


def page(results: list[Result], what: str) -> str:
    """All results, one after the other, under what is true of all of them."""
    lines = [f"{what} of {' against '.join(r.name for r in results)}", ""]
    lines += _machine(results[0].machine)
    for result in results:
        if len(results) > 1:
            lines += ["", f"--- {result.name}"]
            lines += _shared(result.machine)
        lines += ["", "Measured", *_pairs(result.facts), "", *_times(result.timings)]
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


def _machine(found: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    device = f"{found['devices']} x {found['device']}"
    rows = {
        "device": f"{device} ({found['platform']})",
        "host": f"{found['processor']}, {found['cores']} cores; {found['date']}",
        "versions": f"python {found['python']}, {versions}",
    }
    if found["xla_flags"]:
        rows["XLA_FLAGS"] = found["xla_flags"]
    lines = [line for name, text in rows.items() for line in _row(name, text)]
    if found["load"] > 1 + BUSY * found["cores"]:
        lines += _row("NOTE", f"load {found['load']}: other work runs here; times are too long")
    return lines


def _shared(found: Mapping[str, Any]) -> list[str]:
    if found["platform"] == "cpu":
        return []
    return _row("NOTE", "both contenders lie on the chip: its peak memory is that of both")


def _row(name: str, text: str) -> list[str]:
    first, *rest = wrap(text, WIDTH - 22) or [""]
    if len(name) > 19:
        return [f"  {name}", *(" " * 22 + line for line in (first, *rest))]
    return [f"  {name:<20}{first}".rstrip(), *(" " * 22 + line for line in rest)]


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


def _pairs(values: Mapping[str, Any]) -> list[str]:
    rest, lines = dict(values), []
    for head, names in TOGETHER.items():
        own = {k: rest.pop(k) for k in names.split() if k in rest}
        first = [text_of(rest.pop(head))] if head in rest else []
        texts = [*first, *(f"{k.replace('_', ' ')} {text_of(v)}" for k, v in own.items())]
        lines += _row(head, "; ".join(texts)) if texts else []
    return lines + [line for k, v in rest.items() for line in _row(k.replace("_", " "), text_of(v))]


def text_of(value: Any) -> str:
    """A plain value for a reader."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_nested(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _nested(value: Any) -> str:
    text = text_of(value)
    return f"({text})" if isinstance(value, Mapping | list) else text


HEADS = ("first", "warm-up", "median", "min", "max")


def _times(timings: Mapping[str, Timing]) -> list[str]:
    head = f"  {'seconds of a call':<20}" + "".join(f"{h:>10}" for h in HEADS) + "     calls"
    return [head + "  images/s", *(_time(name, timing) for name, timing in timings.items())]


def _time(name: str, timing: Timing) -> str:
    last = timing.warmups[-1] if timing.warmups else timing.first
    shown = (timing.first, last, timing.median, min(timing.repetitions), max(timing.repetitions))
    figures = "".join(f"{_seconds(s):>10}" for s in shown)
    calls = f"{len(timing.repetitions)} x {timing.calls}"
    rate = timing.images / timing.median if timing.images and timing.median else 0.0
    return f"  {name:<20}{figures}{calls:>10}" + (f"{rate:>10,.4g}" if rate else f"{'-':>10}")


def _seconds(seconds: float) -> str:
    return "-" if seconds != seconds else f"{seconds:.4g}"


def _after(result: Result) -> list[str]:
    rest = dict(result.after)
    speed, trace = rest.pop("speed", None), rest.pop("trace", None)
    memory = rest.pop("memory", None)
    lines = [""]
    if speed is not None:
        lines += _speed(speed, result)
    if memory is not None:
        lines += _row("peak memory", _memory(memory))
    lines += _pairs(rest)
    return lines + (_trace(trace) if trace is not None else [])


def _memory(memory: Mapping[str, float]) -> str:
    chip = memory.get("chip_peak_gib")
    device = f"{chip} GiB on a chip" if chip else "not told by this device"
    return f"{device}; {memory['host_peak_gib']} GiB on the host, in this process"


def _speed(speed: Mapping[str, Any], result: Result) -> list[str]:
    timing = result.timings.get("update") or result.timings["sampler"]
    chips = result.machine["chips"]
    rate = timing.images / timing.median
    lines = _row("images/s", f"{rate:,.4g}; {rate / chips:,.4g} per chip ({chips})")
    ceiling = f"{speed['ceiling_tflops']:.4g} TFLOP/s, measured: {speed['ceiling_of']}"
    if "mfu" not in speed:
        return [*lines, *_row("ceiling", ceiling), *_row("model FLOPs", "not known")]
    work = f"{speed['tflop']:.4g} TFLOP a call and chip, {speed['tflops']:.4g} TFLOP/s"
    lines += [*_row("model FLOPs", work), *_row("ceiling", ceiling)]
    lines += _row("MFU", f"{speed['mfu']:.1%} of the measured ceiling")
    if "mfu_datasheet" in speed:
        peak = f"{speed['datasheet_tflops']:.4g} TFLOP/s dense bfloat16, the maker's figure"
        lines += _row("", f"{speed['mfu_datasheet']:.1%} of {peak}")
    return lines


def _trace(trace: Mapping[str, Any]) -> list[str]:
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

"""The machine that figures were taken on: chips, host, versions, how busy it is."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import resource
from pathlib import Path
from typing import Any

import jax

from jointseg_jax.chips import peak_flops

PACKAGES = ("jointseg_jax", "jax", "jaxlib", "libtpu", "flax", "numpy", "scipy", "numba", "grain")


def machine() -> dict[str, Any]:
    """Plain values, as of now."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "chips": chips(),
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chips() -> int:
    """Devices that compute at the same time: all of them, but one processor is one."""
    return 1 if jax.devices()[0].platform == "cpu" else jax.device_count()


def datasheet_flops() -> float | None:
    """The maker's dense bfloat16 FLOP/s of one chip, where it is known."""
    return peak_flops(jax.devices()[0].device_kind)


def memory() -> dict[str, float]:
    """GiB: the most that a chip held so far, and the most that this process did on the host."""
    found = [d.memory_stats() or {} for d in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    unit = 2**10 if platform.system() == "Darwin" else 1  # bytes there, KiB elsewhere
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit / 2**20
    out = {"host_peak_gib": round(host, 3)}
    return out | ({"chip_peak_gib": round(max(peaks) / 2**30, 3)} if peaks else {})


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

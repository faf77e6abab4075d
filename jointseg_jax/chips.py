"""The device a program is made for, and what the TPU generations want.

A program may be lowered for devices that are not there, on a host that has others: the mesh in
force says what it is for, and only without one the process's own devices do.

All generations get 64 MiB of scoped VMEM, so that the compiler fuses more; it takes longer over it.
The flags that fuse all-gathers are left out: libtpu refuses them on v5p and v6e, and on v5e they
are on.

On v5e the compiler cuts products whose kernel is split over 16 chips into steps between permutes
(594 in one block of width 1536 on a 4 x 4 topology); it is told to gather the kernel first.

TPU generations, and the devices of a topology that need not exist.

The figures are the makers' (https://cloud.google.com/tpu/docs): peaks that no program reaches. The
clock turns the compiler's cycles into time; with it, single large products come out at 91 to 98 %
of the peak and plain copies at 72 to 81 % of the bandwidth.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jointseg_jax.types import UserError

GENERATIONS = {
    r"v5 ?lite|v5e": "v5e",
    r"v5": "v5p",
    r"v6": "v6e",
}
"""TPU generations by what their devices call themselves; the first that is found."""

VMEM = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
WHOLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

OPTIONS: dict[str, dict[str, str]] = {"v5e": VMEM | WHOLE, "v5p": VMEM, "v6e": VMEM}
"""XLA's options by generation."""


class Target(NamedTuple):
    """What a program runs on: ``cpu``, ``gpu`` or ``tpu``, and the maker's name of the device."""

    platform: str
    kind: str

    @property
    def generation(self) -> str | None:
        """The TPU generation, where it is one of ``OPTIONS``."""
        return generation(self.kind) if self.platform == "tpu" else None


def generation(kind: str) -> str | None:
    """The TPU generation that a device kind names, or None."""
    return next((name for sign, name in GENERATIONS.items() if re.search(sign, kind)), None)


def target() -> Target:
    """What the program being traced is for."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is not None and device.platform is not None:
        return Target(device.platform, device.device_kind)
    return Target(jax.default_backend(), jax.devices()[0].device_kind)


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """The options for programs on a mesh; None where there is nothing to say."""
    device = mesh.devices.flat[0]
    found = generation(device.device_kind) if device.platform == "tpu" else None
    return dict(OPTIONS[found]) if found else None


# ------------------------------------------------------------- what a chip can do

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}
"""Dense bf16 peak per chip, by the start of the device kind."""


def peak_flops(kind: str) -> float | None:
    """Peak of a device kind, or None where the table knows none (CPU)."""
    found = [v for k, v in sorted(PEAK_FLOPS.items()) if kind.startswith(k)]
    return found[-1] if found else None


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What one chip of a generation can do.

    Attributes:
      hbm: GiB that the compiler lets a program use.
      peak: bfloat16 TFLOP/s.
      bandwidth: GB/s of HBM.
      links: of the interconnect, each ``link`` GB/s in one direction.
      clock: GHz.
      attention: part of the peak that our attention kernel reaches with heads of 64 by the
        compiler's schedule for 2129 tokens (``schedule``).
    """

    hbm: int | float
    peak: int | float
    bandwidth: int | float
    links: int
    link: int | float
    clock: int | float
    attention: int | float

    @property
    def ici(self) -> int | float:
        """GB/s that leave a chip when all its links are busy."""
        return self.links * self.link


CHIPS = {
    "v5e": Chip(hbm=15.75, peak=197, bandwidth=819, links=4, link=45, clock=1.5, attention=0.49),
    "v5p": Chip(hbm=95.73, peak=459, bandwidth=2765, links=6, link=90, clock=1.75, attention=0.5),
    "v6e": Chip(hbm=31.24, peak=918, bandwidth=1638, links=4, link=90, clock=1.75, attention=0.2),
}

EXAMPLES = (
    "v5e:1x1, v5e:2x2, v5e:4x4, v5e:16x16, v5p:2x2x1, v5p:4x4x4, v5p:8x8x8, v5p:16x16x16, v6e:1x1, "
    "v6e:2x2, v6e:16x16"
)

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask what machine this is
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: it only has to be there
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is driven, so several may compile at once
}
"""What libtpu needs to compile without a TPU; set only where the user has not."""


def chip_of(topology: str) -> Chip:
    """The generation that a topology names.

    Raises:
      UserError: it is none that we know.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if found is None or found.group(1) not in CHIPS:
        raise UserError(
            f"ERROR [flags] --topology={topology}: give GENERATION:SHAPE with a generation out of "
            f"{', '.join(CHIPS)}, for example {EXAMPLES}."
        )
    return CHIPS[found.group(1)]


def options_of(topology: str) -> dict[str, str]:
    """The compiler's options that a run on such chips has."""
    chip_of(topology)
    return dict(OPTIONS[topology.split(":")[0]])


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology, good for compiling only.

    Raises:
      UserError: the compiler is not installed, or it knows no such topology.
    """
    chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "ERROR [libtpu] the TPU compiler is not installed; no TPU is needed, but its library "
            "is: pip install 'jointseg_jax[tpu]' (or pip install libtpu)."
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"ERROR [flags] --topology={topology}: the TPU compiler refuses it: "
            f"{str(error).splitlines()[0]}. Known to work: {EXAMPLES}."
        ) from error

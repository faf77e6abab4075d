"""The device a program is made for, what its chips can do, and the compiler's options for them.

A program may be lowered for devices that are not there, on a host that has others: the mesh in
force says what it is for, and only without one the process's own devices do.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from jointseg_jax.types import UserError

VMEM = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
"""64 MiB of scoped VMEM, so that the compiler fuses more; it takes longer over it. The flags that
fuse all-gathers are left out: libtpu refuses them on v5p and v6e, and on v5e they are on."""

WHOLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
"""Kernels are gathered before their product. On v5e the compiler else cuts products whose kernel is
split over 16 chips into steps between permutes (594 in one block of width 1536 on 4 x 4 chips)."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip of a TPU generation.

    Figures are the makers' (https://cloud.google.com/tpu/docs): peaks that no program reaches.
    """

    names: str  # regex of what its devices call themselves; of two chips the first one counts
    kinds: tuple[str, ...]  # starts of the device kinds that have its peak
    hbm: int | float  # GiB that the compiler lets a program use
    peak: int | float  # dense bfloat16 TFLOP/s
    bandwidth: int | float  # GB/s of HBM
    links: int  # of the interconnect
    link: int | float  # GB/s of each, in one direction
    # GHz, which turns the compiler's cycles into time: with it, single large products come out at
    # 91 to 98 % of the peak and plain copies at 72 to 81 % of the bandwidth
    clock: int | float
    # part of the peak that our attention kernel reaches with heads of 64, by the compiler's
    # schedule for 2129 tokens (``perf.schedule``)
    attention: int | float
    options: Mapping[str, str]  # XLA's, for programs on it

    @property
    def ici(self) -> int | float:
        """GB/s that leave a chip when all its links are busy."""
        return self.links * self.link


CHIPS = {
    "v5e": Chip(
        names=r"v5 ?lite|v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        hbm=15.75,
        peak=197,
        bandwidth=819,
        links=4,
        link=45,
        clock=1.5,
        attention=0.49,
        options=VMEM | WHOLE,
    ),
    "v5p": Chip(
        names=r"v5",
        kinds=("TPU v5", "TPU v5p"),
        hbm=95.73,
        peak=459,
        bandwidth=2765,
        links=6,
        link=90,
        clock=1.75,
        attention=0.5,
        options=VMEM,
    ),
    "v6e": Chip(
        names=r"v6",
        kinds=("TPU v6 lite", "TPU v6e"),
        hbm=31.24,
        peak=918,
        bandwidth=1638,
        links=4,
        link=90,
        clock=1.75,
        attention=0.2,
        options=VMEM,
    ),
}
"""The generations that programs can be compiled for without having one."""

OTHER_PEAKS = {"TPU v4": 275, "NVIDIA H100": 989, "NVIDIA H200": 989, "NVIDIA A100": 312}
"""Dense bfloat16 TFLOP/s of further chips, by the start of their device kind."""

_PEAKS = {kind: chip.peak for chip in CHIPS.values() for kind in chip.kinds} | OTHER_PEAKS
PEAK_FLOPS = {kind: 1e12 * peak for kind, peak in _PEAKS.items()}
"""Dense bfloat16 FLOP/s per chip, by the start of the device kind."""


def peak_flops(kind: str) -> float | None:
    """Peak FLOP/s of a device kind, or None where it is unknown (CPU)."""
    found = [v for k, v in sorted(PEAK_FLOPS.items()) if kind.startswith(k)]
    return found[-1] if found else None  # of "TPU v5" and "TPU v5 lite" the longer one


def generation(kind: str) -> str | None:
    """The TPU generation that a device kind names, or None."""
    return next((name for name, chip in CHIPS.items() if re.search(chip.names, kind)), None)


class Target(NamedTuple):
    """What a program runs on."""

    platform: str  # cpu, gpu or tpu
    kind: str  # the maker's name of the device

    @property
    def generation(self) -> str | None:
        """The TPU generation, where it is one of ``CHIPS``."""
        return generation(self.kind) if self.platform == "tpu" else None


def target() -> Target:
    """What the program being traced is for."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is not None and device.platform is not None:
        return Target(device.platform, device.device_kind)
    return Target(jax.default_backend(), jax.devices()[0].device_kind)


def compiler_options(mesh: Mesh, *, convolutions: bool = False) -> dict[str, str] | None:
    """XLA's options for programs on a mesh; None where there are none.

    Args:
      convolutions: whether the program trains convolutions, which some CPU kernels are slow at.
    """
    device = mesh.devices.flat[0]
    found = Target(device.platform, device.device_kind).generation
    if found:
        return dict(CHIPS[found].options)
    if device.platform == "cpu" and convolutions and _known(tuple(CPU_CONVOLUTIONS.items())):
        return dict(CPU_CONVOLUTIONS)
    return None


CPU_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Leaves YNNPACK out: forward and backward of [32, 16, 16, 64] take 32 CPU ms, with it 60."""


@functools.cache
def _known(options: tuple[tuple[str, str], ...]) -> bool:
    """Returns True if this jaxlib has these options: it alone can tell, and they come and go."""
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=dict(options)).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


# ------------------------------------------------------------ devices that need not exist

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
    """The chip of a topology, as ``v5e:4x4``.

    Raises:
      UserError: its generation is unknown.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if found is None or found.group(1) not in CHIPS:
        raise UserError(
            f"ERROR [flags] --topology={topology}: give GENERATION:SHAPE with a generation out of "
            f"{', '.join(CHIPS)}, for example {EXAMPLES}."
        )
    return CHIPS[found.group(1)]


def devices_of(topology: str) -> list[jax.Device]:
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

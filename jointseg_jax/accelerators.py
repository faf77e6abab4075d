"""The device a program is made for, and what the TPU generations want.

A program may be lowered for devices that are not there, on a host that has others: the mesh in
force says what it is for, and only without one the process's own devices do.

All generations get 64 MiB of scoped VMEM, so that the compiler fuses more; it takes longer over it.
The flags that fuse all-gathers are left out: libtpu refuses them on v5p and v6e, and on v5e they
are on.

On v5e the compiler cuts products whose kernel is split over 16 chips into steps between permutes
(594 in one block of width 1536 on a 4 x 4 topology); it is told to gather the kernel first.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
from jax.sharding import Mesh

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

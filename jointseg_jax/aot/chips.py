"""TPU generations, and the devices of a topology that need not exist.

The figures are the makers' (https://cloud.google.com/tpu/docs): peaks that no program reaches. The
clock turns the compiler's cycles into time; with it, single large products come out at 91 to 98 %
of the peak and plain copies at 72 to 81 % of the bandwidth.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from jointseg_jax import accelerators
from jointseg_jax.types import UserError


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
    return dict(accelerators.OPTIONS[topology.split(":")[0]])


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

"""One run as several processes: who they are and where they meet (``distributed``: the rest).

1. Settings, from the first of these that says anything: flags (``--coordinator HOST:PORT
   --num_processes N --process_id I``); a SLURM step; GKE, Cloud TPU and indexed Kubernetes jobs,
   whose details jax finds out by itself. Half-given or contradictory settings are refused.
2. A lone process starts no service: it would cost a second and an open port, and what the service
   gives (SIGTERM as a request to save) ``training.preemption`` does without it. So nothing changes
   on a laptop, in a one-task SLURM job or on one GKE host. A one-host Cloud TPU VM does start it:
   only jax's query of the metadata server tells that it is alone.
3. A process that stops answering counts as dead after ``HEARTBEAT`` seconds, which ends the others.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import logging
import os
import re
from collections.abc import Mapping

from jointseg_jax import distributed
from jointseg_jax.types import UserError

HEARTBEAT = 10
"""Seconds without a sign of life after which a process counts as dead."""

PATIENCE = 300
"""Seconds that processes wait for one another at the start."""

_PORTS = range(61440, 65536)  # above the ports that Linux hands out by itself

log = logging.getLogger("jointseg_jax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What the command line says about processes."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """This process among the others; what is None, jax finds out.

    Args:
      origin: where the settings come from.
      coordinator: HOST:PORT of process 0.
      local_devices: GPUs of this process, where several processes share a host.
    """

    origin: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    local_devices: tuple[int, ...] | None = None


def settings(
    environment: Mapping[str, str], flags: Flags, *, chips: bool = False
) -> Settings | None:
    """Where the processes meet; None for a process that is alone.

    Args:
      chips: whether TPU chips are attached to this machine.

    Raises:
      UserError: settings that are half-given or contradict one another.
    """
    if flags.num_processes == 1 and flags.process_id in (None, 0):
        return None
    slurm = _of_slurm(environment) if "SLURM_PROCID" in environment else None
    if flags != Flags():
        return _of_flags(flags, slurm)
    if "SLURM_PROCID" in environment:
        if slurm is not None and slurm.coordinator is None:
            raise UserError(
                f"ERROR [processes] SLURM: task {slurm.process} of {slurm.processes}, but "
                "SLURM_STEP_NODELIST is not set: this process was not started by srun. Start it "
                "with srun (see launch/pod/slurm.sh), or give --num_processes=1 to run it alone."
            )
        return slurm
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if chips and hosts:
        return _of_gke(environment, hosts.split(","))
    if chips and "TPU_SKIP_MDS_QUERY" not in environment:
        return Settings(origin="Cloud TPU")
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return Settings(origin="Kubernetes")
    return None


def _of_flags(flags: Flags, slurm: Settings | None) -> Settings:
    given = {f"--{k}": v for k, v in dataclasses.asdict(flags).items()}
    missing = [k for k, v in given.items() if v is None]
    if missing:
        said = " ".join(f"{k}={v}" for k, v in given.items() if v is not None)
        raise UserError(
            f"ERROR [processes] {said}: {', '.join(missing)} missing. Several processes need "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I, the first two the same "
            "everywhere; one process needs none of them."
        )
    _require_index(flags.process_id, flags.num_processes, "--process_id", "--num_processes")
    host, _, port = flags.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"ERROR [processes] --coordinator={flags.coordinator}: give HOST:PORT of process 0, "
            "a port that is free there, as node7:12345."
        )
    asked = (flags.num_processes, flags.process_id)
    if slurm is not None and asked != (slurm.processes, slurm.process):
        raise UserError(
            f"ERROR [processes] --num_processes={asked[0]} --process_id={asked[1]} in task "
            f"{slurm.process} of {slurm.processes} of a SLURM step: these contradict each other. "
            "Leave the flags out: SLURM's own settings are enough."
        )
    return Settings(
        origin="flags",
        coordinator=flags.coordinator,
        processes=flags.num_processes,
        process=flags.process_id,
    )


def _of_slurm(environment: Mapping[str, str]) -> Settings | None:
    """Of a task among several; without a coordinator if srun did not start it."""
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    processes, process = _number(environment, count), _number(environment, "SLURM_PROCID")
    _require_index(process, processes, "SLURM_PROCID", count)
    if processes == 1:
        return None
    found = Settings(origin="SLURM", processes=processes, process=process)
    nodes = environment.get("SLURM_STEP_NODELIST")
    if nodes is None:
        return found
    job = _number(environment, "SLURM_JOB_ID") + int(environment.get("SLURM_STEP_ID", 0))
    port = environment.get("JAX_COORDINATOR_PORT", _PORTS[job % len(_PORTS)])
    # as jax, but for one task per node, to which jax would give a single one of its GPUs
    alone = environment.get("SLURM_STEP_NUM_NODES") == str(processes)
    masked = len(environment.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    own = None if alone or masked else (_number(environment, "SLURM_LOCALID"),)
    return dataclasses.replace(found, coordinator=f"{first_host(nodes)}:{port}", local_devices=own)


def _of_gke(environment: Mapping[str, str], hosts: list[str]) -> Settings | None:
    processes = len(hosts) * int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if processes == 1:
        return None
    _require_index(_number(environment, "TPU_WORKER_ID"), len(hosts), "TPU_WORKER_ID", "hosts")
    return Settings(origin="GKE")


def first_host(nodes: str) -> str:
    """The first host of a SLURM list: ``node007`` of ``node[007-012,020],other``."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes).group()
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not text.isdigit():
        said = "is not set" if text is None else f"is {text!r}"
        raise UserError(
            f"ERROR [processes] {name} {said}; it must be a number. Start every process the same "
            "way (see launch/pod/), or give --num_processes=1 to run this one alone."
        )
    return int(text)


def _require_index(index: int, count: int, name: str, of: str) -> None:
    if count < 1 or not 0 <= index < count:
        raise UserError(
            f"ERROR [processes] {name}={index} with {of}={count}: processes count from 0 to "
            f"{of} - 1. Mend one of the two."
        )


def tpu_chips() -> bool:
    """Whether jax would use TPU chips here; looks without importing it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    attached = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(attached) and importlib.util.find_spec("libtpu") is not None


# ------------------------------------------------------------------------ together


def initialise(flags: Flags, *, heartbeat: int = HEARTBEAT, patience: int = PATIENCE) -> None:
    """Joins the other processes of the run, if there are any, before jax looks for devices.

    Raises:
      UserError: the settings are wrong, or the processes do not find one another.
    """
    found = settings(os.environ, flags, chips=tpu_chips())
    if found is None:
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    known = found.coordinator is not None
    where = found.coordinator or "the address that jax found"
    apart = (
        f"ERROR [processes] {found.origin}: the processes did not meet at {where} within "
        f"{patience} s. Start all of them with the same command, check that process 0's host and "
        "port can be reached, or give --num_processes=1 to run one alone."
    )
    distributed.report_if_killed(apart)  # jax aborts when the time is over
    try:
        jax.distributed.initialize(
            found.coordinator,
            found.processes,
            found.process,
            found.local_devices,
            cluster_detection_method="deactivate" if known else None,
            initialization_timeout=patience,
            heartbeat_timeout_seconds=heartbeat,
        )
    except (RuntimeError, ValueError) as error:
        distributed.mark_unconnected()
        raise UserError(f"{apart}\njax says: {str(error).splitlines()[0]}") from error
    distributed.detach()
    _introduce(found)


def _introduce(found: Settings) -> None:
    import jax

    index, count = jax.process_index(), jax.process_count()
    log.info(
        "process %d of %d (%s): %d of %d devices (%s)",
        index,
        count,
        found.origin,
        jax.local_device_count(),
        jax.device_count(),
        jax.devices()[0].device_kind,
    )
    if count > 1:
        distributed.report_if_killed(
            f"process {index} of {count} ended abruptly: it was killed, or it could not go on "
            "because another process of the run died (whose own last lines say why). Run the same "
            "command again on all hosts: it goes on from the newest checkpoint."
        )
    if index:
        log.setLevel(logging.WARNING)  # the rest of the log is the same everywhere

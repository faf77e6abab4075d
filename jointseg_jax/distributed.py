"""One run as several processes: where they meet, what they say to one another, how each ends.

1. Where they meet is read from the first of these that says anything: flags (``--coordinator
   HOST:PORT --num_processes N --process_id I``); a SLURM step; GKE, Cloud TPU and indexed
   Kubernetes jobs, whose details jax finds out by itself. Incomplete or contradictory settings are
   refused. A lone process starts no service and needs none of this.
2. They talk through jax's coordination service, not through the devices: nothing is compiled, any
   length will do, and only the one who asks waits.
3. A process that stops answering counts as dead after ``HEARTBEAT`` seconds, which ends the others.
   A process that fails leaves at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import importlib.util
import itertools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jointseg_jax.types import UserError

HEARTBEAT = 10  # seconds without a sign of life after which a process counts as dead
PATIENCE = 300  # seconds that processes wait for one another at the start
PEER_LOST = 76  # exit status of one that lost another: run the same command again
_PORTS = range(61440, 65536)  # above the ports that Linux hands out by itself
_PARTING = 5  # seconds that a failing process waits for others that fail with it
_BROKEN = ("Gloo", "closed by peer", "Connection reset", "NCCL", "coordination service")

log = logging.getLogger("jointseg_jax")


# ------------------------------------------------------------------------ where they meet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line's settings; all three are given, or none."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """This process among the others; jax finds out what is None."""

    origin: str  # where the settings come from, for messages
    coordinator: str | None = None  # HOST:PORT of process 0
    processes: int | None = None
    process: int | None = None
    local_devices: tuple[int, ...] | None = None  # GPUs of this process, where it shares a host


def settings(
    environment: Mapping[str, str], flags: Flags, *, chips: bool = False
) -> Settings | None:
    """Reads where the processes meet; None for a process that is alone.

    Args:
      chips: whether TPU chips are attached to this machine.

    Raises:
      UserError: settings that are incomplete or contradict one another.
    """
    # The service costs a second and an open port, and training.preemption does without it what it
    # gives (SIGTERM as a request to save): a laptop, a one-task SLURM job and one GKE host start
    # none. Only jax's query of the metadata server tells whether a Cloud TPU VM is alone, so a
    # one-host VM does start it.
    if flags.num_processes == 1 and flags.process_id in (None, 0):
        return None
    slurm = _of_slurm(environment) if "SLURM_PROCID" in environment else None
    if flags != Flags():
        return _of_flags(flags, slurm)
    if "SLURM_PROCID" in environment:
        # the batch script itself has a rank too, and would wait for tasks that srun never started
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
    values = {f"--{k}": v for k, v in dataclasses.asdict(flags).items()}
    if missing := [k for k, v in values.items() if v is None]:
        given = " ".join(f"{k}={v}" for k, v in values.items() if v is not None)
        raise UserError(
            f"ERROR [processes] {given}: {', '.join(missing)} missing. Several processes need "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I, the first two the same "
            "everywhere; one process needs none of them."
        )
    coordinator, processes = flags.coordinator, flags.num_processes
    process = flags.process_id
    _require_index(process, processes, "--process_id", "--num_processes")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"ERROR [processes] --coordinator={coordinator}: give HOST:PORT of process 0, "
            "a port that is free there, as node7:12345."
        )
    if slurm is not None and (processes, process) != (slurm.processes, slurm.process):
        raise UserError(
            f"ERROR [processes] --num_processes={processes} --process_id={process} in task "
            f"{slurm.process} of {slurm.processes} of a SLURM step: these contradict each other. "
            "Leave the flags out: SLURM's own settings are enough."
        )
    return Settings(origin="flags", coordinator=coordinator, processes=processes, process=process)


def _of_slurm(environment: Mapping[str, str]) -> Settings | None:
    """Settings of a task among several; without a coordinator if srun did not start it."""
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    processes, process = _number(environment, count), _number(environment, "SLURM_PROCID")
    _require_index(process, processes, "SLURM_PROCID", count)
    if processes == 1:
        return None
    found = Settings(origin="SLURM", processes=processes, process=process)
    nodes = environment.get("SLURM_STEP_NODELIST")
    if nodes is None:
        return found
    # every task must come to the same port by itself; two steps on a node must not share one
    job = _number(environment, "SLURM_JOB_ID") + int(environment.get("SLURM_STEP_ID", 0))
    port = environment.get("JAX_COORDINATOR_PORT", _PORTS[job % len(_PORTS)])
    # As jax decides, except for one task per node: jax would give that task only one of its GPUs.
    # A task that sees a single GPU is masked already; its own index there is 0.
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
    # a comma within brackets does not end the first entry
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    assert first is not None  # the pattern also matches nothing at all
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not text.isdigit():
        state = "is not set" if text is None else f"is {text!r}"
        raise UserError(
            f"ERROR [processes] {name} {state}; it must be a number. Start every process the same "
            "way (see launch/pod/), or give --num_processes=1 to run this one alone."
        )
    return int(text)


def _require_index(index: int, count: int, name: str, of: str) -> None:
    if count < 1 or not 0 <= index < count:
        raise UserError(
            f"ERROR [processes] {name}={index} with {of}={count}: processes count from 0 to "
            f"{of} - 1. Fix one of the two."
        )


def tpu_chips() -> bool:
    """Returns True if jax would use TPU chips here; finds out without importing it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    attached = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(attached) and importlib.util.find_spec("libtpu") is not None


def initialise(flags: Flags, *, heartbeat: int = HEARTBEAT, patience: int = PATIENCE) -> None:
    """Joins the other processes of the run, if there are any, before jax looks for devices.

    Raises:
      UserError: the settings are wrong, or the processes do not find one another.
    """
    found = settings(os.environ, flags, chips=tpu_chips())
    if found is None:
        return
    import jax  # late: a lone process that only prints its help need not load it

    # what CPU processes (the tests) exchange arrays with; GPUs and TPUs have their own
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = found.coordinator or "the address that jax found"
    failure = (
        f"ERROR [processes] {found.origin}: the processes did not meet at {where} within "
        f"{patience} s. Start all of them with the same command, check that process 0's host and "
        "port can be reached, or give --num_processes=1 to run one alone."
    )
    report_if_killed(failure)  # when the time is over, jax aborts in C++: nothing to catch
    try:
        jax.distributed.initialize(
            found.coordinator,
            found.processes,
            found.process,
            found.local_devices,
            # detection would overrule what was given with what it finds in the environment
            cluster_detection_method="deactivate" if found.coordinator else None,
            initialization_timeout=patience,
            heartbeat_timeout_seconds=heartbeat,
        )
    except (RuntimeError, ValueError) as error:
        _run.unconnected = True
        raise UserError(f"{failure}\njax says: {str(error).splitlines()[0]}") from error
    detach()
    _introduce(found)


def _introduce(found: Settings) -> None:
    """Logs who this process is; the others of a run log only warnings from then on."""
    import jax

    index, count = jax.process_index(), jax.process_count()
    devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
    kind = jax.devices()[0].device_kind
    log.info(f"process {index} of {count} ({found.origin}): {devices} ({kind})")
    if count > 1:
        report_if_killed(
            f"process {index} of {count} ended abruptly: it was killed, or it could not go on "
            "because another process of the run died (whose own last lines say why). Run the same "
            "command again on all hosts: it goes on from the newest checkpoint."
        )
    if index:
        log.setLevel(logging.WARNING)  # the rest of the log is the same everywhere


# ------------------------------------------------------------------------ what they say


def report_if_killed(text: str) -> None:
    """Starts a shell that prints the text if this process ends without ``detach``.

    When a process of the run dies, jax aborts the others from C++, where no Python handler, atexit
    or excepthook runs: something outside has to say why they ended.
    """
    # `read` returns when our end of the pipe closes, which the kernel does however we end; it
    # succeeds only if a line came, which is what detach() writes. Ctrl-C and SIGTERM reach the
    # whole process group, so the shell ignores them and stands in a session of its own.
    script = 'trap "" HUP INT TERM; read -r word || echo "$1" >&2'
    shell = ["/bin/sh", "-c", script, "sh", text]
    _run.reporter = subprocess.Popen(shell, stdin=subprocess.PIPE, start_new_session=True)


def detach() -> None:
    """Ends the shell of ``report_if_killed`` silently: this process ends of its own accord."""
    if _run.reporter is not None:
        with contextlib.suppress(BrokenPipeError):
            _run.reporter.communicate(b"done\n")
        _run.reporter = None


def several() -> bool:
    """Returns True if this run has other processes; does not start jax."""
    return not _run.unconnected and _client() is not None and _state().num_processes > 1


def is_first() -> bool:
    """Returns True if this process prints and writes for the run; does not start jax."""
    return not several() or _state().process_id == 0


def leave(status: int) -> None:
    """Ends this process at once if it is one of several; does nothing in a lone process.

    In the service's orderly shutdown it would wait minutes for the others, and they for it.
    """
    if not several() and not _run.unconnected:
        return
    # Processes that fail together (the same bad config) meet here, so that none of them is reported
    # as killed by the exit of another; one that does not come within _PARTING is left behind.
    with contextlib.suppress(Exception):
        if several():
            _client().wait_at_barrier("jointseg_jax/leave", 1000 * _PARTING)
    detach()
    sys.stdout.flush()
    sys.stderr.flush()
    # sys.exit would run jax's atexit handler, which is the orderly shutdown
    os._exit(status)


def first_to_report(text: str) -> bool:
    """Returns True on one process only, of all that report the same text."""
    if not several():
        return True
    name = hashlib.sha256(text.encode()).hexdigest()
    try:
        _client().key_value_set(f"jointseg_jax/said/{name}", "", allow_overwrite=False)
    except Exception as error:  # the service is gone: twice is better than not at all
        return "ALREADY_EXISTS" not in str(error)
    return True


def lost_peer(error: BaseException) -> bool:
    """Returns True if an error means that another process of the run is gone."""
    return several() and any(word in str(error) for word in _BROKEN)


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order, on the first; an empty list on the others."""
    if not several():
        return [text]
    key, state = f"jointseg_jax/gather/{next(_run.calls)}", _state()
    if state.process_id:
        _client().key_value_set(f"{key}/{state.process_id}", text)
        return []
    others = [_awaited(f"{key}/{i}", f"process {i}") for i in range(1, state.num_processes)]
    _client().key_value_delete(key)
    return [text, *others]


def share(text: str) -> str:
    """The first process's text, on all of them."""
    if not several():
        return text
    key = f"jointseg_jax/share/{next(_run.calls)}"
    if is_first():
        _client().key_value_set(key, text)
        return text
    return _awaited(key, "process 0")


def from_first(action: Callable[[], str]) -> str:
    """Runs the action on the first process only; every process returns its text.

    Raises:
      UserError: on every process, where the action raised one.
    """
    if not is_first():
        kind, _, text = share("").partition(" ")
        if kind == "mistake":
            raise UserError(text)
        return text
    try:
        text = action()
    except UserError as error:
        share(f"mistake {error}")
        raise
    share(f"result {text}")
    return text


def _awaited(key: str, who: str, seconds: int = 60) -> str:
    """Waits for a text that another process will set."""
    while True:  # without end: if the other process dies, the heartbeat ends this one
        try:
            return _client().blocking_key_value_get(key, 1000 * seconds)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            log.warning("waiting for %s", who)


@dataclasses.dataclass
class _Run:
    """What a process keeps of its part in the run."""

    unconnected: bool = False  # the other processes were not found: nothing is sent to them
    reporter: subprocess.Popen[bytes] | None = None
    # every process calls gather and share in the same order: the n-th calls belong together
    calls: Iterator[int] = dataclasses.field(default_factory=itertools.count)


_run = _Run()


def _client() -> Any:
    """The coordination service's client, None in a lone process."""
    # a process that has not imported jax has no service, and asking must not import it
    return _state().client if "jax" in sys.modules else None


def _state() -> Any:
    """jax's record of its processes; there is no public name for it."""
    from jax._src import distributed

    return distributed.global_state

"""What the processes of a run say to one another, and how each ends; nothing in a lone process.

1. Words travel through jax's coordination service, not the devices: no compilation, any length, and
   nobody has to wait but the one who asks. Who dies is noticed by the service's heartbeat, after
   which jax aborts the others in C++, where Python cannot say a word: a shell that waits for this
   process speaks for it.
2. A mistake that every process finds is told once.
3. A process that fails leaves at once: in the service's orderly shutdown it would wait minutes for
   the others, and they for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from jointseg_jax.types import UserError

PEER_LOST = 76
"""Exit status of a process that could not go on without another: run the same command again."""

_PARTING = 5
_BROKEN = ("Gloo", "closed by peer", "Connection reset", "NCCL", "coordination service")

log = logging.getLogger("jointseg_jax")


def report_if_killed(text: str) -> None:
    """Starts a shell that prints the text if this process ends without ``detach``."""
    script = 'trap "" HUP INT TERM; read -r word || echo "$1" >&2'
    shell = ["/bin/sh", "-c", script, "sh", text]
    _run.spokesman = subprocess.Popen(shell, stdin=subprocess.PIPE, start_new_session=True)


def detach() -> None:
    """Tells the shell of ``initialise`` that this process ends of its own accord."""
    if _run.spokesman is not None:
        with contextlib.suppress(BrokenPipeError):
            _run.spokesman.communicate(b"done\n")
        _run.spokesman = None


def several() -> bool:
    """Whether this run has other processes; does not start jax."""
    return not _run.apart and _client() is not None and _state().num_processes > 1


def is_first() -> bool:
    """Whether this process speaks and writes for the run; does not start jax."""
    return not several() or _state().process_id == 0


def leave(status: int) -> None:
    """Ends a process of several at once, those that also leave now together; else does nothing."""
    if not several() and not _run.apart:
        return
    with contextlib.suppress(Exception):  # whoever does not come is not waited for
        if several():
            _client().wait_at_barrier("jointseg_jax/leave", 1000 * _PARTING)
    detach()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def first_to_report(text: str) -> bool:
    """Whether no other process has asked this about the same text."""
    if not several():
        return True
    name = hashlib.sha256(text.encode()).hexdigest()
    try:
        _client().key_value_set(f"jointseg_jax/said/{name}", "", allow_overwrite=False)
    except Exception as error:  # rather twice than not at all
        return "ALREADY_EXISTS" not in str(error)
    return True


def lost_peer(error: BaseException) -> bool:
    """Whether an error means that another process of the run is gone."""
    return several() and any(word in str(error) for word in _BROKEN)


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order, on the first; an empty list on the others."""
    if not several():
        return [text]
    key, state = f"jointseg_jax/gather/{next(_run.gathered)}", _state()
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
    key = f"jointseg_jax/share/{next(_run.shared)}"
    if is_first():
        _client().key_value_set(key, text)
        return text
    return _awaited(key, "process 0")


def from_first(action: Callable[[], str]) -> str:
    """What the action returns on the first process, which alone runs it; its mistakes are all's."""
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
    """A text that another process will leave; should it die, the heartbeat ends the waiting."""
    while True:
        try:
            return _client().blocking_key_value_get(key, 1000 * seconds)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            log.warning("waiting for %s", who)


@dataclasses.dataclass
class _Run:
    """What a process keeps of its part in the run; ``apart`` if it never met the others."""

    apart: bool = False

    spokesman: subprocess.Popen | None = None
    gathered: Any = dataclasses.field(default_factory=itertools.count)
    shared: Any = dataclasses.field(default_factory=itertools.count)


_run = _Run()


def mark_unconnected() -> None:
    """Notes that the others were not found: nothing more is said to them."""
    _run.apart = True


def _client() -> Any:
    """The coordination service's client, None in a lone process."""
    return _state().client if "jax" in sys.modules else None


def _state() -> Any:
    """What jax knows of its processes; there is no public name for it."""
    from jax._src import distributed

    return distributed.global_state

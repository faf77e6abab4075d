"""One run per workdir: a lock file with host, process and time.

1. Taken: the file ``.lock`` is written under an exclusive ``flock``, so that two launches on one
   host cannot both find it free. While the run lives, its time stamp is renewed every few seconds.
2. Found: on the same host the process id and its start time tell whether the owner lives. On
   another host the file is watched for a while: if its time stamp moves, the owner lives.
3. A dead owner's lock is taken over, with a note in the log. A living owner's is refused.

The time stamp is compared with itself only: clocks of different hosts do not matter.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jointseg_jax import distributed
from jointseg_jax.types import UserError

BEAT = 5.0
"""Seconds between two renewals of the time stamp."""

PATIENCE = 16.0
"""Seconds another host's lock is watched before it counts as left behind."""

log = logging.getLogger(__name__)


class WorkdirLock:
    """A context manager that holds the workdir.

    Args:
      workdir: created if absent. A remote folder (``gs://``) cannot be locked: a note says so.
      primary: whether this process holds it for all; by default the first one.

    Raises:
      UserError: on entering, if another run holds the workdir or it cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike, *, primary: bool | None = None):
        self._workdir = os.fspath(workdir)
        self._primary = primary
        self.path = Path(workdir) / ".lock"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> WorkdirLock:
        if self._primary is None:
            distributed.from_first(self._hold)
        elif self._primary:
            self._hold()
        return self

    def _hold(self) -> str:
        if "://" in self._workdir:
            log.warning("lock: %s is remote; two runs in it would not be noticed.", self._workdir)
            return ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            raise UserError(
                f"workdir {self._workdir}: cannot be written ({error.strerror or error}). "
                "Choose another --workdir, or mend its permissions."
            ) from error
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="workdir-lock", daemon=True)
        self._thread.start()
        return ""

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        with contextlib.suppress(OSError), self._opened() as file:
            if _same(_owner(file), _self()):
                self.path.unlink()

    def _acquire(self) -> None:
        seen = None
        while True:
            with self._opened() as file:
                owner = _owner(file)
                stamp = os.fstat(file.fileno()).st_mtime_ns
                if owner is None or seen == (owner, stamp) or _is_dead(owner):
                    self._take(file, owner)
                    return
                if seen is not None or _is_here(owner):
                    raise UserError(self._refusal(owner))
                seen = (owner, stamp)
            log.warning(
                "lock: %s is held by host %s; watching it for %.0f s.",
                self._workdir,
                owner["host"],
                PATIENCE,
            )
            time.sleep(PATIENCE)

    def _take(self, file: Any, owner: dict[str, Any] | None) -> None:
        if owner is not None:
            log.warning("lock: %s: taken over; %s is gone.", self._workdir, _name(owner))
        file.seek(0)
        file.truncate()
        json.dump(_self() | {"since": time.strftime("%Y-%m-%d %H:%M:%S %z")}, file)
        file.flush()

    def _refusal(self, owner: dict[str, Any]) -> str:
        return (
            f"workdir {self._workdir}: in use by {_name(owner)}. Wait for it, stop it, or choose "
            f"another --workdir. If that run is surely gone, remove {self.path}."
        )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        """The lock file under an exclusive ``flock``; opened anew if it was just unlinked."""
        while True:
            with self.path.open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                try:
                    same = os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
                except FileNotFoundError:
                    same = False
                if same:
                    yield file
                    return

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _self() -> dict[str, Any]:
    pid = os.getpid()
    try:
        space = os.readlink("/proc/self/ns/pid")  # containers count processes apart
    except OSError:
        space = ""
    return {"host": socket.gethostname(), "space": space, "pid": pid, "start": _start_time(pid)}


def _same(owner: dict[str, Any] | None, other: dict[str, Any]) -> bool:
    return owner is not None and all(owner[key] == value for key, value in other.items())


def _owner(file: Any) -> dict[str, Any] | None:
    """Who wrote the file; None for an empty or garbled one, which a killed launch leaves."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return {key: owner[key] for key in ("host", "space", "pid", "start", "since")}
    except (ValueError, KeyError, TypeError):
        return None


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"


def _is_here(owner: dict[str, Any]) -> bool:
    own = _self()
    return (owner["host"], owner["space"]) == (own["host"], own["space"])


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner is a process of this host that no longer runs."""
    if not _is_here(owner):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _start_time(owner["pid"]) != owner["start"]


def _start_time(pid: int) -> str | None:
    """When a process began, in ticks since boot: tells a re-used process id from the old one.

    None for a zombie, and everywhere without /proc, where the process id alone decides.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]

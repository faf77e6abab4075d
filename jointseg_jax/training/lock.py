"""One run per workdir: a lock file with host, process and time.

The file ``.lock`` is written under an exclusive ``flock``, so that two launches on one host cannot
both find it free, and its time stamp is renewed while the run lives. An owner on the same host is
looked up by process id and start time; that of another host lives if the stamp moves, which is
compared with itself only. A dead owner's lock is taken over, a living one's refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jointseg_jax import distributed
from jointseg_jax.types import UserError

BEAT = 5.0  # seconds between two renewals of the time stamp
PATIENCE = 16.0  # seconds another host's lock is watched before it counts as left behind
log = logging.getLogger(__name__)

Process = Mapping[str, Any]
"""What tells a process from any other: host, space (the namespace of process ids, for containers on
one host count processes apart), pid and start. That of an owner, in the file, has ``since`` too."""


class WorkdirLock:
    """A context manager that holds the workdir.

    Args:
      workdir: created if absent. A remote folder (``gs://``) cannot be locked: a note says so.
      primary: True if this process holds it for all; by default the first one does.

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
                "Choose another --workdir, or fix its permissions."
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
        me = _self()
        with contextlib.suppress(OSError), self._opened() as file:
            owner = _owner(file)
            if owner is not None and all(owner.get(k) == v for k, v in me.items() if k != "since"):
                self.path.unlink()

    def _acquire(self) -> None:
        seen = None
        while True:
            with self._opened() as file:
                owner = _owner(file)
                stamp = os.fstat(file.fileno()).st_mtime_ns
                # a stamp that did not move in PATIENCE seconds: its owner on another host is gone
                if owner is None or seen == (owner, stamp) or _is_dead(owner):
                    self._take(file, owner)
                    return
                if seen is not None or _is_here(owner):
                    raise UserError(
                        f"workdir {self._workdir}: in use by {_name(owner)}. Wait for it, stop it, "
                        f"or choose another --workdir. If that run is surely gone, remove "
                        f"{self.path}."
                    )
                seen = (owner, stamp)
            held = "lock: %s is held by host %s; watching it for %.0f s."
            log.warning(held, self._workdir, owner["host"], PATIENCE)
            time.sleep(PATIENCE)  # without the flock: the owner must be able to leave

    def _take(self, file: io.TextIOWrapper, owner: Process | None) -> None:
        if owner is not None:
            log.warning("lock: %s: taken over; %s is gone.", self._workdir, _name(owner))
        file.seek(0)
        file.truncate()
        json.dump({**_self(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}, file)
        file.flush()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[io.TextIOWrapper]:
        """The lock file under an exclusive ``flock``."""
        while True:
            with self.path.open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # While this process waited for the flock, the holder may have unlinked the file:
                # two processes would then hold locks on two files of one name. Open it again.
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
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return {"host": socket.gethostname(), "space": space, "pid": pid, "start": _start_time(pid)}


def _owner(file: io.TextIOWrapper) -> Process | None:
    """Who wrote the file; None for an empty or garbled one, which a killed launch leaves."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return {key: owner[key] for key in ("host", "space", "pid", "start", "since")}
    except (ValueError, KeyError, TypeError):
        return None


def _name(owner: Process) -> str:
    return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"


def _is_here(owner: Process) -> bool:
    own = _self()
    return (owner["host"], owner["space"]) == (own["host"], own["space"])


def _is_dead(owner: Process) -> bool:
    """Returns True if the owner was a process of this host and no longer runs."""
    if not _is_here(owner):
        return False
    try:
        os.kill(owner["pid"], 0)  # sends nothing, only looks the process up
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's process: it lives
        return False
    # the id may have gone to another process since
    return _start_time(owner["pid"]) != owner["start"]


def _start_time(pid: int) -> str | None:
    """When a process began, in ticks since boot: tells a re-used process id from the old one.

    None for a zombie, and everywhere without /proc, where the process id alone decides.
    """
    try:
        # the program's name, in parentheses, may itself hold blanks and parentheses
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]

"""Notices that a run has come to a standstill, which no exception ever tells.

A thread looks at when the loop last said that it lives. After ``seconds`` without that it logs one
line, with what the loop was doing and the last step, and writes the stack of every thread to a
file; then again after as long. A reader that hangs shows as ``waiting for data``, a peer or a
device that does as ``step``.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jointseg_jax import distributed
from jointseg_jax.config import WatchdogConfig

log = logging.getLogger("jointseg_jax")


class Watchdog:
    """A context manager; inside it, say ``alive(step)`` once per step.

    Args:
      config: after how long a silence, and if the process then ends (``distributed.PEER_LOST``),
        so that whoever started the run can start it again.
      stacks: file for the stacks.
      doing: says in a word what the loop does at the moment.
    """

    def __init__(
        self, config: WatchdogConfig, *, stacks: Path, doing: Callable[[], str] = lambda: "start"
    ):
        self._seconds, self._abort = config.seconds, config.abort
        self._stacks, self.doing = stacks, doing
        self._step: int | None = None
        self._last = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        if self._seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def alive(self, step: int) -> None:
        """Notes that the loop has come to a step."""
        self._step, self._last = step, time.monotonic()

    def _watch(self) -> None:
        told = 0.0
        while not self._stop.wait(min(self._seconds / 4, 5.0)):
            since = max(self._last, told)
            if time.monotonic() - since >= self._seconds:
                self._tell(time.monotonic() - self._last)
                told = time.monotonic()

    def _tell(self, silence: float) -> None:
        last = "no step yet" if self._step is None else f"last step {self._step}"
        doing = self.doing()
        doing = "waiting for data" if doing == "data" else doing
        then = "; leaving: the same command goes on" if self._abort else ""
        silent = f"watchdog: no step for {silence:.0f} s ({doing}); {last}"
        log.error(f"{silent}; stacks in {self._dumped()}{then}")
        if self._abort:
            distributed.leave(distributed.PEER_LOST)
            os._exit(distributed.PEER_LOST)

    def _dumped(self) -> str:
        try:
            with self._stacks.open("a") as file:
                file.write(time.strftime("\n%Y-%m-%d %H:%M:%S\n"))
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            return f"no file ({error.strerror})"
        return str(self._stacks)

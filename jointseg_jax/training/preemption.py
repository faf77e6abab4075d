"""SIGTERM and Ctrl-C as a request to save and leave, the same step on every process.

In one process a signal sets a flag, which ``requested`` returns; a second signal ends the process
at once with status 128 + signal. Of several, the preemption service of ``jax.distributed`` catches
SIGTERM on any host and agrees on a step at which ``requested`` returns True on all of them.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from jointseg_jax import distributed

_STOP = b"\0"

STOPPED = 75  # exit status after a stop on request: run the same command again


class Preemption:
    """A context manager; inside it, ask ``requested(step)`` once per step.

    Use it in the main thread only: Python sets signal handlers nowhere else.
    """

    def __init__(self) -> None:
        self._flag = threading.Event()

    def __enter__(self) -> Preemption:
        self._shared = jax.distributed.is_initialized()
        self._signals = self._caught()
        # Python handlers do not run while the main thread compiles or waits in C++. The wakeup fd
        # gets the number of each signal at once, from C, and a thread of our own reads it.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, _noted) for number in self._signals}
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self._shared:  # nobody asks the service any more, which would swallow a SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(self._old_fd)
        self._writer.send(_STOP)
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _caught(self) -> tuple[signal.Signals, ...]:
        # the service's own SIGTERM handler must stay: with it a signal to one host reaches all
        return (signal.SIGINT,) if self._shared else (signal.SIGTERM, signal.SIGINT)

    def requested(self, step: int) -> bool:
        """Returns True if the run is to save at this step and leave; the same on every process."""
        if self._shared:  # talks to the others: every process must ask, at every step
            return multihost_utils.reached_preemption_sync_point(step)
        return self._flag.is_set()

    def _watch(self) -> None:
        while (number := self._reader.recv(1)) != _STOP:
            if number[0] in self._signals:
                self._note(signal.Signals(number[0]))

    def _note(self, number: signal.Signals) -> None:
        if self._flag.is_set():
            _say(f"second {number.name}: leaving at once, without saving.")
            os._exit(128 + number)
        self._flag.set()
        _say(f"{number.name}: saving and leaving after this step (once more: leave at once).")
        if self._shared:  # Ctrl-C on one host becomes the service's SIGTERM, which reaches all
            os.kill(os.getpid(), signal.SIGTERM)


class ExitOnSigterm(Preemption):
    """SIGTERM where nothing has to be saved: a line, and status ``STOPPED`` at once.

    For evaluation, sampling and encoding, whose files appear whole, one by one.
    """

    def _caught(self) -> tuple[signal.Signals, ...]:
        return (signal.SIGTERM,)

    def _note(self, number: signal.Signals) -> None:
        _say(f"{number.name}: stopped on request; the same command goes on.")
        distributed.leave(STOPPED)
        os._exit(STOPPED)


def _noted(_number: int, _frame: FrameType | None) -> None:
    """Takes the place of the default handler; the signal itself arrives through the wakeup fd."""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

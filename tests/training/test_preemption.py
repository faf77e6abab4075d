"""A signal asks, a second one insists, and the old handlers come back."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from jointseg_jax.training.preemption import Preemption


def start(body, **options):
    script = """
        import sys, time
        from jointseg_jax.training.preemption import Preemption
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script) + textwrap.dedent(body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
        **options,
    )


def ready(child):
    assert child.stdout.readline() == "ready\n", child.stderr.read()


LOOP = """
    with Preemption() as preemption:
        print("ready", flush=True)
        step = 0
        while not preemption.requested(step):
            step += 1
            time.sleep(0.01)
    print("saved", flush=True)
"""


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_loop_after_the_step(number):
    child = start(LOOP)
    ready(child)
    sent = time.monotonic()
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert (out, child.returncode) == ("saved\n", 0)
    assert number.name in err and "once more" in err and "Traceback" not in err
    assert time.monotonic() - sent < 5  # F3: at most 5 s plus the write


def test_a_second_signal_leaves_at_once_even_from_c():
    """The main thread sits in one C call, as in a compilation: no Python handler can run."""
    child = start(
        """
        import hashlib
        with Preemption():
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in one call without the GIL
        """
    )
    ready(child)
    child.send_signal(signal.SIGTERM)
    assert "saving and leaving" in child.stderr.readline()
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 128 + signal.SIGTERM and "second SIGTERM" in err


def test_old_handlers_return_and_the_flag_starts_clear():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    for _ in range(2):
        with Preemption() as preemption:
            assert not preemption.requested(0)
            os.kill(os.getpid(), signal.SIGTERM)
            end = time.monotonic() + 10
            while not preemption.requested(1) and time.monotonic() < end:
                time.sleep(0.001)
            assert preemption.requested(1)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(fd) == fd


SHARED = """
    import jax
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
    with Preemption() as preemption:
        print("ready", flush=True)
        step = 0
        while not preemption.requested(step):
            step += 1
            time.sleep(0.02)
    print(step, flush=True)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    body = SHARED.replace("sys.argv[1]", repr(port))
    children = [start(body.replace("sys.argv[2]", str(rank))) for rank in range(2)]
    for child in children:
        ready(child)
    children[1].send_signal(number)
    outs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], outs
    steps = [int(out) for out, _ in outs]
    assert steps[0] == steps[1] > 0

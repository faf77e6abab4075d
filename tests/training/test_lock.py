"""Two runs never share a workdir; a dead run's lock does not bar the next."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from jointseg_jax.training import lock
from jointseg_jax.training.lock import WorkdirLock
from jointseg_jax.types import UserError

HOLD = """
import sys, time
from jointseg_jax.training.lock import WorkdirLock
with WorkdirLock(sys.argv[1], primary=True):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_second_run_is_refused_and_a_killed_one_taken_over(tmp_path, holder, caplog):  # F20
    with pytest.raises(UserError) as error, WorkdirLock(tmp_path):
        pass
    text = str(error.value)
    assert f"process {holder.pid} on {socket.gethostname()}, since 20" in text
    assert "another --workdir" in text and str(tmp_path / ".lock") in text
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with WorkdirLock(tmp_path):
        assert f"taken over; process {holder.pid}" in caplog.text
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_a_killed_owner_that_nobody_waited_for_is_dead_too(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # now a zombie
    with WorkdirLock(tmp_path):
        pass


def test_a_reused_process_id_is_not_the_owner(tmp_path):
    owner = lock._self() | {"start": "1", "since": "2026-01-01"}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    with WorkdirLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["start"] != "1"


@pytest.mark.parametrize("text", ["", "garbage", "[]", "{}"])
def test_an_empty_or_garbled_lock_is_free(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with WorkdirLock(tmp_path / "."):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_another_host_is_watched(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    path = tmp_path / ".lock"
    away = lock._self() | {"host": "elsewhere", "pid": 1, "since": "2026-01-01"}
    path.write_text(json.dumps(away))
    beating = threading.Event()

    def beat():
        while not beating.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 1 on elsewhere"), WorkdirLock(tmp_path):
            pass
    finally:
        beating.set()
        thread.join()
    assert "watching it" in caplog.text
    with WorkdirLock(tmp_path):  # the time stamp stands still now
        assert "taken over; process 1 on elsewhere" in caplog.text


def test_the_time_stamp_is_renewed_while_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with WorkdirLock(tmp_path) as held:
        os.utime(held.path, (0, 0))
        for _ in range(1000):
            if held.path.stat().st_mtime > 0:
                break
            threading.Event().wait(0.01)
        assert held.path.stat().st_mtime > 0


@pytest.mark.thorough
def test_only_one_of_many_launches_wins(tmp_path):
    """Processes that find the same stale lock at the same moment."""
    stale = lock._self() | {"pid": 2**22 + 1, "since": "2026-01-01"}
    (tmp_path / ".lock").write_text(json.dumps(stale))
    script = HOLD.replace("time.sleep(600)", "sys.stdin.read()")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "XLA_FLAGS": ""},
        )
        for _ in range(3)
    ]
    said = [child.stdout.readline() for child in children]  # a refused one says nothing
    for child in children:
        child.communicate()
    assert sorted(said) == ["", "", "held\n"]


def test_other_processes_of_the_run_and_unwritable_folders(tmp_path):  # F10
    with WorkdirLock(tmp_path, primary=False):
        assert not (tmp_path / ".lock").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), WorkdirLock(tmp_path / "file" / "w"):
        pass

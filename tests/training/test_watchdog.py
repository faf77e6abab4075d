"""A run that stands still says so: what it waits for, since when, and where every thread is."""

import logging
import os
import subprocess
import sys
import textwrap
import time
import types

import pytest

from jointseg_jax.config import WatchdogConfig
from jointseg_jax.training import watchdog as watchdogs
from jointseg_jax.training.watchdog import Watchdog
from jointseg_jax.types import UserError


def test_silence_is_told_once_for_each_span_of_it(tmp_path, caplog):
    stacks = tmp_path / "stacks.txt"
    with Watchdog(WatchdogConfig(seconds=0.1), stacks=stacks) as watchdog:
        watchdog.alive(7)
        watchdog.doing = lambda: "data"
        deadline = time.monotonic() + 20
        while len(caplog.messages) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    first = caplog.messages[0]
    assert first.startswith("watchdog: no step for 0 s (waiting for data); last step 7; stacks in")
    assert first.endswith(str(stacks)) and caplog.records[0].levelno == logging.ERROR
    assert "test_silence_is_told_once_for_each_span_of_it" in stacks.read_text()


def test_a_run_that_lives_is_left_alone(tmp_path, caplog, monkeypatch):
    clock = types.SimpleNamespace(now=0.0)  # the test's, for a busy machine may lose a second
    monkeypatch.setattr(
        watchdogs, "time", types.SimpleNamespace(monotonic=lambda: clock.now, strftime=str)
    )
    with Watchdog(WatchdogConfig(seconds=0.02), stacks=tmp_path / "stacks.txt") as watchdog:
        for step in range(20):
            clock.now += 0.015
            watchdog.alive(step)
            time.sleep(0.01)
    assert caplog.messages == [] and list(tmp_path.iterdir()) == []


def test_zero_seconds_is_nobody(tmp_path, caplog):
    with Watchdog(WatchdogConfig(seconds=0), stacks=tmp_path / "stacks.txt") as watchdog:
        time.sleep(0.05)
        watchdog.alive(1)
    assert caplog.messages == []


def test_a_place_for_stacks_that_is_none_does_not_silence_it(tmp_path, caplog):
    with Watchdog(WatchdogConfig(seconds=0.05), stacks=tmp_path / "nowhere" / "stacks.txt"):
        deadline = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "no step yet; stacks in no file (No such file or directory)" in caplog.messages[0]


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_spans_that_are_none(seconds):
    with pytest.raises(UserError, match=r"config.watchdog: seconds = .* must be 0 \(off\) or more"):
        WatchdogConfig(seconds=seconds)


HANGING = """
    import sys, time
    from pathlib import Path
    from ml_collections import ConfigDict
    sys.path.insert(0, "configs")
    import quickstart
    from jointseg_jax import build, cli
    from jointseg_jax.config import RunConfig
    from jointseg_jax.data.sources.scenes import Scenes
    from jointseg_jax.training.loop import train

    class Odd(Scenes):
        def __getitem__(self, index):
            if index == 5 and 5 in read:  # the first reading is for the captions, before training
                if sys.argv[2] == "hang":
                    stand_still()
                raise ZeroDivisionError("a bug in record 5")
            read.append(index)
            return super().__getitem__(index)

    def stand_still():
        time.sleep(1000)

    read = []
    build.SOURCES["odd"] = Odd
    config = quickstart.get_config("smoke").to_dict()
    config["data"]["train"] = {"name": "odd", "size": 16, "count": 64}
    config["system"] |= {"size": (16, 16)}
    config["system"]["denoiser"] |= {"width": 8, "depth": 1, "heads": 1, "share": ()}
    config |= {"batch": 8, "steps": 1000, "log": {"every": 1}, "preview": {"every": 0, "count": 8}}
    config |= {"watchdog": {"seconds": 30 if sys.argv[2] == "hang" else 600, "abort": True}}

    def main():
        return train(RunConfig.parse(config), Path(sys.argv[1]))

    cli._guarded(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("what", "status"), [("hang", 76), ("raise", 1)])
def test_a_reader_that_hangs_or_fails(tmp_path, what, status):
    """F17: the watchdog's line, or the reader's own words; never just silence."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HANGING), str(tmp_path), what],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
        timeout=300,
    )
    assert done.returncode == status, done.stderr
    if what == "raise":
        assert "ZeroDivisionError: a bug in record 5" in done.stderr
        return
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("watchdog: ")]
    assert "no step for 3" in line and "(waiting for data); last step " in line
    assert "stand_still" in (tmp_path / "stacks.txt").read_text()

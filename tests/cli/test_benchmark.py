"""``launch/benchmark.py`` as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def alone(*arguments, status=0):
    """Runs it in a process of its own, with programs compiled as a user's are."""
    done = subprocess.run(
        [sys.executable, "launch/benchmark.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_flags_that_do_not_belong_together(launch):
    done = launch("benchmark", "--what=data", "--steps=3", status=2)
    assert "ERROR [flags] --steps is for --what=sample." in done.error
    assert "ERROR [flags] --what=data needs --config=FILE." in done.error


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "sample", "codec"])
def test_two_configs_in_turns(what):
    done = alone(
        f"--what={what}",
        "--config=configs/quickstart.py:smoke",
        "--against=configs/quickstart.py:smoke",
        "--against.seed=1",
        "--repetitions=2",
        "--calls=1",
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["against"]["config"] == "configs/quickstart.py:smoke seed=1"
    assert all(r["min"] <= r["median"] <= r["max"] for r in found["ratio"].values())


@pytest.mark.slow
def test_startup():
    done = alone("--what=startup", "--config=configs/quickstart.py:smoke", "--repetitions=1")
    times = json.loads(done.stdout.splitlines()[-1])["times"]
    assert 0 < times["warm"]["median_ms"] < times["cold"]["median_ms"]

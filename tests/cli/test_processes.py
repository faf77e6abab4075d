"""Several processes on one machine do what one does: same bits, same folders, same ends.

In minutes, with processes killed and four of them: pytest tests/cli/test_processes.py -m ''
(the quick ones alone run by default).
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = (
    "--config=configs/quickstart.py:smoke",
    "--config.finish.num=0",
    "--config.preview.every=0",
    "--config.log.every=1",
    "--config.optimizer.name=adamw",
)
ENDS_WITHIN = 20
"""Seconds that a process may outlive another that was killed; the heartbeat is 10."""
SAVED_WITHIN = 5
"""Seconds from a request to one process to the checkpoint of all."""
LOST = (76, -signal.SIGABRT)
"""How a process ends without another: by itself, or aborted by jax (a shell says 134)."""


def addresses(count):
    """The flags of each of ``count`` processes that meet at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}")
    return [(*meet, f"--process_id={i}") for i in range(count)]


@contextlib.contextmanager
def together(launch, name, *arguments, count=2, devices=1):
    """The processes of one run, none of which outlives the test."""
    flags = addresses(count)
    started = [launch.start(name, *arguments, *own, devices=devices) for own in flags]
    try:
        yield started
    finally:
        for process in started:
            process.kill()


def ends(processes, timeout=600):
    """(status, standard output, standard error) of each."""
    with ThreadPoolExecutor(len(processes)) as at_once:  # or a full pipe would stop the others
        said = list(at_once.map(lambda process: process.communicate(timeout=timeout), processes))
    return [(p.returncode, *texts) for p, texts in zip(processes, said)]


def run(launch, name, *arguments, count=2, devices=1):
    """Runs all processes to their good end."""
    with together(launch, name, *arguments, count=count, devices=devices) as started:
        found = ends(started)
    assert [status for status, _, _ in found] == [0] * count, found
    return found


def contents(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def wait_for(condition, processes):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not condition():
        assert all(p.poll() is None for p in processes), ends(processes)
        time.sleep(0.02)
    assert condition()


def logged(workdir, step):
    metrics = workdir / "metrics.jsonl"
    return lambda: metrics.exists() and f'"step": {step},' in metrics.read_text()


def test_sampling_over_processes_gives_the_same_bytes(launch, trained, tmp_path):  # G2
    options = (f"--workdir={trained}", "--num=22", "--per_device=4", "--absorb=4")
    one, two = tmp_path / "one", tmp_path / "two"
    launch("sample", *options, f"--out={one}")
    (_, out, error), (_, silent, _) = run(launch, "sample", *options, f"--out={two}")
    assert contents(two) == contents(one)
    assert json.loads(out.strip().splitlines()[-1])["pairs"] == 22
    assert "process 0 of 2 (flags): 1 of 2 devices" in error
    assert "{" not in silent  # Gloo greets on standard output, on every process


LONG = (*QUICK, "--config.steps=80", "--config.checkpoint.every=10")


@pytest.fixture(scope="module")
def expected(launch, tmp_path_factory):
    """The final digest of ``LONG`` by one process with two devices.

    Two devices: the sum of two numbers has no order, so the bits can be equal.
    """
    workdir = tmp_path_factory.mktemp("straight")
    return launch("train", *LONG, f"--workdir={workdir}", devices=2).digest


@pytest.mark.slow
@pytest.mark.parametrize(("count", "every"), [(2, 1000), (4, 10)])
def test_a_request_to_one_process_stops_all_and_one_process_goes_on(
    launch, expected, tmp_path, count, every
):
    """F4: two that have not saved before, and four, of which two cores have to do it."""
    options = (*LONG, f"--config.checkpoint.every={every}", f"--workdir={tmp_path}")
    with together(launch, "train", *options, count=count) as started:
        wait_for(logged(tmp_path, 12), started)
        asked = time.time()
        started[1].send_signal(signal.SIGTERM)
        found = ends(started, timeout=200)
    assert [status for status, _, _ in found] == [75] * count, found
    markers = (tmp_path / "checkpoints").glob("[0-9]*/commit_success.txt")
    marker = max(markers, key=lambda path: int(path.parent.name))
    step = int(marker.parent.name)
    assert 12 <= step < 80 and f"stopped on request at step {step};" in found[0][2]
    assert marker.stat().st_mtime - asked < SAVED_WITHIN
    if count == 2:
        done = launch("train", *options, devices=2)
        assert f"resumed at step {step} from" in done.error
        assert done.digest == expected


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_stands_still_for_a_while_is_waited_for(launch, expected, tmp_path, victim):
    """F19: shorter than the heartbeat it is no failure; it changes no bit, and goodput has it."""
    rare = "--config.checkpoint.every=1000"  # or the others would wait for it while they save
    options = (*LONG, rare, f"--workdir={tmp_path}", "--heartbeat_seconds=60")
    with together(launch, "train", *options) as started:
        wait_for(logged(tmp_path, 30), started)
        started[victim].send_signal(signal.SIGSTOP)
        time.sleep(20)
        started[victim].send_signal(signal.SIGCONT)
        found = ends(started)
    assert [status for status, _, _ in found] == [0, 0], found
    assert f"digest {expected}," in found[0][2]
    assert "longer than usual: this host was stopped or slow" in found[0][2]
    lines = (tmp_path / "goodput.jsonl").read_text().splitlines()
    summary = json.loads(lines[-1])["summary"]
    assert 15 < summary["stalled_s"] < 40 and " (stalled for " in found[0][2]


TOY = """
import sys, time
from absl import flags
from jointseg_jax import cli, distributed
from jointseg_jax.types import UserError

DO = flags.DEFINE_string("do", "", "what this process does")
cli.define_process_flags()

def main():
    cli.start(saves=True)
    import numpy as np
    from jax.experimental import multihost_utils
    from jointseg_jax.training.preemption import Preemption

    def refused():
        raise UserError("this folder is in use")

    if DO.value == "refuse":
        distributed.from_first(refused)
    if DO.value == "mistake":
        raise UserError("steps = x: give a number")
    if DO.value == "bug":
        raise ZeroDivisionError("a bug")
    own = "process " + str(not distributed.is_first())
    print(distributed.gather(own), distributed.gather("again"), distributed.share(own), flush=True)
    with Preemption() as preemption:
        step = 0
        while not preemption.requested(step):
            if DO.value == "work":
                multihost_utils.process_allgather(np.ones(2))
            step += 1
            if step == 20:
                print("at work", flush=True)
            time.sleep(0.01)
    cli.last_line({"left at": step})
    print("left at", step, file=sys.stderr)
    return 75

cli.run(main)
"""
"""A launcher without a network: what it says of its processes is what any launcher says."""


@contextlib.contextmanager
def toys(launch, *jobs):
    """One process for each job, which beat fast so that the tests need not wait."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TOY, *flags, f"--do={job}", "--heartbeat_seconds=4"],
            cwd=ROOT,
            env=launch.environment | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for job, flags in zip(jobs, addresses(len(jobs)))
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()


def until_at_work(processes):
    for process in processes:
        for line in process.stdout:
            if line == "at work\n":
                break


def test_processes_talk_and_a_request_to_one_stops_all(launch):  # F4
    with toys(launch, "work", "work", "work") as started:
        talk = [next(x for x in p.stdout if x.startswith("[")) for p in started]
        until_at_work(started)
        started[1].send_signal(signal.SIGTERM)
        found = ends(started, timeout=60)
    assert talk[0] == (
        "['process False', 'process True', 'process True'] ['again', 'again', 'again'] "
        "process False\n"
    )
    assert talk[1:] == ["[] [] process False\n"] * 2
    assert [status for status, _, _ in found] == [75, 75, 75], found
    steps = [error.split("left at ")[1].split()[0] for _, _, error in found]
    assert len(set(steps)) == 1
    assert [out.count("left at") for _, out, _ in found] == [1, 0, 0]
    assert "process 2 of 3 (flags): 1 of 3 devices" in found[2][2]


@pytest.mark.parametrize("job", ["work", "wait"])
@pytest.mark.parametrize("victim", [0, 1])  # F6, F7
def test_when_one_is_killed_the_other_ends_with_a_line(launch, job, victim):
    """Whether the other is told by its network, or its heartbeat has to find out."""
    with toys(launch, job, job) as started:
        until_at_work(started)
        started[victim].send_signal(signal.SIGKILL)
        since = time.monotonic()
        found = ends(started, timeout=60)
        assert time.monotonic() - since < ENDS_WITHIN
    status, _, error = found[1 - victim]
    assert status in LOST, found
    assert "another process of th" in error and "un the same command again" in error.lower()
    assert "Traceback" not in error
    assert f"process {victim} of 2 ended abruptly" in found[victim][2]


@pytest.mark.parametrize("job", ["mistake", "refuse"])
def test_a_mistake_of_all_or_of_the_first_is_told_once(launch, job):
    with toys(launch, job, job) as started:
        found = ends(started, timeout=60)
    assert [status for status, _, _ in found] == [2, 2], found
    said = {"mistake": "steps = x: give a number", "refuse": "this folder is in use"}[job]
    assert sum(error.count(said) for _, _, error in found) == 1
    assert not any("abruptly" in error or "Traceback" in error for _, _, error in found)


def test_a_bug_in_one_ends_both(launch):
    with toys(launch, "work", "bug") as started:
        found = ends(started, timeout=60)
    assert found[1][0] == 1 and "ZeroDivisionError: a bug" in found[1][2]
    assert found[0][0] in LOST, found
    assert "another process of th" in found[0][2]


@pytest.mark.slow
def test_a_config_that_does_not_fit_is_told_once(launch, tmp_path):
    options = (*QUICK, "--config.batch=7", f"--workdir={tmp_path}")
    with together(launch, "train", *options) as started:
        found = ends(started)
    assert [status for status, _, _ in found] == [2, 2], found
    assert sum(error.count("config.batch = 7") for _, _, error in found) == 1


def test_half_given_flags_are_refused(launch, tmp_path):
    options = (f"--workdir={tmp_path}", f"--out={tmp_path}/o", "--num_processes=2")
    done = launch("sample", *options, status=2)
    assert "--coordinator, --process_id missing" in done.error


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_when_one_is_killed(launch, expected, tmp_path, victim):
    """F6, F7, F8: the same command on one process then goes on, to the bits of a straight run."""
    options = (*LONG, f"--workdir={tmp_path}")
    with together(launch, "train", *options) as started:
        wait_for(logged(tmp_path, 25), started)
        started[victim].send_signal(signal.SIGKILL)
        since = time.monotonic()
        found = ends(started, timeout=100)
        assert time.monotonic() - since < ENDS_WITHIN
    status, _, error = found[1 - victim]
    assert status in LOST, found
    assert "another process of th" in error and "Run the same command" in error
    assert launch("train", *options, devices=2).digest == expected


def losses(workdir):
    records = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


LAYOUTS = {
    "1 device": {},
    "2 devices": {"devices": 2},
    "8 devices, parameters cut": {
        "devices": 8,
        "words": ("--config.mesh=(2,4,1)", "--config.sharding=fsdp"),
    },
    "2 processes of 2": {"count": 2, "devices": 2},
    "4 processes": {"count": 4},
}


def trained_on(launch, workdir, *, count=1, devices=1, words=()):
    """What the first process says of a run of 5 steps with saves at 2, 4 and 5."""
    options = (*QUICK, "--config.steps=5", "--config.checkpoint.every=2", "--config.batch=16")
    options = (*options, "--config.checkpoint.keep=3", *words, f"--workdir={workdir}")
    if count == 1:
        return launch("train", *options, devices=devices).error
    return run(launch, "train", *options, count=count, devices=devices)[0][2]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_on_any_other_layout(launch, tmp_path, layout):
    """F13: all pairs of five; a restored array is verified where it then lies, bit by bit.

    Sums over devices have another order on another layout, so losses agree to 1e-6.
    """
    trained_on(launch, tmp_path / "first", **LAYOUTS[layout])
    expected = losses(tmp_path / "first")
    assert set(expected) == {2, 3, 4, 5}  # the first log point of a launch has nothing to tell yet
    for later in "45":
        shutil.rmtree(tmp_path / "first/checkpoints" / later)
    for name in LAYOUTS.keys() - {layout}:
        workdir = shutil.copytree(tmp_path / "first", tmp_path / name.replace(" ", "-"))
        (workdir / "metrics.jsonl").unlink()
        said = trained_on(launch, workdir, **LAYOUTS[name])
        assert "resumed at step 2 from" in said and "damaged" not in said
        assert losses(workdir) == pytest.approx({k: expected[k] for k in (4, 5)}, rel=1e-6), name


@pytest.mark.slow
def test_four_processes_see_the_losses_of_one(launch, tmp_path):
    """Also when one process makes the first half of the steps and two the second.

    Sums over four devices have an order, which differs within a process and between processes: the
    last of 24 bits may differ after a step, so losses agree to 1e-6, and the first to the bit.
    """
    one, four = tmp_path / "one", tmp_path / "four"
    launch("train", *QUICK, f"--workdir={one}", devices=4)
    run(launch, "train", *QUICK, f"--workdir={four}", count=4)
    expected = losses(one)
    assert losses(four) == pytest.approx(expected, rel=1e-6)
    newest = max((one / "checkpoints").glob("[0-9]"), key=lambda p: int(p.name))
    newest.rename(tmp_path / "set-aside")  # back to step 2, then on with two processes
    found = run(launch, "train", *QUICK, f"--workdir={one}", count=2, devices=2)
    assert "resumed at step 2 from" in found[0][2]
    assert losses(one) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices"), [(1, 2), (1, 4), (2, 2)], ids=["2", "4", "2 processes of 2"]
)
def test_pairs_are_the_same_on_any_number_of_devices(
    launch, pairs, trained, tmp_path, count, devices
):
    """G2, beside 8 devices and 2 processes of 1 in the quick tests."""
    options = (f"--workdir={trained}", *PAIRS, f"--out={tmp_path}")
    if count == 1:
        launch("sample", *options, devices=devices)
    else:
        run(launch, "sample", *options, count=count, devices=devices)
    assert contents(tmp_path) == pairs


PAIRS = ("--num=22", "--per_device=4", "--absorb=4")


@pytest.fixture(scope="module")
def pairs(launch, trained, tmp_path_factory):
    """What one process on one device makes of ``PAIRS``."""
    out = tmp_path_factory.mktemp("pairs")
    launch("sample", f"--workdir={trained}", *PAIRS, f"--out={out}")
    return contents(out)


@pytest.mark.slow
def test_interrupted_processes_go_on_with_the_same_bytes(launch, trained, tmp_path):
    options = (f"--workdir={trained}", "--num=120", "--per_device=4")
    one, two = tmp_path / "one", tmp_path / "two"
    launch("sample", *options, f"--out={one}")
    manifest = two / "manifest.jsonl"
    with together(launch, "sample", *options, f"--out={two}") as started:
        wait_for(lambda: manifest.exists() and manifest.stat().st_size > 4000, started)
        for process in started:
            process.send_signal(signal.SIGKILL)
        ends(started)
    assert len(manifest.read_text().splitlines()) < 120, "it was too fast to be interrupted"
    run(launch, "sample", *options, f"--out={two}")
    assert contents(two) == contents(one)


@pytest.mark.slow
def test_evaluation_over_processes_gives_the_same_report(launch, trained, tmp_path):
    options = (f"--workdir={trained}", "--num=16")
    report = trained / "evaluation.json"
    found = run(launch, "evaluate", *options)
    two = json.loads(report.read_text())
    assert json.loads(found[0][1].strip().splitlines()[-1]) == two
    assert "{" not in found[1][1]
    report.unlink()
    assert launch("evaluate", *options).json == two


PODS = sorted((ROOT / "launch" / "pod").glob("*.sh"))


@pytest.mark.parametrize("script", PODS, ids=lambda p: p.stem)
def test_pod_scripts_parse_and_say_how_they_are_used(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text and os.access(script, os.X_OK)
    done = subprocess.run([script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and f"launch/pod/{script.name}" in done.stdout


def slurm(tmp_path, statuses, **environment):
    """Runs the SLURM script where srun starts one process per status, and those exit so."""
    tools = {
        "srun": f"#!{sys.executable}\n" + FAKE_SRUN.format(statuses=statuses),
        "scontrol": '#!/bin/sh\necho "scontrol $*"\n',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / "launch/pod/slurm.sh", "-c", "import os; print(os.environ['SLURM_PROCID'])"],
        env=os.environ
        | {"PATH": path, "PYTHON": sys.executable, "SLURM_JOB_ID": "12"}
        | environment,
        capture_output=True,
        text=True,
    )


FAKE_SRUN = """
import os, subprocess, sys
words = [w for w in sys.argv[1:] if not w.startswith("--")]
statuses = {statuses}
for i, status in enumerate(statuses):
    subprocess.run(words, env=os.environ | {{"SLURM_PROCID": str(i)}}, check=True)
sys.exit(max(statuses))  # as srun does
"""


@pytest.mark.parametrize(
    ("statuses", "again"),
    [((0, 0), False), ((2, 2), False), ((75, 75), True), ((76, 137), True), ((134, 137), True)],
)
def test_the_slurm_script_runs_everywhere_and_goes_on_after_a_stop(tmp_path, statuses, again):
    done = slurm(tmp_path, statuses)
    assert done.stdout.split()[:2] == ["0", "1"]
    assert ("scontrol requeue 12" in done.stdout) == again
    assert done.returncode == max(statuses)


def test_the_slurm_script_gives_up_after_enough_tries(tmp_path):
    done = slurm(tmp_path, (75, 75), SLURM_RESTART_COUNT="10")
    assert "scontrol" not in done.stdout and done.returncode == 75

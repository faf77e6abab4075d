"""Every config trains; interruptions do not show in the result; mistakes get one clear block."""

import random
import signal
import time

import pytest

NO_PREVIEW = "--config.preview.every=0"
QUICK = ("--config=configs/quickstart.py:smoke", "--config.finish.num=0", NO_PREVIEW)


def test_pdm_trains(launch, tmp_path):
    done = launch("train", "--config=configs/pdm.py:smoke", f"--workdir={tmp_path}", NO_PREVIEW)
    assert done.json["step"] == 4


def test_jodiffusion_trains_on_its_codec(launch, tmp_path):
    codec, joint = tmp_path / "codec", tmp_path / "joint"
    quick = ("--config.steps=2", NO_PREVIEW)
    launch("train", "--config=configs/jodiffusion_codec.py:smoke", f"--workdir={codec}", *quick)
    where = (f"--config.system.streams.mask.codec.workdir={codec}", "--config.finish.num=0")
    launch("train", "--config=configs/jodiffusion.py:smoke", f"--workdir={joint}", *where, *quick)
    codec.rename(tmp_path / "elsewhere")  # the joint workdir stands alone
    assert launch("evaluate", f"--workdir={joint}", "--num=16").json["step"] == 2
    report = launch("evaluate", f"--workdir={tmp_path / 'elsewhere'}").json
    assert 0 <= report["reconstruction_miou"] <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_runs_end_with_the_same_bits(launch, tmp_path, workers):
    """SIGKILL three times at random moments, then finish: same final digest as one straight run."""
    options = (*QUICK, "--config.steps=12", "--config.checkpoint.every=3", "--config.log.every=1")
    options = (*options, f"--config.data.workers={workers}")
    straight = launch("train", *options, f"--workdir={tmp_path / 'straight'}").digest
    killed = tmp_path / "killed"
    chance = random.Random(workers)
    for wanted in sorted(chance.sample(range(1, 11), 3)):
        process = launch.start("train", *options, f"--workdir={killed}")
        _wait_for_step(killed, wanted, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert launch("train", *options, f"--workdir={killed}").digest == straight


def test_sigterm_saves_and_leaves(launch, tmp_path):
    options = (
        *QUICK,
        "--config.steps=2000",
        "--config.checkpoint.every=1000",
        "--config.log.every=1",
    )
    process = launch.start("train", *options, f"--workdir={tmp_path}")
    _wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert "the same command goes on" in error
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert steps and min(steps) >= 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("config.lr=3",), "--config.lr=3"),
        (("--config.stepz=3",), "steps"),
        (("--config.steps=1e4",), "steps"),
        (("--config.batch=12", "--config.accumulate=5"), "multiple"),
        (("--config.mesh=(3,1,1)", "--config.batch=9"), "number of devices"),
        (("--config.system.denoiser.name=dit",), "uvit"),
        (("--config.system.denoiser.width=33",), "heads"),
        (("--config.optimizer.schedule.lr=-1.0",), "lr"),
        (("--config.system.text_drop=1.5",), "text_drop"),
    ],
)
def test_mistakes_are_one_block_and_status_2(launch, tmp_path, arguments, said):
    done = launch("train", *QUICK, f"--workdir={tmp_path}", *arguments, status=2)
    assert said in done.error
    assert "Traceback" not in done.error


def test_another_config_is_refused_with_the_difference(launch, trained):
    done = launch("train", *QUICK, f"--workdir={trained}", "--config.optimizer.b2=0.5", status=2)
    assert "optimizer/b2" in done.error
    assert "0.99" in done.error and "0.5" in done.error


def _wait_for_step(workdir, step, process):
    """Waits until the metrics say that a step was logged (or the run ended by itself)."""
    deadline = time.monotonic() + 300
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and f'"step": {step}' in metrics.read_text():
            return
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]

"""Pairs are a function of (seed, index): interruption and device count leave no trace."""

import hashlib
import signal
import time


def contents(folder):
    """SHA-256 of every file of a generated folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_an_interrupted_run_ends_with_the_same_bytes(launch, trained, tmp_path):
    options = (f"--workdir={trained}", "--num=64", "--per_device=8", "--absorb=4")
    launch("sample", *options, f"--out={tmp_path / 'straight'}")
    broken = tmp_path / "broken"
    process = launch.start("sample", *options, f"--out={broken}")
    manifest = broken / "manifest.jsonl"
    while process.poll() is None and not (manifest.exists() and manifest.stat().st_size > 4000):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(manifest.read_text().splitlines()) < 64, "it was too fast to be interrupted"
    launch("sample", *options, f"--out={broken}")
    assert contents(broken) == contents(tmp_path / "straight")


def test_the_number_of_devices_does_not_show(launch, trained, tmp_path):
    options = (f"--workdir={trained}", "--num=64", "--per_device=8")
    launch("sample", *options, f"--out={tmp_path / 'one'}", devices=1)
    launch("sample", *options, f"--out={tmp_path / 'eight'}", devices=8)
    assert contents(tmp_path / "one") == contents(tmp_path / "eight")


def test_other_settings_are_refused(launch, trained, tmp_path):
    options = (f"--workdir={trained}", f"--out={tmp_path}", "--num=2", "--per_device=8")
    launch("sample", *options)
    done = launch("sample", *options, "--seed=1", status=2)
    assert "seed: 0 -> 1" in done.error


def test_a_missing_workdir_says_how_to_make_one(launch, tmp_path):
    done = launch("sample", f"--workdir={tmp_path}", f"--out={tmp_path}/o", status=2)
    assert "launch/train.py" in done.error

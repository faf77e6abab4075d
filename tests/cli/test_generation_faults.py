"""What generating pairs makes of kills, signals, full disks and another batch.

All of it in minutes: python -m pytest -m slow tests/cli/test_generation_faults.py
"""

import hashlib
import json
import math
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM = 400
PAIRS = (f"--num={NUM}", "--per_device=4", "--absorb=4")


def contents(folder):
    """SHA-256 of every file of a generated folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def straight(launch, trained, tmp_path_factory):
    """A folder of pairs that nothing happened to."""
    out = tmp_path_factory.mktemp("straight")
    launch("sample", f"--workdir={trained}", *PAIRS, f"--out={out}")
    return out


def indices(out):
    return [json.loads(x)["index"] for x in (out / "manifest.jsonl").read_text().splitlines()]


def test_fifty_kills_do_not_show(launch, trained, straight, tmp_path):
    """G1: SIGKILL at any moment; no pair is missing, twice or of other bytes."""
    chance, left, runs, whole = random.Random(0), 50, 0, contents(straight)
    options = (f"--workdir={trained}", *PAIRS)
    while left or runs == 0:
        out, finished = tmp_path / str(runs), False
        while left and not finished:
            process = launch.start("sample", *options, f"--out={out}")
            try:  # log-uniform: many kills fall where a run begins
                process.wait(math.exp(chance.uniform(math.log(1), math.log(12))))
                finished = True
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                left -= 1
            process.communicate()
        if not finished:
            launch("sample", *options, f"--out={out}")
        assert contents(out) == whole and indices(out) == list(range(NUM))
        shutil.rmtree(out)
        runs += 1


def test_another_batch_rounds_otherwise_and_no_more(launch, trained, straight, tmp_path):
    """G3: sums of another shape; 1/255 on 0.1 % of the pixels, masks equal on 99.99 %."""
    few = ("--num=64", "--absorb=4")
    for per_device in (1, 16):
        out = tmp_path / str(per_device)
        launch("sample", f"--workdir={trained}", *few, f"--per_device={per_device}", f"--out={out}")
        images, labels = (
            [
                np.stack([np.asarray(Image.open(f / kind / f"{i:08d}.png")) for i in range(64)])
                for f in (straight, out)
            ]
            for kind in ("images", "annotations")
        )
        apart = np.abs(images[0].astype(int) - images[1]).max(-1)
        assert apart.max() <= 1 and (apart > 0).mean() <= 1e-3
        assert (labels[0] == labels[1]).mean() >= 0.9999


@pytest.mark.parametrize("harm", ["damaged", "deleted"])
def test_what_was_harmed_by_hand_is_made_again(launch, trained, straight, tmp_path, harm):
    """G4: that one, and no other."""
    out = shutil.copytree(straight, tmp_path / "out")
    path = out / "annotations" / f"{NUM - 9:08d}.png"
    if harm == "deleted":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    done = launch("sample", f"--workdir={trained}", *PAIRS, f"--out={out}")
    assert contents(out) == contents(straight)
    assert done.json["made_now"] == 1


def test_filters_reject_the_same_pairs_on_any_number_of_devices(launch, trained, tmp_path):
    """G8."""
    options = (f"--workdir={trained}", "--num=24", "--per_device=4", "--min_classes=3")
    one, two = tmp_path / "one", tmp_path / "two"
    done = launch("sample", *options, f"--out={one}")
    launch("sample", *options, f"--out={two}", devices=2)
    assert contents(one) == contents(two)
    lines = [json.loads(x) for x in (one / "manifest.jsonl").read_text().splitlines()]
    rejected = sum("rejected" in line for line in lines)
    assert done.json["rejected"] == ({"min_classes": rejected} if rejected else {})
    assert len(lines) == 24 and len(list((one / "images").iterdir())) == 24 - rejected
    done = launch("sample", *options, "--min_classes=2", f"--out={one}", status=2)
    assert "filters: " in done.error


def test_a_request_leaves_whole_pairs_and_status_75(launch, trained, straight, tmp_path):
    """G7: SIGTERM, one line, no traceback; the same command ends with the same bytes."""
    out = tmp_path / "out"
    process = launch.start("sample", f"--workdir={trained}", *PAIRS, f"--out={out}")
    manifest = out / "manifest.jsonl"
    try:
        while process.poll() is None and not (manifest.exists() and manifest.stat().st_size > 4000):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, error
    assert "SIGTERM: stopped on request; the same command goes on." in error
    assert "Traceback" not in error and 0 < len(indices(out)) < NUM
    done = launch("sample", f"--workdir={trained}", *PAIRS, f"--out={out}")
    assert 0 < done.json["made_now"] < NUM and contents(out) == contents(straight)


def test_a_full_disk_leaves_whole_pairs(launch, trained, straight, tmp_path):
    """G7: with more room the same command ends with the same bytes."""
    sample = f'"$PYTHON" launch/sample.py --workdir={trained} {" ".join(PAIRS)} --out="$DISK/out"'
    script = (
        f'{sample} && exit 9 || echo status $?; find "$DISK" -name "*.tmp"; wc -l < '
        f'"$DISK/out/manifest.jsonl"; mount -o remount,size=64m tmpfs "$DISK"; {sample}; '
        f'cp -r "$DISK/out" {tmp_path}/moved'
    )
    (tmp_path / "disk").mkdir()
    # the mount is seen inside the shell only, what is copied out of it outside as well
    done = launch.on_disk("1m", tmp_path / "disk", script)
    assert done.returncode == 0, done.stderr
    status, listed, last = done.stdout.splitlines()[:2] + done.stdout.splitlines()[-1:]
    assert status == "status 2" and 0 < int(listed) < NUM, done.stdout
    assert "Traceback" not in done.stderr
    (said,) = [x for x in done.stderr.splitlines() if x.startswith("ERROR [generation]")]
    assert f"{tmp_path}/disk/out/" in said and "No space left on device" in said
    assert " bytes needed, " in said and " free. Free some space;" in said
    assert json.loads(last)["made_now"] == NUM - int(listed)
    assert contents(tmp_path / "moved") == contents(straight)


def test_a_disk_that_cannot_be_written_is_refused(launch, trained, tmp_path):
    """G7."""
    sample = f'"$PYTHON" launch/sample.py --workdir={trained} --num=4 --out="$DISK/out"'
    script = f'mount -o remount,ro tmpfs "$DISK"; {sample}'
    done = launch.on_disk("1m", tmp_path, script)
    assert done.returncode == 2, done.stderr
    assert "cannot be written (Read-only file system). Choose another --out" in done.stderr
    assert "Traceback" not in done.stderr

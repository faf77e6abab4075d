"""``launch/encode.py`` as a user runs it."""

import os
import signal
import time

import pytest

from jointseg_jax.data.cache import Cache

QUICK = ("--config=configs/quickstart.py:smoke", "--latents=mask", "--batch=4")


def test_a_split_is_encoded(launch, tmp_path):
    out = tmp_path / "cache"
    done = launch("encode", *QUICK, f"--out={out}", "--limit=6")
    found, source = done.json, Cache(root=str(out), split="train")
    assert found["records"] == len(source) == 6 and found["out"] == str(out)
    assert set(found["fields"]) == {"latents/mask", "image"} == {f.name for f in source.fields}
    assert f"writing {out}, split train:\n" in done.out
    assert f"--config.data.cache={out}" in done.out and "Traceback" not in done.error


@pytest.mark.slow
def test_a_killed_encoding_goes_on_to_the_same_bytes(launch, tmp_path):
    options = (*QUICK, "--limit=1000", "--shard_mb=1")
    launch("encode", *options, f"--out={tmp_path / 'straight'}")
    killed = tmp_path / "killed"
    process = launch.start("encode", *options, f"--out={killed}")
    while not list(killed.glob("*.bin")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = launch("encode", *options, f"--out={killed}").json
    assert 0 < found["shards_kept"] < found["shards"]
    for name in os.listdir(tmp_path / "straight"):
        both = [tmp_path / folder / name for folder in ("straight", "killed")]
        assert both[0].is_dir() or both[0].read_bytes() == both[1].read_bytes()
    refused = launch("encode", *options, "--crops=2", f"--out={killed}", status=2)
    assert "this cache was made with other settings:\n  crops: 1 -> 2" in refused.error

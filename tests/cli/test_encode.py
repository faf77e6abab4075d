"""``launch/encode.py`` as a user runs it."""

import json
import os
import signal
import socket
import time

import pytest

QUICK = ("--config=configs/quickstart.py:smoke", "--latents=mask", "--batch=4")


@pytest.mark.slow
def test_a_killed_encoding_goes_on_to_the_same_bytes(launch, tmp_path):
    options = (*QUICK, "--limit=1000", "--shard_mb=1")
    launch("encode", *options, f"--out={tmp_path / 'straight'}")
    killed = tmp_path / "killed"
    process = launch.start("encode", *options, f"--out={killed}")
    while not list(killed.glob("*.bin")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in process.communicate()[1] and process.returncode == 75
    process = launch.start("encode", *options, f"--out={killed}")
    while len(list(killed.glob("*.bin"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = launch("encode", *options, f"--out={killed}").json
    assert 0 < found["shards_kept"] < found["shards"]
    for name in os.listdir(tmp_path / "straight"):
        both = [tmp_path / folder / name for folder in ("straight", "killed")]
        assert both[0].is_dir() or both[0].read_bytes() == both[1].read_bytes()
    refused = launch("encode", *options, "--crops=2", f"--out={killed}", status=2)
    said = "this cache was made with other settings, 4 fields:\n  crops: 1 -> 2"
    assert said in refused.error and "Traceback" not in refused.error


@pytest.mark.slow
def test_processes_share_the_shards_and_write_the_same_bytes(launch, tmp_path):
    options = (*QUICK, "--limit=300", "--shard_mb=1")
    one, two = tmp_path / "one", tmp_path / "two"
    launch("encode", *options, f"--out={one}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    own = [(meet, "--num_processes=2", f"--process_id={i}") for i in range(2)]
    started = [launch.start("encode", *options, f"--out={two}", *flags) for flags in own]
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    found = json.loads(said[0][0].strip().splitlines()[-1])
    assert (found["processes"], found["records"], found["shards_kept"]) == (2, 300, 0)
    assert found["shards"] > 2 and "{" not in said[1][0]
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
    for path in one.iterdir():
        assert path.is_dir() or path.read_bytes() == (two / path.name).read_bytes()

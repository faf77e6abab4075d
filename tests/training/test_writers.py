"""Every destination gets what was written, also after a kill."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jointseg_jax.training import writers

POINT = {
    "lr": 1e-4,
    "loss": 0.51234,
    "loss/mask": 0.02,
    "eta_seconds": 753.0,
    "images_per_second": 812.34,
    "data_wait": 0.012,
    "mfu": 0.3141,
}


def picture(height=4, width=6, channels=3):
    count = height * width * channels
    return np.arange(count, dtype=np.uint8).reshape(height, width, channels)


def test_console_line_is_readable_and_aligned():
    stream = io.StringIO()
    console = writers.ConsoleWriter(5000, stream)
    console.write(20, POINT)
    console.write(1200, {**POINT, "loss": 12.5, "lr": 3e-5, "eta_seconds": 35999.4, "mfu": 0.02})
    console.write(1201, {**POINT, "loss": float("nan"), "eta_seconds": float("inf")})
    first, *others = stream.getvalue().splitlines()
    assert first == (
        "step   20/5000 | loss   0.5123 | loss/mask     0.02 | lr 1.00e-04 |   812.3 img/s"
        " | wait  1.2 % | MFU 31.4 % | ETA 0:12:33"
    )
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in (first, *others)]
    assert bars[0] == bars[1] == bars[2]
    assert others[0].endswith("ETA 9:59:59") and "nan" in others[1]


def test_writers_fan_out_and_convert_device_scalars(tmp_path):
    stream = io.StringIO()
    path = tmp_path / "deep" / "metrics.jsonl"
    with writers.Writers(
        [
            writers.ConsoleWriter(10, stream),
            writers.JsonlWriter(path),
            writers.TensorBoardWriter(tmp_path / "events"),
        ]
    ) as out:
        out.write(1, {"loss": jnp.float32(0.5), "n": np.int64(3)})
        out.images(1, {"grid": picture()})
        out.text(1, {"note": "hello"})
        with pytest.raises(ValueError, match=r"'grid' is float32\[4, 6, 3\]; it must be uint8"):
            out.images(1, {"grid": picture().astype(np.float32)})
    assert "loss      0.5" in stream.getvalue() and "note: hello" in stream.getvalue()
    numbers, images, text = writers.read_records(path)
    assert numbers["loss"] == 0.5 and numbers["n"] == 3.0 and numbers["step"] == 1
    assert images["images"] == {"grid": [4, 6, 3]} and text["text"] == {"note": "hello"}


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    path = tmp_path / "metrics.jsonl"
    with writers.Writers(
        [writers.JsonlWriter(path, resumed=3), writers.TensorBoardWriter(tmp_path / "events")]
    ) as out:
        out.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_added_to_a_run_that_has_ended(tmp_path):
    with writers.run_writers(tmp_path, total=3) as out:
        for step in (1, 2, 3):
            out.write(step, {"loss": 1.0 / step})
    writers.append_scalars(tmp_path, 3, {"evaluation/pairs": 4.0})
    records = writers.read_records(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 3]
    assert records[-1]["evaluation/pairs"] == 4.0 and "loss" not in records[-1]
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [e.step for e in found.Scalars("loss")] == [1, 2, 3]  # none is purged
    assert [(e.step, e.value) for e in found.Scalars("evaluation/pairs")] == [(3, 4.0)]


def test_tensorboard_reads_scalars_images_and_text(tmp_path):
    board = writers.TensorBoardWriter(tmp_path)
    for step in range(4):
        board.write(step, {"loss": 1.0 / (step + 1)})
    board.images(3, {"grid": picture(), "mask": picture(channels=1)})
    board.text(3, {"note": "a text"})
    board.close()
    found = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    curve = [(e.step, e.value) for e in found.Scalars("loss")]
    # event files hold float32
    assert curve == [(s, float(np.float32(1.0 / (s + 1)))) for s in range(4)]
    assert {(e.step, e.width, e.height) for e in found.Images("grid")} == {(3, 6, 4)}
    assert found.Images("mask")[0].encoded_image_string.startswith(b"\x89PNG")
    (tag,) = [t for t in found.Tags()["tensors"] if "note" in t]
    assert found.Tensors(tag)[0].tensor_proto.string_val[0] == b"a text"


def test_tensorboard_hides_steps_after_the_resumed_one(tmp_path):
    first = writers.TensorBoardWriter(tmp_path)
    for step in range(6):
        first.write(step, {"loss": 1.0})
    first.close()
    second = writers.TensorBoardWriter(tmp_path, resumed=3)
    second.write(4, {"loss": 2.0})
    second.close()
    assert len(list(tmp_path.iterdir())) == 2
    found = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [
        (0, 1.0),
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
    ]


def test_numbers_that_json_lacks_become_strings(tmp_path):
    path = tmp_path / "metrics.jsonl"
    out = writers.JsonlWriter(path)
    out.write(1, {"a": float("nan"), "b": float("-inf"), "c": 1e-30})
    out.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert (record["a"], record["b"], record["c"]) == ("NaN", "-Infinity", 1e-30)
    with pytest.raises(ValueError, match="cannot name scalars"):
        out.write(1, {"step": 3.0})


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 9, "lo', b'{"step": 9, "loss": 1.0}', b"\x00" * 100, b'{"st\n\n', b"[1]\n", b""],
)
def test_a_torn_tail_is_cut_and_the_rest_kept(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    first = writers.JsonlWriter(path)
    for step in range(1, 6):
        first.write(step, {"loss": float(step)})
    first.close()
    with path.open("ab") as file:
        file.write(tail)
    second = writers.JsonlWriter(path, resumed=3)
    second.write(4, {"loss": 40.0})
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]  # all of them parse
    assert [r.get("step") for r in lines] == [1, 2, 3, 4, 5, None, 4]
    assert lines[5]["resumed"] == 3 and lines[5].get("torn_bytes", 0) == len(tail)
    found = [(r["step"], r["loss"]) for r in writers.read_records(path)]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_every_record_before_a_kill_is_on_disk(tmp_path):
    path = tmp_path / "metrics.jsonl"
    script = f"""
        import sys
        from jointseg_jax.training.writers import JsonlWriter
        out = JsonlWriter({str(path)!r})
        for step in range(1000000):
            out.write(step, {{"loss": 0.5, "name": 1.0}})
            if step == 200:
                print("ready", flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    steps = [r["step"] for r in writers.read_records(path)]
    assert len(steps) > 200 and steps == list(range(len(steps)))


def test_a_run_writes_all_three_and_a_resumed_one_says_so(tmp_path, capsys):
    for step in (0, 3):
        with writers.run_writers(tmp_path, total=5, step=step) as out:
            out.write(step + 1, {"loss": 1.0})
    assert capsys.readouterr().out.splitlines() == [
        "step 1/5 | loss        1",
        "step 4/5 | loss        1",
    ]
    assert [r["step"] for r in writers.read_records(tmp_path / "metrics.jsonl")] == [1, 4]
    assert (tmp_path / "metrics.jsonl").read_text().count("resumed") == 1
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_note_is_a_line_for_people_and_numbers_for_curves(tmp_path, capsys):
    with writers.run_writers(tmp_path, total=100) as out:
        out.note(5, "preview here", {"preview/alignment_miou": np.float32(0.5)})
        out.note(6, "preview there", {})
    assert capsys.readouterr().out == "step   5/100 | preview here\nstep   6/100 | preview there\n"
    (record,) = writers.read_records(tmp_path / "metrics.jsonl")
    assert (record["step"], record["preview/alignment_miou"]) == (5, 0.5)

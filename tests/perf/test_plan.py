"""The plan for an accelerator: what is skipped, what fails alone, and what every job says."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jointseg_jax.perf import bench_attention, bench_peer, bench_quickstart, plan
from jointseg_jax.perf.plan import Job

ROOT = Path(__file__).parents[2]


def script(text):
    return (sys.executable, "-c", text)


def job(name, *, estimate=0.0, limit=30.0, **parts):
    commands = {part: script(text) for part, text in parts.items()}
    return Job(name=name, parts=commands, estimate=estimate, limit=limit)


def run(jobs, out, minutes=1.0):
    return plan.run_plan(jobs, out, minutes=minutes, cwd=ROOT, log=lambda text: None)


def record(out, name):
    return json.loads((out / f"{name}.json").read_text())


SPEED = {"tflops": 2.0, "mfu": 0.5, "ceiling_tflops": 4.0}
TIMED = {"times": {"update": {"median_ms": 8.0, "images_per_second": 2.0}}, "speed": SPEED}


def test_a_job_that_fails_costs_no_other_job(tmp_path):
    jobs = [
        job("crash", first="raise SystemExit('RESOURCE_EXHAUSTED: 80 GiB')", second="print('{}')"),
        job("silent", only="print('no JSON')"),
        job("missing", only='print(\'{"absent": "no torch here"}\')'),
        job("good", only=f"print('noise'); print('''{json.dumps(TIMED)}''')"),
    ]
    summary = run(jobs, tmp_path)
    crash = record(tmp_path, "crash")
    assert crash["status"] == "failed" and crash["parts"]["second"]["status"] == "done"
    assert "RESOURCE_EXHAUSTED: 80 GiB" in crash["parts"]["first"]["error"]
    assert "exit status 0\nno JSON" in record(tmp_path, "silent")["parts"]["only"]["error"]
    assert record(tmp_path, "missing")["status"] == "absent"
    assert record(tmp_path, "good")["parts"]["only"]["values"] == TIMED
    rows = summary["rows"]
    assert [row["status"] for row in rows] == ["failed", "done", "failed", "absent", "done"]
    assert rows[-1]["mfu"] == 0.5 and rows[-1]["median_ms"] == 8.0
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    text = plan.table(summary)
    assert "good only update" in text and "RESOURCE_EXHAUSTED" in text and "no torch here" in text


def test_a_peers_time_is_set_beside_ours(tmp_path):
    def timed(ms):
        return script(f"print({json.dumps(json.dumps({'times': {'forward': {'median_ms': ms}}}))})")

    parts = {"small jax": timed(2.0), "small eager": timed(5.0)}
    rows = run([Job(name="peer", parts=parts, estimate=0, limit=20)], tmp_path)["rows"]
    assert [row.get("times_ours") for row in rows] == [None, 2.5]


def test_what_no_longer_fits_is_skipped_and_says_so(tmp_path):
    jobs = [job("long", estimate=100.0, only="print('{}')"), job("short", only="print('{}')")]
    summary = run(jobs, tmp_path, minutes=0.5)
    assert [row["status"] for row in summary["rows"]] == ["skipped", "done"]
    skipped = record(tmp_path, "long")
    assert skipped["reason"] == "it needs about 100 s and 30 s are left of --plan_minutes=0.5"
    assert "parts" not in skipped


@pytest.mark.thorough
def test_a_part_ends_with_its_time_and_all_that_it_started(tmp_path):
    """Its child too; the part after it is not started."""
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    run([job("slow", limit=1.0, first=parent, second="print('{}')")], tmp_path / "out")
    assert time.monotonic() - start < 3
    parts = record(tmp_path / "out", "slow")["parts"]
    assert parts["first"]["status"] == parts["second"]["status"] == "out of time"
    assert "not started" in parts["second"]["error"]
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


def test_a_command_is_told_its_time_and_each_part_is_on_disk_at_once(tmp_path):
    seen = f"import json; print(json.dumps(json.load(open({str(tmp_path / 'two.json')!r}))))"
    command = (*script("import sys; print('{\"given\": %s}' % sys.argv[1])"), "{seconds}")
    two = Job(name="two", parts={"a": command, "b": script(seen)}, estimate=0, limit=20)
    run([two], tmp_path)
    parts = record(tmp_path, "two")["parts"]
    assert parts["a"]["values"]["given"] == 20
    assert set(parts["b"]["values"]["parts"]) == {"a"}  # what it found when it ran


@pytest.mark.parametrize(
    ("error", "words"), [("RESOURCE_EXHAUSTED: 80 GiB", "less"), ("no such kernel", "other")]
)
def test_a_part_that_failed_is_tried_once_more_as_its_error_says(tmp_path, error, words):
    text = f"import sys; sys.exit({error!r}) if len(sys.argv) < 2 else print('{{}}')"
    retry = {"RESOURCE_EXHAUSTED": ("less",), "": ("other",)}
    again = Job(name="again", parts={"a": script(text)}, estimate=0, limit=20, retry=retry)
    summary = run([again], tmp_path)
    assert [row["part"] for row in summary["rows"]] == ["a", f"a {words}"]
    assert [row["status"] for row in summary["rows"]] == ["failed", "done"]


@pytest.mark.parametrize("smoke", [False, True])
def test_the_gpus_commands_name_files_that_exist(tmp_path, smoke):
    jobs = plan.gpu_jobs(tmp_path, smoke=smoke)
    assert [j.name for j in jobs] == ["attention", "jodiffusion", "pdm", "peer", "quickstart"]
    for words in (words for j in jobs for words in j.parts.values()):
        files = [w.split("=")[-1] if "data=" not in w else w.split("=")[1] for w in words]
        named = [f.partition(":")[0] for f in files if f.startswith(("configs/", "launch/"))]
        assert all((ROOT / file).is_file() for file in named), words
        assert named or words[1] == "-m"


@pytest.mark.thorough
def test_attention_that_is_right_is_ok_and_what_is_not_is_not(monkeypatch):
    found = bench_attention.measure("packed", 33, 1, 8, 16, "float32")
    assert found["ok"] and found["padded_to"] > found["tokens"] == 33
    assert max(found["errors"]["packed"].values()) < 1e-5  # float32 sums of 48 terms
    monkeypatch.setitem(bench_attention.BACKENDS, "packed", lambda q, k, v: v)
    assert not bench_attention.measure("packed", 33, 1, 8, 16, "float32")["ok"]
    refused = bench_attention.measure("cudnn", 33, 1, 2, 16, "bfloat16")
    assert not refused["ok"] and refused["error"].startswith("cudnn: ")


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("name", ["small", "large"])
def test_the_peer_has_the_sizes_of_the_papers(name):
    module, _ = bench_peer.NETWORKS[name]
    shapes = jax.eval_shape(lambda: bench_peer.initial(module, jax.random.key(0)))
    millions = sum(x.size for x in jax.tree.leaves(shapes)) / 1e6
    tokens = bench_peer.lengths(module)[0]
    assert (tokens, round(millions)) == {"small": (590, 45), "large": (2126, 954)}[name]


def test_every_parameter_goes_to_the_peer():
    module, _ = bench_peer.NETWORKS["tiny"]
    shapes = jax.eval_shape(lambda: bench_peer.initial(module, jax.random.key(0)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    weights = bench_peer.torch_weights(params)
    assert sum(w.size for w in weights.values()) == sum(x.size for x in jax.tree.leaves(params))


def test_the_peer_computes_the_same():
    torch = pytest.importorskip("torch")
    assert max(bench_peer.check(torch)["largest_difference"].values()) < 1e-4


def test_the_last_window_says_how_long_a_step_takes(tmp_path):
    lines = [{"step": 50, "step_ms": 900.0}, {"step": 100, "step_ms": 20.0}, {"step": 100}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert bench_quickstart.step_seconds(tmp_path / "metrics.jsonl") == 0.02


@pytest.mark.slow
def test_the_whole_plan_at_tiny_size(tmp_path):
    command = (sys.executable, "launch/benchmark.py", "--plan=gpu", "--smoke", f"--out={tmp_path}")
    done = subprocess.run(
        [*command, "--plan_minutes=30"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert {row["status"] for row in summary["rows"]} <= {"done", "absent"}
    for job in plan.gpu_jobs(tmp_path, smoke=True):
        parts = record(tmp_path, job.name)["parts"]
        assert set(parts) == set(job.parts)
    assert record(tmp_path, "attention")["parts"]["numerics"]["values"]["summary"]["ok"]
    sampled = record(tmp_path, "jodiffusion")["parts"]["sample"]["values"]
    assert sampled["steps"] == 2 and sampled["speed"]["mfu"] > 0
    assert (tmp_path / "quickstart_grid.png").stat().st_size > 0
    assert len(list(tmp_path.iterdir())) == 7

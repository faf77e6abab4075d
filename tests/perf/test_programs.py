"""The jobs that run a config's own programs: what they prepare is what a run would."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest

from jointseg_jax import profiling
from jointseg_jax.perf import (
    bench,
    bench_codec,
    bench_input,
    bench_page,
    bench_sampling,
    bench_startup,
    ceiling,
    subject,
)
from jointseg_jax.perf.harness import Request
from jointseg_jax.types import UserError


@pytest.fixture(scope="module")
def request_of(quickstart):
    def make(what, **fields):
        return Request(what=what, name="tiny", config=quickstart, warmups=1, calls=1, **fields)

    return make


@pytest.fixture(scope="module")
def trained(request_of):
    """One repetition of training, and its result."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(ceiling.SIZES, "cpu", (64,))
    here = bench.Here(request_of("train"))
    here.warm_up()
    here.repeat()
    yield here, here.result()
    here.close()
    monkeypatch.undo()


def test_random_rows_are_shaped_as_the_pipelines(request_of):
    found = subject.subject(request_of("train"))
    made = subject.random_rows(found, found.config["batch"], 0)
    with subject.real_batches(found) as batches:
        real = next(batches)
    real.pop("index")
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {
        k: (v.shape, v.dtype) for k, v in real.items()
    }
    assert all(len(np.unique(v)) > 3 for v in made.values())  # nothing constant
    assert not np.array_equal(made["image"], subject.random_rows(found, 8, 1)["image"])


def test_training_is_the_update_of_a_run(trained, request_of):
    here, found = trained
    state = here.job.actions["update"].run.__self__.state
    assert int(state.step) == 4  # the first call, a warm-up, a repetition, and one for the trace
    system = subject.subject(request_of("train")).system
    assert found.after["finite"] and math.isfinite(found.after["loss"])
    assert found.facts["tokens"] == max(s.stop for s in system.denoiser.spans().values())
    assert found.facts["batch"] == 8 and found.facts["flops_by"] == "3 x forward"
    speed, seconds = found.after["speed"], found.timings["update"].median
    flops = 3 * 8 * profiling.forward_flops(system)
    assert speed["tflop"] == pytest.approx(flops / 1e12, rel=1e-4)  # five digits are kept
    assert speed["mfu"] == pytest.approx(flops / seconds / 1e12 / speed["ceiling_tflops"], rel=1e-3)
    assert found.after["trace"]["operations"] and "data_wait" not in found.after
    assert any(part.startswith("backward") for part in found.after["trace"]["parts"])


def test_the_page_says_what_the_last_line_says(trained):
    _, found = trained
    text = bench_page.page([found], "train")
    for word in ("images/s", "MFU", "peak memory", "operation", "by part", "versions", "tokens"):
        assert word in text
    assert max(map(len, text.splitlines())) <= bench_page.WIDTH
    values = json.loads(json.dumps(found.values()))
    assert values["times"]["update"]["repetitions"] == 1
    both = bench_page.page([found, found], "train") + bench_page.comparison(
        found, found, {"update": {"median": 1.25, "min": 1.0, "max": 1.5}}
    )
    assert both.count("1.250 x  1.000 to 1.500 in one turn\n") == 1
    unsure = bench_page.comparison(
        found, found, {"update": {"median": 1.25, "min": 0.9, "max": 1.5}}
    )
    assert "the turns disagree on which is faster" in unsure


@pytest.mark.slow
def test_pairs_are_sampled_and_written(request_of):
    request = request_of("sample", steps=1, batch=8)
    job = bench_sampling.prepare(request)
    try:
        assert job.facts["steps"] == 1 and job.facts["decoded"]
        assert job.actions["sampler"].run(1) > 0 and job.actions["written"].run(2) > 0
        writer = job.actions["written"].run.__self__.writer
        assert writer.done == 16 and (writer.folder / "images/00000015.png").exists()
    finally:
        job.close()
    assert not writer.folder.exists()


def test_input_is_timed_by_its_own_source(request_of):
    job = bench_input.prepare(request_of("data", step_ms=1.0))
    try:
        medians = {name: action.run(2) / 2 for name, action in job.actions.items()}
        found = job.after(medians)
    finally:
        job.close()
    assert job.facts["source"] and job.facts["records"] > 1000
    assert found["pairs_per_second_per_core"] == pytest.approx(1 / medians["pair"], rel=1e-3)
    assert 0 <= found["data_wait"] < 1
    assert found["data_wait"] == pytest.approx(medians["wait"] / (medians["wait"] + 1e-3), rel=1e-2)


def test_a_device_waits_for_what_reading_takes_beyond_a_step(request_of, monkeypatch):
    job = bench_input.prepare(request_of("data", step_ms=100.0))
    now = [1000.0]

    def sleep(seconds):
        now[0] += seconds

    def slow(seconds):
        while True:
            sleep(seconds)
            yield {}

    clock = types.SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(bench_input, "time", clock)
    try:
        measured = job.actions["wait"].run.__self__
        measured.batches.close()
        for reading, waits in [(0.05, 0.0), (0.15, 0.05)]:
            measured.batches = slow(reading)
            assert measured.wait(5) / 5 == pytest.approx(waits)
    finally:
        measured.batches.close()


def test_round_trips_of_exact_codecs(request_of):
    job = bench_codec.prepare(request_of("codec", batch=2))
    found = job.facts["round_trip"]
    assert found["mask"]["miou"] == 1.0 and found["mask"]["pixels_kept"] == 1.0
    assert found["image"]["rmse"] == 0.0 and found["mask"]["parameters"] == "none"
    assert job.actions["mask encode"].run(1) > 0 and job.facts["input"] == "the config's data"


def test_labels_for_codecs_without_data(request_of, tmp_path):
    request = request_of("codec", batch=2)
    absent = {**request.config["data"], "train": {"name": "folders", "root": str(tmp_path / "no")}}
    found = subject.subject(request)._replace(config={**request.config, "data": absent})
    batch, origin = bench_codec.inputs(found, 2)
    assert origin == "random images and blobs" and batch["labels"].shape == (2, 16, 16)
    assert batch["labels"].max() < len(found.known.classes)


def test_what_cannot_be_measured_is_refused(request_of):
    bare = request_of("codec").config
    alone = {**bare, "steps": 1}
    with pytest.raises(UserError, match="steps must be 2 or more"):
        bench_startup.prepare(dataclasses.replace(request_of("startup"), config=alone))
    with pytest.raises(UserError, match=r"--batch=12: must be a multiple of the 8 devices"):
        bench_sampling.prepare(request_of("sample", batch=12))


def test_a_sampler_without_a_result_is_refused(request_of):
    config = request_of("sample").config
    cells = {"field": "cells", "codec": {"name": "latents"}, "tokens": {"patch": 1}}
    stream = config["system"]["streams"]["image"] | cells
    system = {**config["system"], "streams": {"image": stream}}
    system["denoiser"] = {k: v for k, v in system["denoiser"].items() if k != "share"}
    request = dataclasses.replace(request_of("sample"), config={**config, "system": system})
    with pytest.raises(UserError, match="compiled to nothing"):
        bench_sampling.prepare(request)


def test_a_started_run_has_the_config_it_was_given(request_of):
    job = bench_startup.prepare(request_of("startup", launcher="launch/train.py"))
    try:
        starting = job.actions["cold"].run.__self__
        names = {}
        exec((starting.root / "config.py").read_text(), names)
        assert names["get_config"]().to_dict() == starting.config
        assert starting.config["log"] == {"every": 1} and not starting.config["finish"]["num"]
    finally:
        job.close()


def test_an_update_is_seen_when_its_line_is_whole(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert not bench_startup._updated(file)
    file.write_text('{"step": 1, "step_ms": 3}\n{"step": 2, "loss": 1')
    assert not bench_startup._updated(file)
    file.write_text('{"step": 1, "step_ms": 3}\n{"step": 2, "loss": 1.5}\n')
    assert bench_startup._updated(file)


def test_a_run_that_ends_without_an_update_is_quoted(request_of, tmp_path):
    launcher = tmp_path / "train.py"
    launcher.write_text("import sys; sys.exit('no such data')")
    job = bench_startup.prepare(request_of("startup", launcher=str(launcher)))
    with pytest.raises(UserError, match=r"(?s)no update after .* It said:\nno such data"):
        job.actions["cold"].run(1)
    job.close()

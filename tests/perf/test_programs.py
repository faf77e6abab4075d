"""The jobs that run a config's own programs: what they prepare is what a run would."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest

from jointseg_jax import profiling
from jointseg_jax.config import RunConfig
from jointseg_jax.perf import (
    abstract,
    bench,
    bench_codec,
    bench_input,
    bench_model,
    bench_startup,
    harness,
    page,
)
from jointseg_jax.perf.harness import BenchConfig
from jointseg_jax.types import UserError


@pytest.fixture(scope="module")
def config_of(quickstart):
    def make(what, **fields):
        return BenchConfig(what=what, name="tiny", config=quickstart, warmups=1, calls=1, **fields)

    return make


@pytest.fixture(scope="module")
def trained(config_of):
    """One repetition of training, and its result."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(harness.SIZES, "cpu", (64,))
    here = bench.InProcess(config_of("train"))
    here.warm_up()
    here.repeat()
    yield here, here.result()
    here.close()
    monkeypatch.undo()


def test_random_rows_are_shaped_as_the_pipelines(config_of):
    found = abstract.model_under_test(config_of("train"))
    shapes = abstract.batch_shapes(found.config, found.system, found.config.batch)
    made = abstract.random_rows(found.info, shapes, 0)
    with abstract.real_batches(found.config, found.info) as batches:
        real = next(batches)
    real.pop("index")
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {
        k: (v.shape, v.dtype) for k, v in real.items()
    }
    assert all(len(np.unique(v)) > 3 for v in made.values())  # nothing constant
    assert not np.array_equal(made["image"], abstract.random_rows(found.info, shapes, 1)["image"])


@pytest.mark.thorough
def test_training_is_the_update_of_a_run(trained, config_of):
    here, found = trained
    state = here.benchmark.state
    assert int(state.step) == 4  # the first call, a warm-up, a repetition, and one for the trace
    system = abstract.model_under_test(config_of("train")).system
    assert found.after["finite"] and math.isfinite(found.after["loss"])
    assert found.facts["tokens"] == max(s.stop for s in system.denoiser.spans().values())
    assert found.facts["batch"] == 8 and found.facts["flops_by"] == "3.5 x forward"
    speed, seconds = found.after["speed"], found.timings["update"].median
    assert system.denoiser.self_condition  # half of the rows have a forward pass more
    flops = 3.5 * 8 * profiling.forward_flops(system)
    assert speed["tflop"] == pytest.approx(flops / 1e12, rel=1e-4)  # five digits are kept
    assert speed["mfu"] == pytest.approx(flops / seconds / 1e12 / speed["ceiling_tflops"], rel=1e-3)
    assert found.after["trace"]["operations"] and "data_wait" not in found.after
    assert any(part.startswith("backward") for part in found.after["trace"]["parts"])


@pytest.mark.thorough
def test_the_page_says_what_the_last_line_says(trained):
    _, found = trained
    text = page.bench_page([found], "train")
    for word in ("images/s", "MFU", "peak memory", "operation", "by part", "versions", "tokens"):
        assert word in text
    assert max(map(len, text.splitlines())) <= page.WIDTH
    values = json.loads(json.dumps(found.values()))
    assert values["times"]["update"]["repetitions"] == 1
    both = page.bench_page([found, found], "train") + page.comparison(
        found, found, {"update": {"median": 1.25, "min": 1.0, "max": 1.5}}
    )
    assert both.count("1.250 x  1.000 to 1.500 in one turn\n") == 1
    unsure = page.comparison(found, found, {"update": {"median": 1.25, "min": 0.9, "max": 1.5}})
    assert "the turns disagree on which is faster" in unsure


@pytest.mark.slow
def test_pairs_are_sampled_and_written(config_of):
    request = config_of("sample", steps=1, batch=8)
    job = bench_model.Sampling(request)
    try:
        assert job.facts["steps"] == 1 and job.facts["decoded"]
        assert job.actions["sampler"].run(1) > 0 and job.actions["written"].run(2) > 0
        writer = job.writer
        assert writer.done == 16 and (writer.folder / "images/00000015.png").exists()
    finally:
        job.close()
    assert not writer.folder.exists()


def test_input_is_timed_by_its_own_source(config_of):
    job = bench_input.Input(config_of("data", step_ms=1.0))
    try:
        medians = {name: action.run(2) / 2 for name, action in job.actions.items()}
        found = job.after(medians)
    finally:
        job.close()
    assert job.facts["source"] and job.facts["records"] > 1000
    assert found["pairs_per_second_per_core"] == pytest.approx(1 / medians["pair"], rel=1e-3)
    assert 0 <= found["data_wait"] < 1
    assert found["data_wait"] == pytest.approx(medians["wait"] / (medians["wait"] + 1e-3), rel=1e-2)


def test_a_device_waits_for_what_reading_takes_beyond_a_step(config_of, monkeypatch):
    job = bench_input.Input(config_of("data", step_ms=100.0))
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
        job.batches.close()
        for reading, waits in [(0.05, 0.0), (0.15, 0.05)]:
            job.batches = slow(reading)
            assert job.wait(5) / 5 == pytest.approx(waits)
    finally:
        job.batches.close()


def test_round_trips_of_exact_codecs(config_of):
    job = bench_codec.Codecs(config_of("codec", batch=2))
    found = job.facts["round_trip"]
    assert found["mask"]["miou"] == 1.0 and found["mask"]["pixels_kept"] == 1.0
    assert found["image"]["rmse"] == 0.0 and found["mask"]["parameters"] == "none"
    assert job.actions["mask encode"].run(1) > 0 and job.facts["input"] == "the config's data"


def test_labels_for_codecs_without_data(config_of, tmp_path):
    request = config_of("codec", batch=2)
    absent = {"data.train": {"name": "folders", "root": str(tmp_path / "no")}}
    found = abstract.model_under_test(request)._replace(
        config=abstract.run_config(request).replace(absent)
    )
    batch, origin = bench_codec.inputs(found, 2)
    assert origin == "random images and blobs" and batch["labels"].shape == (2, 16, 16)
    assert batch["labels"].max() < len(found.info.classes)


def test_what_cannot_be_measured_is_refused(config_of):
    bare = config_of("codec").config
    alone = {**bare, "steps": 1}
    with pytest.raises(UserError, match="steps must be 2 or more"):
        bench_startup.Startup(dataclasses.replace(config_of("startup"), config=alone))
    with pytest.raises(UserError, match=r"--batch=12: must be a multiple of the 8 devices"):
        bench_model.Sampling(config_of("sample", batch=12))


@pytest.mark.thorough
def test_a_sampler_without_a_result_is_refused(config_of):
    config = config_of("sample").config
    cells = {"field": "cells", "codec": {"name": "latents"}, "tokens": {"patch": 1}}
    stream = config["system"]["streams"]["image"] | cells
    network = {"name": "uvit", "width": 16, "depth": 1, "heads": 2, "time_tokens": ("image",)}
    system = {**config["system"], "streams": {"image": stream}, "denoiser": network}
    request = dataclasses.replace(config_of("sample"), config={**config, "system": system})
    with pytest.raises(UserError, match="compiled to nothing"):
        bench_model.Sampling(request)


def test_a_started_run_has_the_config_it_was_given(config_of):
    job = bench_startup.Startup(config_of("startup", launcher="launch/train.py"))
    try:
        names = {}
        exec((job.root / "config.py").read_text(), names)
        config = RunConfig.parse(names["get_config"]().to_dict())
        assert (config.log.every, config.finish.num, config.preview.every) == (1, 0, 0)
        assert config.optimizer == config_of("startup").config["optimizer"]
    finally:
        job.close()


def test_an_update_is_seen_when_its_line_is_whole(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert not bench_startup._updated(file)
    file.write_text('{"step": 1, "step_ms": 3}\n{"step": 2, "loss": 1')
    assert not bench_startup._updated(file)
    file.write_text('{"step": 1, "step_ms": 3}\n{"step": 2, "loss": 1.5}\n')
    assert bench_startup._updated(file)


def test_a_run_that_ends_without_an_update_is_quoted(config_of, tmp_path):
    launcher = tmp_path / "train.py"
    launcher.write_text("import sys; sys.exit('no such data')")
    job = bench_startup.Startup(config_of("startup", launcher=str(launcher)))
    with pytest.raises(UserError, match=r"(?s)no update after .* It said:\nno such data"):
        job.actions["cold"].run(1)
    job.close()

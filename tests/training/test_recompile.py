"""A run compiles its update once: no batch is shorter than another, nothing else comes up late."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jointseg_jax import sharding
from jointseg_jax.config import RunConfig
from jointseg_jax.training import clock, loop
from jointseg_jax.training.clock import Telemetry

SIDE, ROWS, RECORDS, STEPS = 8, 4, 6, 8


@pytest.fixture
def config(monkeypatch):
    """The quickstart's smoke run, smaller, on one device; six records make one and a half batches.

    Everything that a run does now and then, it does within two steps.
    """
    make = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", make)
    path = Path(__file__).parents[2] / "configs/quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.get_config("smoke").to_dict()
    small = {"size": SIDE, "count": RECORDS, "thing_size": (0.5, 0.6), "max_things": 1}
    found["data"]["train"] = {"name": "scenes", "split": "train", **small}
    found["system"] |= {"size": (SIDE, SIDE)}
    found["system"]["text"] |= {"width": 4, "length": 2}
    found["system"]["denoiser"] |= {"width": 8, "depth": 1, "heads": 1, "time_mlp": False}
    found["optimizer"] = {"name": "adamw", "schedule": {"name": "constant", "lr": 1e-3}}
    return found | {
        "batch": ROWS,
        "steps": STEPS,
        "log": {"every": 1},
        "checkpoint": {"every": 2, "keep": 2},
        "preview": {"every": 0, "count": ROWS},
    }


@pytest.mark.thorough
def test_nothing_is_compiled_after_the_second_step(config, tmp_path, monkeypatch, compilations):
    batches, known = [], []

    class Watched(Telemetry):
        """Telemetry that notes, update by update, which rows came and what was compiled so far."""

        def add(self, step, metrics, indices):
            batches.append(indices.tolist())
            known.append(len(compilations))
            super().add(step, metrics, indices)

    monkeypatch.setattr(clock, "Telemetry", Watched)
    assert loop.train(RunConfig.parse(config), tmp_path) == 0
    assert len(batches) == STEPS and compilations.count("jit(update)") == 1
    assert compilations[known[2] : known[-1]] == []
    # the pipeline's part in this: epochs end within batches, and none is cut short there
    assert {len(rows) for rows in batches} == {ROWS}
    epoch = [index for rows in batches for index in rows][:RECORDS]
    assert sorted(epoch) == list(range(RECORDS))


def test_compilations_are_noticed(compilations):
    double = jax.jit(lambda x: 2 * x)
    rows = [jnp.ones(n) for n in (3, 3, 5)]
    compilations.clear()
    for x in rows:
        double(x)
    assert compilations == ["jit(<lambda>)"] * 2

"""G9: no two samples begin with the same noise, whichever process makes them."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from jointseg_jax import build
from jointseg_jax.config import SystemConfig
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.generation.sampler import one_ahead, pending_batches
from jointseg_jax.rng import row_keys, sample_keys

PDM = Path(__file__).parents[2] / "configs/pdm.py"
COUNT = 100_000
CHUNK = 10_000


@pytest.fixture(scope="module")
def system():
    """Two streams, with as little noise as they can have."""
    config = runpy.run_path(str(PDM))["get_config"]("smoke").to_dict()
    config["system"] |= {"size": (4, 4), "text": {"name": "words", "width": 8, "length": 6}}
    for stream in config["system"]["streams"].values():
        stream["tokens"]["patch"] = 4
    return build.system(
        SystemConfig.parse(config["system"]),
        DatasetInfo(Classes(names=("sky", "road", "car")), (), ()),
    )


def distinct(rows):
    """How many rows differ from all others."""
    plain = np.ascontiguousarray(rows)
    return len(np.unique(plain.view(f"V{plain[0].nbytes}").ravel()))


def noises(system, keys):
    """The first four numbers of what each stream begins with: if these differ, all do."""
    return {k: system.source(k, keys).reshape(keys.shape[0], -1)[:, :4] for k in system.streams}


def test_no_two_samples_begin_alike(system):
    begin = jax.jit(lambda seed, indices: noises(system, sample_keys(seed, indices)))
    seen = []
    for seed, count in ((0, COUNT), (1, CHUNK)):
        for first in range(0, count, CHUNK):
            indices = np.arange(first, first + CHUNK, dtype=np.uint32)
            seen += jax.device_get(list(begin(np.uint32(seed), indices).values()))
    rows = np.concatenate(seen)
    assert len(rows) == 2 * (COUNT + CHUNK)
    assert distinct(rows) == len(rows)


def test_no_two_rows_of_training_draw_alike(system):
    draw = jax.jit(lambda step, rows: noises(system, row_keys(0, step, rows)))
    rows = np.arange(1000, dtype=np.uint32)
    seen = [x for step in range(10) for x in jax.device_get(draw(step, rows)).values()]
    assert distinct(np.concatenate(seen)) == 2 * 10 * 1000


@pytest.mark.parametrize("processes", [1, 2, 4, 7])
@pytest.mark.parametrize("start", [0, 13])
def test_processes_share_out_the_indices(monkeypatch, processes, start):
    seen, counts = [], set()
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        own = list(pending_batches(start, 50, 4))
        counts.add(len(own))
        for indices, needed in own:
            assert len(indices) in (0, 4) and len(needed) == len(indices)
            seen += indices[needed].tolist()
    assert sorted(seen) == list(range(start, 50)) and len(counts) == 1


def test_a_batch_is_started_before_the_one_before_it_is_written():
    """The devices make the next one meanwhile."""
    events = []
    started = (events.append(f"start {i}") or i for i in range(3))
    for i in one_ahead(started):
        events.append(f"write {i}")
    assert events == ["start 0", "start 1", "write 0", "start 2", "write 1", "write 2"]
    assert list(one_ahead(())) == []

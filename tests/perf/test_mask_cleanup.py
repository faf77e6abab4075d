"""The original's clean-up the slow way, and the maps that it is timed on."""

import numpy as np
import pytest

from jointseg_jax.annotations import masks
from jointseg_jax.perf import bench_masks
from jointseg_jax.perf.harness import BenchConfig


def test_the_plain_way_by_hand():
    labels = np.zeros((7, 9), np.uint8)
    labels[1:3, 1:8] = 3
    labels[1, 4] = 2  # inside 3: becomes 3 at its turn, before 3 is looked at
    labels[5, 4] = 0  # background is never filled
    labels[4:7, 0:9] = 5
    labels[5, 4] = 0
    want = labels.copy()
    want[1, 4] = 3
    np.testing.assert_array_equal(bench_masks.absorb_plain(labels, 10), want)
    tie = np.array([[5, 5, 5, 9, 3, 3]] * 3, np.uint8)
    assert (bench_masks.absorb_plain(tie, 4)[:, 3] == 3).all()  # of equals the smallest
    np.testing.assert_array_equal(bench_masks.absorb_plain(tie, 3), tie)  # strictly smaller
    alone = np.full((2, 2), 7, np.uint8)
    np.testing.assert_array_equal(bench_masks.absorb_plain(alone, 99), alone)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_we_do_faster(seed):
    labels = bench_masks.label_map(48, 150, seed=seed)
    for area in (2, 8, 50):
        want = bench_masks.absorb_plain(labels, area)
        np.testing.assert_array_equal(masks.absorb(labels, area), want)
        np.testing.assert_array_equal(bench_masks.crops(labels, area), want)
        assert area < 8 or (want != labels).any()


def test_maps_have_as_many_regions_as_they_say():
    number = bench_masks.LEVELS["noisy"]
    labels = bench_masks.label_map(512, number)
    assert labels.shape == (512, 512) and labels.dtype == np.uint8
    assert number <= len(bench_masks._sizes(labels)) <= 1.02 * number
    first, second = (bench_masks.label_map(128, 200) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_job_checks_every_way(monkeypatch):
    bench = BenchConfig(what="masks", name="maps", size=64, area=20)
    job = bench_masks.Cleanup(bench)
    assert job.facts["all_exact"] and set(job.facts["exact"]) == set(bench_masks.LEVELS)
    assert set(job.actions) == {f"{k} {w}" for k in bench_masks.LEVELS for w in bench_masks.ways()}
    medians = {name: 4.0 if name.endswith("plain") else 0.5 for name in job.actions}
    found = job.after(medians)["times_as_fast_as_plain"]
    assert {n for row in found.values() for n in row.values()} == {8.0}
    monkeypatch.setattr(bench_masks, "crops", lambda labels, area: labels)
    facts = bench_masks.Cleanup(bench).facts
    assert not facts["all_exact"] and facts["exact"]["noisy"] == {"crops": False, "compiled": True}

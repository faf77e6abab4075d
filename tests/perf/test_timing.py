"""Which calls count, what they come to, and in which order configs take turns."""

import math
import time

import pytest

from jointseg_jax.perf import bench, harness
from jointseg_jax.perf.harness import Action, BenchConfig, on_processor, wall
from jointseg_jax.types import UserError

MASKS = BenchConfig(what="masks", name="maps", size=64, warmups=1, calls=1)


def scripted(seconds):
    """An action that takes so many seconds by a clock that nobody waits for."""
    asked, left = [], iter(seconds)

    def run(count):
        asked.append(count)
        return sum(next(left) for _ in range(count))

    return Action(run, 4), asked


def test_first_and_warm_up_calls_do_not_count():
    action, asked = scripted([9.0, 2.0, 0.5, *[0.4] * 2, *[0.1] * 2, *[0.2] * 2])
    timed = harness.Timing(images=action.images)
    timed.warm_up(action, 2, 0)
    for _ in range(3):
        timed.repeat(action)
    assert asked == [1, 1, 1, 2, 2, 2]  # 0.5 s a call: two make a second
    assert (timed.first, timed.warmups) == (9.0, [2.0, 0.5])
    assert timed.repetitions == [0.4, 0.1, 0.2] and timed.median == 0.2
    values = timed.values()
    assert (values["min_ms"], values["median_ms"], values["max_ms"]) == (100.0, 200.0, 400.0)
    assert values["images_per_second"] == 20.0  # 4 images in 0.2 s


@pytest.mark.parametrize(("seconds", "calls"), [(1e-9, harness.MAX_CALLS), (0.3, 4), (5.0, 1)])
def test_a_repetition_is_about_a_second(seconds, calls):
    timed = harness.Timing(images=0)
    timed.warm_up(Action(lambda count: count * seconds), 1, 0)
    assert timed.calls == calls


def test_what_has_no_warm_up_counts_from_the_first_call():
    timed = harness.Timing(images=0)
    timed.warm_up(Action(lambda count: 7.0, warm=False), 2, 0)
    timed.repeat(Action(lambda count: 7.0))
    assert math.isnan(timed.first) and timed.repetitions == [7.0]
    assert "first_ms" not in timed.values() and "images_per_second" not in timed.values()


def test_ratio_of_medians_and_of_turns():
    found = harness.ratio([1.0, 2.0, 4.0], [3.0, 3.0, 3.0])
    assert found == {"median": 1.5, "min": 0.75, "max": 3.0}  # above 1: the first is faster


def test_clocks_by_wall_and_by_processor():
    spin = on_processor(lambda: sum(range(20_000)))(3)
    rest = on_processor(lambda: time.sleep(0.02))(2)
    assert wall(lambda: time.sleep(0.02))(2) >= 0.04  # sleep is never shorter
    assert spin > 0 and rest < 0.04


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(UserError, match="--batch=6: must be a multiple of the 4 devices"):
        BenchConfig(what="sample", name="a", batch=6).batch_of(16, 4)


class Noted(bench.InProcess):
    """A real measurement that leaves a note of its turns."""

    notes: list = []  # noqa: RUF012

    def warm_up(self):
        self.notes.append(f"{self.bench.name} warm")
        super().warm_up()

    def repeat(self):
        self.notes.append(self.bench.name)
        super().repeat()

    def close(self):
        self.notes.append(f"{self.bench.name} closed")
        super().close()


@pytest.mark.thorough
def test_configs_take_turns(monkeypatch):
    monkeypatch.setattr(bench, "Subprocess", Noted)
    one, other = (BenchConfig(**vars(MASKS) | {"name": n}) for n in "AB")
    results = bench.interleave([one, other], 2, lambda text: None)
    assert Noted.notes == [*("A warm", "B warm"), *"ABAB", *("B closed", "A closed")]
    assert [len(t.repetitions) for r in results for t in r.timings.values()] == [2] * 24
    ratios = bench.ratios(*results)
    assert set(ratios) == set(results[0].timings)


def test_ratios_are_of_one_image():
    def result(images, seconds):
        timed = harness.Timing(images=images, repetitions=[seconds])
        return bench.Result("r", {}, {}, {"update": timed}, {})

    found = bench.ratios(result(4, 1.0), result(8, 1.0))
    assert found["update"]["median"] == 0.5  # as long for twice as many: the second is faster


@pytest.mark.thorough
def test_a_config_in_a_process_of_its_own():
    child = bench.Subprocess(MASKS)
    try:
        child.warm_up()
        child.repeat()
        found = child.result()
    finally:
        child.close()
    assert child.process.exitcode == 0
    assert found.facts["all_exact"] and len(found.timings["noisy plain"].repetitions) == 1


@pytest.mark.thorough
def test_an_error_in_another_process_is_reported_here():
    with pytest.raises(UserError, match=r"maps: config.batch, .* config.system: missing"):
        bench.Subprocess(BenchConfig(what="train", name="maps"))


@pytest.mark.thorough
def test_a_process_that_ends_by_itself_is_reported():
    child = bench.Subprocess(MASKS)
    child.process.kill()
    with pytest.raises(RuntimeError, match="the process of maps ended with status -9"):
        child.repeat()
    child.close()

"""Where the time went, on a clock that the test sets."""

import json
import logging
import types

import pytest

from jointseg_jax.training import goodput
from jointseg_jax.training.goodput import PHASES, Goodput, evaluation, log_summary, records, summary


@pytest.fixture
def clock(monkeypatch):
    """Seconds since the start; a test moves it on with ``clock.now += ...``."""
    clock = types.SimpleNamespace(now=1000.0)
    own = types.SimpleNamespace(perf_counter=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr(goodput, "time", own)
    return clock


def spend(run, clock, phase, seconds):
    run.enter(phase)
    clock.now += seconds


def launch(workdir, clock, begin, *reached):
    """A launch that takes 1 s to start, 2 s to compile, and 5 + 0.5 + 0.25 s for each step."""
    run = Goodput(workdir)
    clock.now += 1
    run.begin(begin)
    spend(run, clock, "compile", 2)
    for step in reached:
        train(run, clock, step)
    return run


def train(run, clock, step):
    spend(run, clock, "data", 0.5)
    spend(run, clock, "step", 5)
    spend(run, clock, "save", 0.25)
    run.reached(step)


def test_every_second_is_of_one_phase(tmp_path, clock):
    run = launch(tmp_path, clock, 0, 1, 2)
    spend(run, clock, "evaluation", 7)
    run.reached(2)
    found = summary(tmp_path)
    expected = {"start": 1, "compile": 2, "data": 1, "step": 10, "save": 0.5, "evaluation": 7}
    assert found.seconds == pytest.approx(expected)
    assert found.total == pytest.approx(clock.now - 1000)
    assert found.goodput == pytest.approx(10 / 21.5)
    assert (found.step, found.launches, found.lost, found.lost_steps, found.down) == (2, 1, 0, 0, 0)


def test_what_went_on_behind_the_devices_work_is_part_of_it(tmp_path, clock):
    run = launch(tmp_path, clock, 0)
    for behind in (False, True):
        spend(run, clock, "data", 3)
        run.enter("step", behind=behind)
        clock.now += 5
    run.reached(2)
    assert summary(tmp_path).seconds["data"] == pytest.approx(3)
    assert summary(tmp_path).seconds["step"] == pytest.approx(13)


def test_steps_that_a_restart_throws_away_are_lost_and_the_time_between_stands_apart(
    tmp_path, clock
):
    run = launch(tmp_path, clock, 0, 1, 2, 3)
    clock.now += 4  # done after the last record, then killed: nobody knows
    del run
    clock.now += 60
    launch(tmp_path, clock, 1, 2)
    found = summary(tmp_path)
    assert (found.step, found.launches, found.lost_steps) == (2, 2, 2)
    assert found.lost == pytest.approx(2 * 5.75)
    assert found.down == pytest.approx(64)
    assert found.seconds["step"] == pytest.approx(2 * 5)  # steps 1 and 2 count, once
    assert (found.seconds["start"], found.seconds["compile"]) == (2, 4)
    assert found.total == pytest.approx(clock.now - 1000 - 64)


def test_a_restart_at_the_last_step_loses_nothing(tmp_path, clock):
    launch(tmp_path, clock, 0, 1, 2)
    launch(tmp_path, clock, 2, 3)
    found = summary(tmp_path)
    assert (found.lost, found.lost_steps, found.step, found.launches) == (0, 0, 3, 2)
    assert found.goodput == pytest.approx(15 / (clock.now - 1000))


def test_a_launch_killed_before_its_first_save_has_lost_all_its_steps(tmp_path, clock):
    launch(tmp_path, clock, 0, 1, 2)
    launch(tmp_path, clock, 0, 1)
    found = summary(tmp_path)
    assert (found.lost_steps, found.seconds["step"]) == (2, 5)
    assert found.seconds["compile"] == 4  # that of the first launch was compilation all the same


def test_what_was_lost_is_lost_once(tmp_path, clock):
    """After a restart at 2 of 3, the checkpoint of 2 turns out damaged, and that of 1 is taken."""
    launch(tmp_path, clock, 0, 1, 2, 3)
    launch(tmp_path, clock, 2, 3)
    launch(tmp_path, clock, 1)
    found = summary(tmp_path)
    assert found.lost_steps == 1 + 2
    assert found.lost == pytest.approx(3 * 5.75)
    assert found.seconds["step"] == 5
    assert found.total == pytest.approx(clock.now - 1000 - 2)  # compiling, not recorded yet


def test_going_back_within_a_launch_loses_steps_too(tmp_path, clock):
    run = launch(tmp_path, clock, 0, 1, 2)
    run.begin(1)
    train(run, clock, 2)
    found = summary(tmp_path)
    assert (found.launches, found.lost_steps, found.lost) == (1, 1, pytest.approx(5.75))


def windows(run, clock, *seconds):
    """Log points every ten steps, after so many seconds of stepping each; the last step."""
    step = 0
    for spent in seconds:
        step += 10
        spend(run, clock, "data", 0.1)
        spend(run, clock, "step", spent)
        run.logged(step)
    return step


def test_a_window_far_longer_than_others_was_stalled(tmp_path, clock, caplog):
    """F19."""
    run = Goodput(tmp_path)
    run.begin(0)
    windows(run, clock, 9, 1, 1.2, 1, 1, 21.3, 1)
    found = summary(tmp_path)
    assert found.stalled == pytest.approx(20.3)
    assert found.seconds["step"] == pytest.approx(35.5)  # it stays part of its phase
    assert " steps 35.5 s (stalled for 20.3 s)" in found.line()
    assert caplog.messages == [
        "steps 50 to 60 took 20.3 s longer than usual: this host was stopped or slow, or it waited "
        "for another that was"
    ]
    windows(Goodput(tmp_path), clock, 1, 1, 1, 1, 31)
    assert summary(tmp_path).stalled == pytest.approx(20.3 + 30)


@pytest.mark.parametrize(
    "seconds", [(1, 1, 1, 1, 9), (100, 100, 100, 100, 115), (1, 1, 300), (40, 30, 20, 10, 5)]
)
def test_windows_that_were_not_stalled(tmp_path, clock, seconds):
    """Short ones, usual ones, the first ones, and ever shorter ones."""
    run = Goodput(tmp_path)
    run.begin(0)
    windows(run, clock, *seconds)
    assert summary(tmp_path).stalled == 0 and "stalled" not in summary(tmp_path).line()


def test_a_clock_that_jumps_moves_no_second_from_its_phase(tmp_path, clock, monkeypatch):
    """F19: the time of day may leap by hours; what is measured is measured on another clock."""
    day = iter([0.0, 7200.0, 100.0, 100.0])
    own = types.SimpleNamespace(perf_counter=lambda: clock.now, time=lambda: next(day))
    monkeypatch.setattr(goodput, "time", own)
    launch(tmp_path, clock, 0, 1, 2, 3)
    found = summary(tmp_path)
    assert (found.seconds["step"], found.down, found.launches) == (15, 0, 1)


def test_evaluation_after_the_last_step_is_part_of_the_run(tmp_path, clock):
    launch(tmp_path, clock, 0, 1)
    with evaluation(tmp_path):
        clock.now += 30
    found = summary(tmp_path)
    assert (found.seconds["evaluation"], found.step, found.launches) == (30, 1, 1)


def test_one_line_and_one_record(tmp_path, clock, caplog):
    caplog.set_level(logging.INFO, logger="jointseg_jax")
    log_summary(tmp_path)
    assert caplog.messages == []  # nothing was recorded
    launch(tmp_path, clock, 0, *range(1, 31))
    clock.now += 3661
    launch(tmp_path, clock, 20, 21)
    log_summary(tmp_path, since=clock.now + 1)
    assert caplog.messages == []
    log_summary(tmp_path)
    assert caplog.messages == [
        "goodput 57.0 % of 3:04 min in 2 launches: steps 1:45 min, data wait 10.5 s, compile "
        "4.0 s, save 5.2 s, evaluation 0.0 s, start 2.0 s, lost to restarts 57.5 s (10 steps), "
        "not counted: 1:01:01 h between launches"
    ]
    last = json.loads((tmp_path / goodput.FILE).read_text().splitlines()[-1])["summary"]
    assert last["goodput"] == pytest.approx(105 / 184.25, abs=1e-3)
    assert (last["lost_steps"], last["launches"], last["step"]) == (10, 2, 21)
    parts = [last[f"{phase}_s"] for phase in (*PHASES, "lost")]
    assert sum(parts) == pytest.approx(last["total_s"], abs=0.01)  # each is rounded to 1 ms
    before = summary(tmp_path)
    log_summary(tmp_path)
    assert summary(tmp_path) == before  # a summary is no record


def test_a_torn_or_foreign_line_harms_no_other(tmp_path, clock):
    launch(tmp_path, clock, 0, 1)
    path = tmp_path / goodput.FILE
    with path.open("a") as file:
        file.write('[1]\n{"launch": 1, "time": 3, "seconds": {}}\n{"step": 9, "lau')
    launch(tmp_path, clock, 1, 2)
    assert [r.get("step") for r in records(path)] == [None, 1, None, 2]
    assert summary(tmp_path).launches == 2


def test_other_processes_write_nothing(tmp_path, clock):
    run = Goodput(tmp_path, writes=False)
    run.begin(0)
    with evaluation(tmp_path, writes=False):
        run.reached(1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_take_the_record_does_not_end_the_run(tmp_path):
    (tmp_path / goodput.FILE).mkdir()
    with pytest.raises(IsADirectoryError):
        (tmp_path / goodput.FILE).open("ab+")
    goodput.append(tmp_path / goodput.FILE, {"step": 1})

"""What a log point says, on a clock that the test sets."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax import chips
from jointseg_jax.chips import peak_flops
from jointseg_jax.training import clock as clocks
from jointseg_jax.training.clock import Telemetry

TOTAL, BATCH = 100, 8


@pytest.fixture
def clock(monkeypatch):
    """Seconds since the start; a test moves it on with ``clock.now += ...``."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(clocks, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def collect(steps, *, flops=None, clock=None, seconds=0.0, bad=()):
    """A telemetry that has seen ``steps``; the loss of step ``n`` is ``n``."""
    found = Telemetry(total=TOTAL, batch=BATCH, flops=flops)
    for step in steps:
        add(found, step, bad=step in bad)
        if clock:
            clock.now += seconds
    return found


def add(found, step, bad=False):
    loss = jnp.float32(jnp.nan if bad else step)
    metrics = {"loss": loss, "grad_norm": 2 * loss, "finite": jnp.asarray(not bad)}
    found.add(step, metrics, np.arange(BATCH) + 100 * step)


# ----------------------------------------------------------------------------- windows


def test_scalars_are_means_over_the_window():
    scalars, bad = collect(range(4)).read(leave=0)
    assert (scalars["loss"], scalars["grad_norm"], bad) == (1.5, 3.0, [])
    assert "finite" not in scalars
    assert all(type(v) is float for v in scalars.values())


def test_each_window_starts_afresh():
    found = collect(range(4))
    found.read(leave=0)
    add(found, 4)
    add(found, 6)
    assert found.read(leave=0)[0]["loss"] == 5


def test_the_newest_step_waits_for_the_next_window():
    found = collect(range(4))
    assert found.read()[0]["loss"] == 1.0  # steps 0, 1, 2
    add(found, 5)
    assert found.read()[0]["loss"] == 3.0  # step 3
    assert found.read(leave=0)[0]["loss"] == 5.0
    assert "loss" not in found.read(leave=0)[0]


def test_what_is_left_is_not_read_from_the_device():
    found = collect(range(2))
    gone = jnp.zeros(2)
    gone.delete()  # to read it is an error
    found.add(2, {"loss": gone, "finite": gone}, np.arange(BATCH))
    assert found.read(leave=1)[0]["loss"] == 0.5
    with pytest.raises(RuntimeError, match="deleted"):
        found.read(leave=0)


def test_a_window_of_one_step_has_that_steps_loss():
    """So that with ``log.every=1`` every line has its loss, the first after a resume too."""
    window = collect([7])
    scalars, bad = window.read(leave=1)
    assert scalars["loss"] == 7.0 and bad == [] and scalars["step_ms"] > 0
    assert "loss" not in window.read(leave=1)[0]  # nothing was done since


# -------------------------------------------------------------------------- not finite


def test_steps_that_are_not_finite_are_named_with_their_records_and_kept_out_of_means():
    scalars, bad = collect(range(4), bad=(1, 3)).read(leave=0)
    assert scalars["loss"] == 1.0  # steps 0 and 2
    assert [step for step, _ in bad] == [1, 3]
    for step, records in bad:
        np.testing.assert_array_equal(records, np.arange(BATCH) + 100 * step)


def test_a_step_that_is_not_finite_is_reported_once_and_when_it_is_read():
    found = collect(range(3), bad=(2,))
    assert found.read(leave=1)[1] == []
    assert [step for step, _ in found.read(leave=0)[1]] == [2]
    assert found.read(leave=0)[1] == []


def test_a_window_without_a_finite_step_has_its_speed_only():
    scalars, bad = collect(range(2), bad=(0, 1)).read(leave=0)
    assert "loss" not in scalars and len(bad) == 2 and "images_per_second" in scalars


# ------------------------------------------------------------------------------- speed


def test_speed_and_time_left(clock):
    scalars, _ = collect(range(4), clock=clock, seconds=0.5).read(leave=0)
    assert scalars["step_ms"] == pytest.approx(500)
    assert scalars["images_per_second"] == pytest.approx(BATCH / 0.5)
    assert scalars["eta_seconds"] == pytest.approx((TOTAL - 4) * 0.5)


def test_time_left_counts_the_step_in_flight_as_still_to_come(clock):
    scalars, _ = collect(range(4), clock=clock, seconds=0.5).read(leave=1)
    assert scalars["eta_seconds"] == pytest.approx((TOTAL - 3) * 0.5)


def test_no_time_is_left_at_the_end(clock):
    found = collect(range(TOTAL - 2, TOTAL), clock=clock, seconds=0.5)
    assert found.read(leave=0)[0]["eta_seconds"] == 0


def test_the_wait_for_data_is_a_part_of_the_window(clock):
    found = collect(range(4), clock=clock, seconds=0.5)
    found.waited(0.3)
    found.waited(0.2)
    assert found.read()[0]["data_wait"] == pytest.approx(0.25)
    add(found, 4)
    clock.now += 1.0
    assert found.read()[0]["data_wait"] == 0


def test_a_pause_is_no_part_of_the_window(clock):
    found = collect(range(4), clock=clock, seconds=0.5)
    clock.now += 60
    found.exclude(60)
    assert found.read()[0]["step_ms"] == pytest.approx(500)


# ------------------------------------------------------------------------- utilisation


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
        ("TPU v99", None),
    ],
)
def test_peaks_go_by_the_start_of_the_device_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_utilisation_is_the_rate_per_device_over_its_peak(clock, monkeypatch):
    monkeypatch.setitem(chips.PEAK_FLOPS, jax.devices()[0].device_kind, 4e9)
    found = collect(range(4), flops=8e9 * jax.device_count(), clock=clock, seconds=4.0)
    scalars, _ = found.read(leave=0)
    assert scalars["gflops_per_chip"] == pytest.approx(2.0)
    assert scalars["mfu"] == pytest.approx(0.5)


def test_without_a_peak_there_is_a_rate_and_no_utilisation(clock):
    scalars, _ = collect(range(4), flops=8e9, clock=clock, seconds=1.0).read()
    assert scalars["gflops_per_chip"] == pytest.approx(8 / jax.device_count())
    assert "mfu" not in scalars


def test_without_a_count_there_is_neither():
    assert not {"mfu", "gflops_per_chip"} & set(collect(range(2)).read()[0])

"""F16: losses that leap are told from those that are merely large, and from those before."""

import numpy as np
import pytest

from jointseg_jax.config import NanConfig
from jointseg_jax.training.faults import LEAST, WINDOW, Faults, NonFinite, Spikes
from jointseg_jax.types import UserError

QUIET = [(step, 1.0 + 0.01 * step, np.arange(3)) for step in range(LEAST)]
LEAP = (LEAST, 1000.0, np.arange(4))


def test_a_leap_is_found_and_does_not_become_usual():
    spikes = Spikes(100.0)
    assert spikes.among(QUIET) == []
    assert [s for s, _, _ in spikes.among([LEAP, (11, 100.0, ()), LEAP])] == [LEAST, LEAST]
    assert spikes.count == 2 and 1 < spikes.usual < 2


def test_nothing_leaps_before_the_usual_is_known():
    assert Spikes(100.0).among([*QUIET[1:], LEAP]) == []
    assert Spikes(0).among([*QUIET, LEAP]) == []
    assert Spikes(2.0).among([(i, -1.0, ()) for i in range(LEAST)] + [LEAP]) == []


def test_the_usual_follows_the_run():
    spikes = Spikes(3.0)
    assert spikes.among((i, 0.999**i, ()) for i in range(5 * WINDOW)) == []
    assert spikes.usual == pytest.approx(0.999 ** (4.5 * WINDOW), rel=1e-2)
    assert spikes.among([(5 * WINDOW, 3.1 * spikes.usual, ())])


def leaps(faults):
    return faults.spikes.among([*QUIET, LEAP])


def test_it_is_counted_and_told(caplog):
    faults = Faults(NanConfig())
    assert not faults.go_back_from(leaps(faults), saved=5)
    (message,) = caplog.messages
    assert message == (
        "step 10: the loss 1e+03 is 957 times the usual (1 such steps in this window, 1 in this "
        "launch); records 0, 1, 2, 3 were in the batch; last checkpoint: 5"
    )


def test_it_goes_back_where_told_to_and_not_for_ever():
    faults = Faults(NanConfig(on_spike="rollback", limit=1))
    found = leaps(faults)
    assert not faults.go_back_from(found, saved=None)
    assert faults.go_back_from(found, saved=5)
    with pytest.raises(NonFinite, match="last checkpoint: 5, where the run has returned 1 times"):
        faults.go_back_from(found, saved=5)


@pytest.mark.parametrize("fields", [{"spike": 0.5}, {"spike": -1.0}, {"on_spike": "stop"}])
def test_settings_that_are_none(fields):
    with pytest.raises(UserError, match=r"config.nan: on_spike .* one of count, rollback"):
        Faults(NanConfig(**fields))

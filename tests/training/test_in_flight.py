"""The host runs one step ahead of the devices, and no further."""

import jax.numpy as jnp

from jointseg_jax.training.clock import InFlight


class Running:
    """Stands in for a metric of a step: done when somebody waited for it."""

    def __init__(self):
        self.done = False

    def is_ready(self):
        return self.done

    def block_until_ready(self):
        self.done = True
        return self


def test_two_steps_are_in_flight_at_most():
    flight, steps = InFlight(), []
    assert not flight.busy()
    for _ in range(4):
        steps.append({"loss": Running(), "finite": Running()})
        flight.add(steps[-1])
        assert flight.busy()
        done = [x.done for metrics in steps for x in metrics.values()]
        assert done == [True] * (len(done) - 2) + [False] * 2
    steps[-1]["loss"].done = True
    assert flight.busy()
    steps[-1]["finite"].done = True
    assert not flight.busy()


def test_arrays_of_devices_are_asked():
    flight = InFlight()
    flight.add({"loss": jnp.float32(1).block_until_ready()})
    assert not flight.busy()

"""The adaptive solver on an equation with a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.transport.adaptive import Dopri5
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import Linear

PROCESS = {"state": Process(schedule=Linear(), predicts="velocity")}


def turning(x, t, step):
    """dx/dt = 3 cos(3 t) x: x(t) = x(0) exp(sin 3 t)."""
    return {"state": 3 * jnp.cos(3 * t["state"]) * x["state"]}


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("start, end", [(0.0, 1.0), (1.0, 0.0), (0.2, 0.7)])
def test_closed_form(start, end):
    x = jnp.linspace(-1, 1, 12).reshape(3, 4)
    solver = Dopri5(start=start, end=end, rtol=1e-5, atol=1e-6)
    got = jax.jit(lambda x: solver(turning, PROCESS, {"state": x}))(x)
    wanted = x * np.exp(np.sin(3 * end) - np.sin(3 * start))
    # the tolerance of one step is 1e-5; some ten steps add up
    np.testing.assert_allclose(got["state"], wanted, rtol=2e-4)


@pytest.mark.thorough
def test_tighter_tolerances_are_nearer():
    x = jnp.ones((1, 4))
    wanted = np.exp(np.sin(3))
    errors = [
        float(
            abs(
                Dopri5(start=0.0, end=1.0, rtol=r, atol=r)(turning, PROCESS, {"state": x})["state"]
                - wanted
            ).max()
        )
        for r in (1e-1, 1e-3, 1e-5)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_a_row_that_needs_more_steps_is_not_a_number():
    solver = Dopri5(start=0.0, end=1.0, steps=1)
    got = jax.jit(lambda x: solver(turning, PROCESS, {"state": x}))(jnp.ones((2, 3)))
    assert jnp.isnan(got["state"]).all()


@pytest.mark.thorough
def test_under_jit():
    solve = jax.jit(lambda x: Dopri5(start=0.0, end=1.0)(turning, PROCESS, {"state": x})["state"])
    np.testing.assert_allclose(solve(jnp.ones((2, 3))), np.exp(np.sin(3)), rtol=5e-3)


def test_what_it_cannot_do_is_refused():
    x = {"state": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"dopri5: .*from its state alone.*euler or heun"):
        Dopri5()(turning, PROCESS, x, keys=jax.random.split(jax.random.key(0), 2))
    clipped = {"state": Process(schedule=Linear(), predicts="velocity", clip=1.0)}
    with pytest.raises(ValueError, match=r"clipped processes \(here: \['state'\]\)"):
        Dopri5()(turning, clipped, x)
    with pytest.raises(ValueError, match="dopri5: steps=0"):
        Dopri5(steps=0)
    with pytest.raises(ValueError, match="two different times"):
        Dopri5(start=0.3, end=0.3)

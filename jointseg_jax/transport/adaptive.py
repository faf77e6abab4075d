"""Adaptive integration of a velocity: the steps follow from the error instead of being given.

``dx/dt = v(x, t)`` by the Runge-Kutta pair of Dormand and Prince, orders 5 and 4, whose difference
estimates the error of a step; a step is taken where the estimate is at most
``atol + rtol |x|`` (root mean square over a row). Every row has steps of its own, so that what
becomes of it does not depend on the rows beside it.

It needs the ``ode`` extra (diffrax). Use it to see what a fixed number of steps gives away.

Source: Dormand and Prince 1980; rectified flow (Liu et al. 2022), who sample with RK45.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jointseg_jax.rng import Keys
from jointseg_jax.transport.integrator import Memory, Noise, Predict, States
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.solvers import require_two_times
from jointseg_jax.types import Streams, UserError, require_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dopri5:
    """The adaptive solver, for predictions that treat rows alone and need no noise."""

    steps: int = 256  # at most n accepted and refused steps; a row that needs more becomes NaN
    start: float = 1.0  # where it begins
    end: float = 0.0  # where it stops
    rtol: float = 1e-3  # tolerance relative to the state
    atol: float = 1e-3  # absolute tolerance, in units of the latents

    def __post_init__(self) -> None:
        own = {name: getattr(self, name) for name in ("steps", "rtol", "atol")}
        good = self.steps >= 1 and self.rtol >= 0 and self.atol > 0
        rule = "must be at least 1, at least 0 and positive; change them in `system.solver`."
        require_values("dopri5", good, rule, **own)
        require_two_times("dopri5", self.start, self.end)

    def __call__(
        self,
        predict: Predict,
        processes: Mapping[str, Process],
        x: Streams,
        *,
        keys: Keys | None = None,
        condition: Streams | None = None,
        memory: Memory | None = None,
        trajectory: bool = False,
        noise: Noise | None = None,
    ) -> States:
        """Integrates ``x`` from ``start`` to ``end``, every row in steps of its own.

        Raises:
          ValueError: a condition, a memory, keys, noise or a trajectory are asked for, or a
            process clips.
          UserError: diffrax is not installed.
        """
        clipped = [k for k in x if processes[k].clip is not None]
        if condition or memory or trajectory or noise is not None or keys is not None or clipped:
            raise ValueError(
                "dopri5: integrates a velocity from its state alone; given streams, "
                "self-conditioning, keys, noise, trajectories and clipped processes (here: "
                f"{clipped}) need one of the fixed-step solvers. Set `system.solver` to euler or "
                "heun."
            )
        try:
            import diffrax
        except ModuleNotFoundError as error:
            raise UserError(
                "dopri5: it needs diffrax, which is not installed. "
                "Install it with pip install -e '.[ode]', or set `system.solver` to euler or heun."
            ) from error

        def velocity(t: Any, state: PyTree, _: PyTree) -> States:
            rows = {k: v[None] for k, v in state.items()}  # the network wants a batch: [1, ...]
            outputs = predict(rows, dict.fromkeys(rows, t), jnp.zeros((), jnp.int32))
            return {k: processes[k].velocity(outputs[k], rows[k], t)[0] for k in rows}

        def row(state: States) -> States:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(velocity),  # dx/dt = v(x, t)
                diffrax.Dopri5(),
                t0=self.start,
                t1=self.end,
                dt0=None,
                y0=state,
                # a step is taken where its error is at most atol + rtol |x|
                stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol),
                max_steps=self.steps,
                adjoint=diffrax.DirectAdjoint(),
                throw=False,  # under vmap one row's failure would stop all: it becomes NaN below
            )
            assert solution.ys is not None  # diffrax saves the end unless it is told not to
            solved = solution.result == diffrax.RESULTS.successful
            return {k: jnp.where(solved, v[-1], jnp.nan) for k, v in solution.ys.items()}

        # vmapped row by row: what becomes of a row does not depend on the rows beside it
        return jax.vmap(row)(dict(x))

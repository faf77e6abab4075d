"""Solvers: what every fixed-step method shares, and the two plainest, Euler and Heun.

Both run from any time to any other, in either direction. A solver only lays out rows; the loop
is in ``integrator``.

Source: Euler, SemFlow sec. 3.2 (eqs. 11-13), rectified flow (Liu et al. 2022) alg. 1; Heun, Karras
et al. 2022 alg. 1 in the variable t.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np

from jointseg_jax.transport.integrator import Row, Table, integrate, tabulate
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import Schedule
from jointseg_jax.types import require_one_of, require_values

CHANGE_TIMES = "change `solver.start` or `solver.end`"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedStepSolver(abc.ABC):
    """A solver whose steps are known beforehand, as rows of a table."""

    final: str = "state"
    """What is returned: ``"state"``, that at the end time; ``"evaluate"``, the data reading of one
    more network call there."""
    steps: int  # network calls for which the method is laid out

    def __post_init__(self) -> None:
        require_one_of("solver: final", self.final, ("state", "evaluate"), "Change `solver.final`.")

    @abc.abstractmethod
    def rows(self, schedule: Schedule, t_max: float) -> list[Row]:
        """The method on one schedule; ``t_max`` is the latest time common to all streams."""

    def table(self, processes: Mapping[str, Process]) -> Table:
        """The method's numbers for these streams."""
        t_max = min(p.schedule.t_max for p in processes.values())
        rows = {name: self.rows(p.schedule, t_max) for name, p in processes.items()}
        if self.final == "evaluate":
            # x = 0 y + 1 D: the state becomes the data reading at the end time
            rows = {k: [*r, Row(r[-1].t_next, r[-1].t_next, 0.0, (1.0,))] for k, r in rows.items()}
        return tabulate(rows, processes)

    __call__ = integrate  # as a method: ``solver(predict, processes, x, ...)`` runs its table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuous(FixedStepSolver):
    """A solver on a grid of its own between two times."""

    start: float | None = None  # where it begins; None is the schedules' ``t_max``
    end: float = 0.0  # where it stops; 0 is the data end

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = "at least one is needed; change `solver.steps`."
        require_values("solver", self.steps >= 1, rule, steps=self.steps)
        require_two_times("solver", self.start, self.end)

    def time_range(self, t_max: float) -> tuple[float, float]:
        """(start, end), checked against the schedules' range."""
        start = t_max if self.start is None else self.start
        rule = f"a schedule of these streams ends at t_max={t_max}; {CHANGE_TIMES}."
        require_values("solver", max(start, self.end) <= t_max, rule, start=start, end=self.end)
        return start, self.end


def require_two_times(where: str, start: float | None, end: float) -> None:
    """Raises ValueError unless a solver has two different times; a ``start`` of None lies at 1."""
    first = 1.0 if start is None else start
    good = 0 <= first <= 1 and 0 <= end <= 1 and first != end
    rule = f"two different times in [0, 1] are needed (0 is the data end); {CHANGE_TIMES}."
    require_values(where, good, rule, start=start, end=end)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(Continuous):
    """Explicit Euler on the velocity, ``steps`` network calls."""

    def rows(self, schedule: Schedule, t_max: float) -> list[Row]:
        """One row per step."""
        grid = np.linspace(*self.time_range(t_max), self.steps + 1)
        # x_{i+1} = x_i + (t_{i+1} - t_i) v(x_i, t_i)
        return [Row(t, u, 1.0, (u - t,), reading="velocity") for t, u in itertools.pairwise(grid)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun(Continuous):
    """Heun's second-order method on the velocity, two network calls per step.

    It evaluates at the end time too, so a variance-preserving process, whose velocity is infinite
    at t = 0, needs ``end`` above 0.
    """

    def rows(self, schedule: Schedule, t_max: float) -> list[Row]:
        """Two rows per step: to the far end, and again from the start with both velocities."""
        grid = np.linspace(*self.time_range(t_max), self.steps + 1)
        rows = []
        for t, u in itertools.pairwise(grid):
            # x' = x_i + (t_{i+1} - t_i) v(x_i, t_i), then
            # x_{i+1} = x_i + (t_{i+1} - t_i) (v(x_i, t_i) + v(x', t_{i+1})) / 2
            rows.append(Row(t, u, 1.0, (u - t,), is_step_end=False, reading="velocity"))
            rows.append(Row(u, u, 1.0, ((u - t) / 2,) * 2, reading="velocity"))
        return rows

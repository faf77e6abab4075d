"""The integrator: a method is a table of numbers, and one loop runs any table.

1. A row asks the network once, at the state x and time t, and takes a *reading* r of the answer
   (data, noise or velocity, by the stream's own process): ``r = p x + q output``.
2. It then moves on from the last kept state y, with the readings of the latest rows:
   ``x = x_coef y + coefs_0 r + coefs_1 r' + coefs_2 r'' + noise_coef n``, n drawn like
   the stream's source: normal, of deviation ``scale``.
3. A row that ends a step makes this its new y; one that does not is an inner stage (Heun,
   singlestep DPM-Solver).

The numbers of a row come from schedules alone, so they are computed on the host in float64 and
only then cast to the state's dtype. Streams may follow different schedules: each has its own
columns, on one common grid of times. The loop is one ``lax.scan`` with one call of the network,
so a program's size does not depend on the number of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jointseg_jax.rng import Keys, fold, name_id, normal
from jointseg_jax.transport.process import Process
from jointseg_jax.types import Streams

Predict = Callable[..., Any]
"""(states, time of each stream, row number) -> the network's output for each stream; with a memory
(states, times, row number, memory) -> (outputs, the memory for the next call)."""

Memory = Mapping[str, Array]
"""What ``predict`` keeps from one call to the next."""

Noise = Callable[[Int[Array, ""], Streams], Streams]
"""(row number, states) -> standard normal numbers like the states."""

States = dict[str, Array]


@runtime_checkable
class Solver(Protocol):
    """Moves states from one end of their processes to the other. Solvers are dataclasses."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # so that ``replace`` changes their settings

    @property
    def steps(self) -> int:
        """The setting that decides how often the network is called."""
        ...

    def __call__(
        self,
        predict: Predict,
        processes: Mapping[str, Process],
        x: Streams,
        *,
        keys: Keys | None = None,
        condition: Streams | None = None,
        memory: Memory | None = None,
    ) -> States | tuple[States, States]:
        """Returns the states at the end time, with the condition among them.

        Those that step over a table (``integrate``) take two more arguments: ``trajectory=True``
        returns, second, ``{name: [1 + steps, b, ...]}``, the start first; ``noise``, a function of
        the row number and the states, takes the place of the draws from ``keys``.

        Args:
          predict: the network; it stands in one place of the program.
          processes: how each stream moves, and what the network predicts of it.
          x: states at the start time, ``[b, ...]`` each.
          keys: one per row of the batch; needed where the method adds noise.
          condition: clean latents that stay as they are; the network sees them at time 0.
          memory: what the first call is given, if ``predict`` keeps something between calls.
        """
        ...


class Row(NamedTuple):
    """One call of the network and the update that follows it."""

    t: float  # where the state is; the reading uses alpha and sigma of this time
    t_next: float  # where the update brings it
    x_coef: float  # weight of the kept state
    coefs: tuple[float, ...]  # weights of the readings, newest first
    noise_coef: float = 0.0  # weight of fresh noise, which has the source's deviation
    is_step_end: bool = True  # the update becomes the kept state
    reading: str = "data"  # "data", "noise" or "velocity"
    t_network: float | None = None  # the time shown to the network, where that is not ``t``


class Columns(NamedTuple):
    """One stream's numbers, one entry per row; inside the loop, those of one row."""

    reading_coefs: np.ndarray | Array  # [rows, 2] weights of (x, output)
    x_coef: np.ndarray | Array  # [rows]
    coefs: np.ndarray | Array  # [rows, depth] weights of the latest readings, newest first
    noise_coef: np.ndarray | Array  # [rows] of standard normal numbers: the scale is in it


@dataclasses.dataclass(frozen=True)
class Table:
    """A method, made into numbers."""

    t_network: np.ndarray  # [rows] times shown to the network
    t_next: np.ndarray  # [rows] time of the state after each row
    is_step_end: np.ndarray  # [rows] bool
    streams: Mapping[str, Columns]

    @property
    def noisy(self) -> bool:
        """True if any row adds noise."""
        return any(np.any(c.noise_coef != 0) for c in self.streams.values())

    def table(self, processes: Mapping[str, Process]) -> Table:
        """The table itself: what is laid out already can be integrated too."""
        del processes
        return self


@runtime_checkable
class Tabulated(Protocol):
    """What lays its steps out as a table, once it knows the processes."""

    def table(self, processes: Mapping[str, Process]) -> Table:
        """The method's numbers for these streams."""
        ...


def tabulate(rows: Mapping[str, Sequence[Row]], processes: Mapping[str, Process]) -> Table:
    """Stacks each stream's rows, with the weights of its own process for the readings.

    Raises:
      ValueError: the streams' rows lie at different times, or a number is not finite.
    """
    first_name, first = next(iter(rows.items()))
    for name, others in rows.items():
        # all streams share t, t_next, is_step_end, reading and t_network; the weights may differ
        if [r[:2] + r[5:] for r in others] != [r[:2] + r[5:] for r in first]:
            raise ValueError(
                f"solver: streams {first_name!r} and {name!r} have different schedules "
                f"({processes[first_name].schedule}, {processes[name].schedule}) and this solver "
                "places its times by the schedule; use a grid in time (grid='time_uniform' with "
                "method='fast' or 'multistep'), or one schedule for all streams."
            )
    return Table(
        t_network=np.array([r.t if r.t_network is None else r.t_network for r in first]),
        t_next=np.array([r.t_next for r in first]),
        is_step_end=np.array([r.is_step_end for r in first]),
        streams={name: _columns(name, rows[name], processes[name]) for name in rows},
    )


def _columns(name: str, rows: Sequence[Row], process: Process) -> Columns:
    depth = max(len(r.coefs) for r in rows)
    # an infinite weight is not an accident of the arithmetic but a wrong setting: refused below
    with np.errstate(divide="ignore", invalid="ignore"):
        reading_coefs = [process.reading_weights(r.reading, r.t) for r in rows]
    columns = Columns(
        reading_coefs=np.array(reading_coefs, np.float64),
        x_coef=np.array([r.x_coef for r in rows]),
        coefs=np.array([r.coefs + (0.0,) * (depth - len(r.coefs)) for r in rows]),
        noise_coef=np.array([process.scale * r.noise_coef for r in rows]),
    )
    for i, row in enumerate(rows):
        if not all(np.all(np.isfinite(column[i])) for column in columns):
            raise ValueError(
                f"solver: stream {name!r}, step from t={row.t:g} to t={row.t_next:g}: a "
                f"{row.reading} reading of a network that predicts {process.predicts} is not "
                f"finite there ({process.schedule}: alpha={process.schedule.alpha(row.t):g}, "
                f"sigma={process.schedule.sigma(row.t):g}); move the solver's `start` or `end` "
                "off that end of the schedule, or change what the stream's process predicts."
            )
        if process.clip is not None and row.reading != "data":
            raise ValueError(
                f"solver: stream {name!r}: clip={process.clip} clamps data readings and this "
                f"solver reads {row.reading}; remove `clip` from the stream's process or take a "
                "solver that reads data (dpm_solver_pp, ddim, ancestral)."
            )
    return columns


def integrate(
    method: Tabulated,
    predict: Predict,
    processes: Mapping[str, Process],
    x: Streams,
    *,
    keys: Keys | None = None,
    condition: Streams | None = None,
    memory: Memory | None = None,
    trajectory: bool = False,
    noise: Noise | None = None,
) -> States | tuple[States, States]:
    """Runs the table of a method from the states ``x``; arguments and results as in ``Solver``.

    Raises:
      ValueError: no state, a state without a process, or one that is also in ``condition``.
    """
    condition = dict(condition or {})
    missing, both = sorted(set(x) - set(processes)), sorted(set(x) & set(condition))
    if not x or missing or both:
        raise ValueError(
            f"solver: got states {sorted(x)}, processes {sorted(processes)}, condition "
            f"{sorted(condition)}; every state needs a process (lacking: {missing}) and must not "
            f"be in the condition too (both: {both})."
        )
    processes = {name: processes[name] for name in x}
    table = method.table(processes)
    draw = (noise or _draws(keys)) if table.noisy else None
    one_stage = bool(np.all(table.is_step_end))

    def step(carry: Any, row: Mapping[str, Any]) -> tuple[Any, States | None]:
        # states, states at the last step's end, readings of earlier rows
        x, kept, past, memory = carry
        t, number = row["time"], row["row"]
        # the condition is clean: time 0
        times: dict[str, Any] = {**dict.fromkeys(x, t), **dict.fromkeys(condition, 0 * t)}
        if memory is None:
            outputs = predict({**x, **condition}, times, number)
        else:
            outputs, memory = predict({**x, **condition}, times, number, memory)
        drawn = draw(number, x) if draw else {}
        new, readings = {}, {}
        for name, columns in row["streams"].items():
            output = _output(outputs, name, x)
            # (1) r = p x + q output
            reading = columns.reading_coefs[0] * x[name] + columns.reading_coefs[1] * output
            if (clip := processes[name].clip) is not None:
                reading = jnp.clip(reading, -clip, clip)
            readings[name] = (reading, *past[name])
            # (2) x = x_coef y + coefs_0 r + coefs_1 r' + coefs_2 r'' + noise_coef n
            new[name] = columns.x_coef * kept[name]
            for coef, r in zip(columns.coefs, readings[name]):
                new[name] = new[name] + coef * r
            if name in drawn:
                new[name] = new[name] + columns.noise_coef * drawn[name]
        # (3) only a step's end moves y; a select is left out where every row is one
        if one_stage:
            kept = new
        else:
            kept = {k: jnp.where(row["is_step_end"], v, kept[k]) for k, v in new.items()}
        past = {name: r[:-1] for name, r in readings.items()}
        # the states are stacked only on request: they would cost memory for every step
        return (new, kept, past, memory), new if trajectory else None

    # readings before the start are zeros: their weights are 0 there
    past = {k: (jnp.zeros_like(v),) * (table.streams[k].coefs.shape[1] - 1) for k, v in x.items()}
    start = (x, x, past, memory)
    (last, *_), states = jax.lax.scan(step, start, _scanned(table, x))
    result = {**last, **condition}
    if states is None:
        return result
    ends = np.flatnonzero(table.is_step_end)
    return result, {k: jnp.concatenate([x[k][None], v[ends]]) for k, v in states.items()}


def _scanned(table: Table, x: Streams) -> dict[str, Any]:
    """The table as arrays, each stream's columns in the dtype of its state."""
    time_dtype = jnp.result_type(jnp.float32, *x.values())  # labels to 1000 need it
    return {
        "row": jnp.arange(len(table.t_network), dtype=jnp.int32),
        "time": jnp.asarray(table.t_network, time_dtype),
        "is_step_end": jnp.asarray(table.is_step_end),
        "streams": {
            name: Columns(*(jnp.asarray(column, x[name].dtype) for column in columns))
            for name, columns in table.streams.items()
        },
    }


def _draws(keys: Keys | None) -> Noise:
    if keys is None:
        raise ValueError(
            "solver: this method adds noise at its steps; give `keys=`, one per row of the batch."
        )
    # by stream and row, so that no draw depends on which other streams there are
    return lambda row, like: {k: normal(fold(keys, name_id(k), row), v) for k, v in like.items()}


def _output(outputs: Streams, name: str, x: Streams) -> Array:
    if name not in outputs or outputs[name].shape != x[name].shape:
        shapes = {k: v.shape for k, v in outputs.items()}
        raise ValueError(
            f"solver: the network answered {shapes} and must answer {name!r} with shape "
            f"{x[name].shape}, that of its state; fix the denoiser's `streams`."
        )
    return outputs[name].astype(x[name].dtype)

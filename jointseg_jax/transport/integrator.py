"""The integrator: a method is a table of numbers, and one loop runs any table.

1. A row asks the network once, at the state x and time t, and takes a *reading* r of the answer:
   ``r = p x + q output`` (data, noise or velocity, by the stream's own process), clamped if the
   process clips its data.
2. It then moves on from the last committed state y, with the readings of the latest rows:
   ``x = keep y + use_0 r + use_1 r' + use_2 r'' + noise n``, n standard normal.
3. A row that commits makes this its new y; one that does not is an inner stage (Heun, singlestep
   DPM-Solver).

The numbers of a row come from schedules alone, so they are computed on the host in float64 and
only then cast to the state's dtype. Streams may follow different schedules: each has its own
columns, on one common grid of times. The loop is one ``lax.scan`` with one call of the network,
so a program's size does not depend on the number of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jointseg_jax.rng import Keys, fold, name_id, normal
from jointseg_jax.transport.process import Process
from jointseg_jax.types import Streams

Predict = Callable[[Streams, Mapping[str, Float[Array, ""]], Int[Array, ""]], Streams]
"""(states, time of each stream, row number) -> the network's output for each stream."""

Noise = Callable[[Int[Array, ""], Streams], Streams]
"""(row number, states) -> standard normal numbers like the states."""


class Row(NamedTuple):
    """One call of the network and the update that follows it; see the module's 1-3.

    Attributes:
      time: where the state is; the reading uses alpha and sigma of this time.
      to: where the update brings it.
      keep: weight of the committed state.
      use: weights of the readings, newest first.
      noise: weight of fresh noise.
      commit: whether the update becomes the committed state.
      reading: ``"data"``, ``"noise"`` or ``"velocity"``.
      seen: the time shown to the network, where that is not ``time``.
    """

    time: float
    to: float
    keep: float
    use: tuple[float, ...]
    noise: float = 0.0
    commit: bool = True
    reading: str = "data"
    seen: float | None = None


class Columns(NamedTuple):
    """One stream's numbers, one entry per row."""

    read: np.ndarray  # [rows, 2] weights of (x, output)
    keep: np.ndarray  # [rows]
    use: np.ndarray  # [rows, depth]
    noise: np.ndarray  # [rows]


@dataclasses.dataclass(frozen=True)
class Table:
    """A method, made into numbers.

    Attributes:
      times: what the network sees, one per row.
      reached: the time of the state after each row.
      commit: which rows end a step.
      streams: the numbers of each stream.
    """

    times: np.ndarray
    reached: np.ndarray
    commit: np.ndarray
    streams: Mapping[str, Columns]

    @property
    def noisy(self) -> bool:
        """Whether any row adds noise."""
        return any(np.any(c.noise != 0) for c in self.streams.values())


def tabulate(rows: Mapping[str, Sequence[Row]], processes: Mapping[str, Process]) -> Table:
    """Stacks each stream's rows, with the weights of its own process for the readings.

    Raises:
      ValueError: the streams' rows lie at different times, or a number is not finite.
    """
    first_name, first = next(iter(rows.items()))
    for name, others in rows.items():
        if [r[:2] + r[5:] for r in others] != [r[:2] + r[5:] for r in first]:
            raise ValueError(
                f"solver: streams {first_name!r} and {name!r} have different schedules "
                f"({processes[first_name].schedule}, {processes[name].schedule}) and this solver "
                "places its times by the schedule; use a grid in time (grid='time_uniform' with "
                "method='fast' or 'multistep'), or one schedule for all streams."
            )
    return Table(
        times=np.array([r.time if r.seen is None else r.seen for r in first]),
        reached=np.array([r.to for r in first]),
        commit=np.array([r.commit for r in first]),
        streams={name: _columns(name, rows[name], processes[name]) for name in rows},
    )


def _columns(name: str, rows: Sequence[Row], process: Process) -> Columns:
    depth = max(len(r.use) for r in rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        read = [process.reading_weights(r.reading, r.time) for r in rows]
    columns = Columns(
        read=np.array(read, np.float64),
        keep=np.array([r.keep for r in rows]),
        use=np.array([r.use + (0.0,) * (depth - len(r.use)) for r in rows]),
        noise=np.array([r.noise for r in rows]),
    )
    for i, row in enumerate(rows):
        if not all(np.all(np.isfinite(column[i])) for column in columns):
            raise ValueError(
                f"solver: stream {name!r}, step from t={row.time:g} to t={row.to:g}: a "
                f"{row.reading} reading of a network that predicts {process.predicts} is not "
                f"finite there ({process.schedule}: alpha={process.schedule.alpha(row.time):g}, "
                f"sigma={process.schedule.sigma(row.time):g}); move the solver's `start` or `end` "
                "off that end of the schedule, or change what the stream's process predicts."
            )
        if process.clip is not None and row.reading != "data":
            raise ValueError(
                f"solver: stream {name!r}: clip={process.clip} clamps data readings and this "
                f"solver reads {row.reading}; remove `clip` from the stream's process or take a "
                "solver that reads data (dpm_solver_pp, ddim)."
            )
    return columns


def integrate(
    table: Table,
    predict: Predict,
    processes: Mapping[str, Process],
    x: Streams,
    *,
    keys: Keys | None = None,
    given: Streams | None = None,
    trajectory: bool = False,
    noise: Noise | None = None,
) -> dict[str, Array] | tuple[dict[str, Array], dict[str, Array]]:
    """Runs a table from the states ``x``.

    Args:
      predict: called once per row, in one place of the program.
      keys: one per row of the batch; needed where the table adds noise.
      given: clean latents that stay as they are; the network sees them at time 0.
      trajectory: whether to return, second, ``{name: [1 + commits, batch, ...]}``, the start first.
      noise: takes the place of the draws from ``keys``.
    """
    given = dict(given or {})
    if table.noisy and noise is None:
        noise = _draws(keys)
    step = _step(table, predict, processes, given, noise if table.noisy else None, trajectory)
    past = {k: (jnp.zeros_like(v),) * (table.streams[k].use.shape[1] - 1) for k, v in x.items()}
    (last, _, _), states = jax.lax.scan(step, (x, x, past), _scanned(table, x))
    result = {**last, **given}
    if not trajectory:
        return result
    kept = np.flatnonzero(table.commit)
    return result, {k: jnp.concatenate([x[k][None], v[kept]]) for k, v in states.items()}


def _scanned(table: Table, x: Streams) -> dict[str, Any]:
    """The table as arrays, each stream's columns in the dtype of its state."""
    time_dtype = jnp.result_type(jnp.float32, *x.values())
    return {
        "row": jnp.arange(len(table.times), dtype=jnp.int32),
        "time": jnp.asarray(table.times, time_dtype),
        "commit": jnp.asarray(table.commit),
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
    return lambda row, like: {k: normal(fold(keys, name_id(k), row), v) for k, v in like.items()}


def _step(
    table: Table,
    predict: Predict,
    processes: Mapping[str, Process],
    given: Streams,
    noise: Noise | None,
    trajectory: bool,
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The body of the loop, over (states, committed states, earlier readings)."""
    steady = bool(np.all(table.commit))

    def step(carry: Any, row: Any) -> tuple[Any, Any]:
        x, kept, past = carry
        times = {**dict.fromkeys(x, row["time"]), **dict.fromkeys(given, 0 * row["time"])}
        outputs = predict({**x, **given}, times, row["row"])
        drawn = noise(row["row"], x) if noise else {}
        new, readings = {}, {}
        for name, columns in row["streams"].items():
            reading = _reading(processes[name], columns, x[name], _output(outputs, name, x))
            readings[name] = (reading, *past[name])
            new[name] = _update(columns, kept[name], readings[name], drawn.get(name))
        if steady:
            kept = new
        else:
            kept = {k: jnp.where(row["commit"], v, kept[k]) for k, v in new.items()}
        past = {name: r[:-1] for name, r in readings.items()}
        return (new, kept, past), new if trajectory else None

    return step


def _output(outputs: Streams, name: str, x: Streams) -> Array:
    if name not in outputs or outputs[name].shape != x[name].shape:
        shapes = {k: v.shape for k, v in outputs.items()}
        raise ValueError(
            f"solver: the network answered {shapes} and must answer {name!r} with shape "
            f"{x[name].shape}, that of its state; mend the denoiser's `streams`."
        )
    return outputs[name].astype(x[name].dtype)


def _reading(process: Process, columns: Columns, x: Array, output: Array) -> Array:
    """Source: the module's 1."""
    reading = columns.read[0] * x + columns.read[1] * output
    return reading if process.clip is None else jnp.clip(reading, -process.clip, process.clip)


def _update(columns: Columns, kept: Array, readings: Sequence[Array], drawn: Array | None) -> Array:
    """Source: the module's 2."""
    new = columns.keep * kept
    for weight, reading in zip(columns.use, readings):
        new = new + weight * reading
    return new if drawn is None else new + columns.noise * drawn

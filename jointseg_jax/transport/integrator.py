"""The integrator: a method is a table of numbers, and one loop runs any table.

1. A row asks the network once, at the state x and time t, and takes a *reading* r of the answer:
   ``r = p x + q output`` (data, noise or velocity, by the stream's own process), clamped if the
   process clips its data.
2. It then moves on from the last committed state y, with the readings of the latest rows:
   ``x = keep y + use_0 r + use_1 r' + use_2 r'' + noise n``, n standard normal.
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

    t: float
    t_next: float
    x_coef: float
    coefs: tuple[float, ...]
    noise_coef: float = 0.0
    is_step_end: bool = True
    reading: str = "data"
    t_network: float | None = None


class Columns(NamedTuple):
    """One stream's numbers, one entry per row."""

    reading_coefs: np.ndarray  # [rows, 2] weights of (x, output)
    x_coef: np.ndarray  # [rows]
    coefs: np.ndarray  # [rows, depth]
    noise_coef: np.ndarray  # [rows]


@dataclasses.dataclass(frozen=True)
class Table:
    """A method, made into numbers.

    Attributes:
      times: what the network sees, one per row.
      reached: the time of the state after each row.
      commit: which rows end a step.
      streams: the numbers of each stream.
    """

    t_network: np.ndarray
    t_next: np.ndarray
    is_step_end: np.ndarray
    streams: Mapping[str, Columns]

    @property
    def noisy(self) -> bool:
        """Whether any row adds noise."""
        return any(np.any(c.noise_coef != 0) for c in self.streams.values())


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
        t_network=np.array([r.t if r.t_network is None else r.t_network for r in first]),
        t_next=np.array([r.t_next for r in first]),
        is_step_end=np.array([r.is_step_end for r in first]),
        streams={name: _columns(name, rows[name], processes[name]) for name in rows},
    )


def _columns(name: str, rows: Sequence[Row], process: Process) -> Columns:
    depth = max(len(r.coefs) for r in rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        read = [process.reading_weights(r.reading, r.t) for r in rows]
    columns = Columns(
        reading_coefs=np.array(read, np.float64),
        x_coef=np.array([r.x_coef for r in rows]),
        coefs=np.array([r.coefs + (0.0,) * (depth - len(r.coefs)) for r in rows]),
        noise_coef=np.array([r.noise_coef for r in rows]),
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
    condition: Streams | None = None,
    trajectory: bool = False,
    noise: Noise | None = None,
) -> dict[str, Array] | tuple[dict[str, Array], dict[str, Array]]:
    """Runs a table from the states ``x``.

    Args:
      predict: called once per row, in one place of the program.
      keys: one per row of the batch; needed where the table adds noise.
      condition: clean latents that stay as they are; the network sees them at time 0.
      trajectory: return, second, ``{name: [1 + steps, batch, ...]}``, the start first.
      noise: takes the place of the draws from ``keys``.
    """
    condition = dict(condition or {})
    if table.noisy and noise is None:
        noise = _draws(keys)
    step = _step(table, predict, processes, condition, noise if table.noisy else None, trajectory)
    past = {k: (jnp.zeros_like(v),) * (table.streams[k].coefs.shape[1] - 1) for k, v in x.items()}
    (last, _, _), states = jax.lax.scan(step, (x, x, past), _scanned(table, x))
    result = {**last, **condition}
    if not trajectory:
        return result
    kept = np.flatnonzero(table.is_step_end)
    return result, {k: jnp.concatenate([x[k][None], v[kept]]) for k, v in states.items()}


def _scanned(table: Table, x: Streams) -> dict[str, Any]:
    """The table as arrays, each stream's columns in the dtype of its state."""
    time_dtype = jnp.result_type(jnp.float32, *x.values())
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
    return lambda row, like: {k: normal(fold(keys, name_id(k), row), v) for k, v in like.items()}


def _step(
    table: Table,
    predict: Predict,
    processes: Mapping[str, Process],
    condition: Streams,
    noise: Noise | None,
    trajectory: bool,
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The body of the loop, over (states, committed states, earlier readings)."""
    steady = bool(np.all(table.is_step_end))

    def step(carry: Any, row: Any) -> tuple[Any, Any]:
        x, kept, past = carry
        times = {**dict.fromkeys(x, row["time"]), **dict.fromkeys(condition, 0 * row["time"])}
        outputs = predict({**x, **condition}, times, row["row"])
        drawn = noise(row["row"], x) if noise else {}
        new, readings = {}, {}
        for name, columns in row["streams"].items():
            reading = _reading(processes[name], columns, x[name], _output(outputs, name, x))
            readings[name] = (reading, *past[name])
            new[name] = _update(columns, kept[name], readings[name], drawn.get(name))
        if steady:
            kept = new
        else:
            kept = {k: jnp.where(row["is_step_end"], v, kept[k]) for k, v in new.items()}
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
    reading = columns.reading_coefs[0] * x + columns.reading_coefs[1] * output
    return reading if process.clip is None else jnp.clip(reading, -process.clip, process.clip)


def _update(columns: Columns, kept: Array, readings: Sequence[Array], drawn: Array | None) -> Array:
    """Source: the module's 2."""
    new = columns.x_coef * kept
    for weight, reading in zip(columns.coefs, readings):
        new = new + weight * reading
    return new if drawn is None else new + columns.noise_coef * drawn

"""Guidance: what the prompt adds to a prediction, taken more than once.

1. ``out = conditional + (scale - 1) (conditional - unconditional)``, per stream. Scale 1 is no
   guidance, and gives the conditional prediction bit for bit. (Codes that write
   ``cond + g (cond - uncond)`` have g = scale - 1.)
2. A *branch* is a way to ask the network: some streams replaced, some at other times, another
   text. The unconditional branch of a text network has the empty text; of a joint network, pure
   noise at time 1 in place of the text's latents. Streams that need different unconditional
   branches (image without text, text without image) name their own.
3. In an *interval* of times the scale holds; outside it is 1. The network is asked as before, at
   every step: the program is one.
4. All branches are one forward pass, interleaved example by example (conditional, unconditional,
   conditional, ...): the rows of an example stay on the device that holds the example.

Source: 1 classifier-free guidance (Ho & Salimans 2022) eq. 6; 2 UniDiffuser (Bao et al. 2023)
sec. 4.3 and app. B; 3 Kynkaanniemi et al. 2024 (2404.07724), there in noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jointseg_jax.transport.process import over_rows
from jointseg_jax.transport.schedules import Numbers
from jointseg_jax.types import Streams, require_values

Step = Int[Array, ""]
Scale = int | float | Float[Array, ""]
Interval = Sequence[int | float]
"""(low, high): times from low to high, both in it; 0 is the data end."""
Times = Mapping[str, Array]
"""A time for each stream: one for all rows, or ``[b]``."""

Context = Array | Mapping[str, Array] | None
"""What a network takes beside the streams, the batch in front."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One way to ask the network."""

    latents: Mapping[str, Array | Callable[[Step], Array]] = field(default_factory=dict)
    """Streams to replace: an array, or a function of the step (fresh noise at each)."""
    times: Mapping[str, Numbers | Callable[[Step], Numbers]] = field(default_factory=dict)
    """Times to replace: a number, an array ``[b]``, or a function of the step."""
    text: Context = None
    """All branches must have the same structure here."""

    def inputs(self, x: Streams, t: Times, step: Step) -> tuple[Streams, Times, Context]:
        """(latents, times ``[b]``, text) of this branch at the solver's (x, t, step).

        Raises:
          ValueError: the branch names a stream that the solver does not have.
        """
        unknown = sorted((set(self.latents) | set(self.times)) - set(x))
        if unknown:
            raise ValueError(
                f"guidance: a branch replaces {', '.join(unknown)} and the streams are "
                f"{', '.join(x)}; fix the branch's `latents` or `times`."
            )
        batch = next(iter(x.values())).shape[0]
        latents = {k: _at(self.latents.get(k, v), step).astype(v.dtype) for k, v in x.items()}
        # one time per row, since the rows of other branches stand at other times
        times = {
            k: jnp.broadcast_to(jnp.asarray(_at(self.times.get(k, v), step), v.dtype), (batch,))
            for k, v in t.items()
        }
        return latents, times, self.text


def _at(value: Any, step: Step) -> Any:
    return value(step) if callable(value) else value


@dataclass(frozen=True)
class Guidance:
    """What a guided network is asked, and what its answers make together.

    ``combine(network(*expand(x, t, step)), t)`` is a prediction, as a solver asks for it.

    Raises:
      ValueError: a stream is served by two branches.
    """

    conditional: Branch
    unconditional: Sequence[tuple[Branch, Mapping[str, Scale]]] = ()
    """Branches with the guidance scale of each stream that they serve; a stream that no branch
    serves is not guided. A branch whose scales are all 1 is not evaluated."""
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """Times of a stream at which its scale holds; one without an interval has it at all times."""

    def __post_init__(self) -> None:
        served = [name for _, scales in self.unconditional for name in scales]
        duplicates = sorted({name for name in served if served.count(name) > 1})
        if duplicates:
            raise ValueError(
                f"guidance: streams {', '.join(duplicates)} are served by two unconditional "
                "branches; each stream needs one, change the branches' scales."
            )

    @property
    def active(self) -> list[tuple[Branch, Mapping[str, Scale]]]:
        """The unconditional branches that are evaluated."""
        return [(b, s) for b, s in self.unconditional if any(map(_is_on, s.values()))]

    def expand(self, x: Streams, t: Times, step: Step) -> tuple[Streams, Times, Context]:
        """(latents, times, text) of all branches: ``[b, ...]`` becomes ``[b * branches, ...]``."""
        branches = [self.conditional, *(branch for branch, _ in self.active)]
        asked = [branch.inputs(x, t, step) for branch in branches]
        return jax.tree.map(lambda *parts: interleave(parts), *asked)

    def repeat(self, x: Streams) -> Streams:
        """The same rows for all branches, ``[b * branches, ...]`` as ``expand`` lays them."""
        count = 1 + len(self.active)
        return {k: interleave([v] * count) for k, v in x.items()}

    def combine(self, outputs: Streams, t: Times) -> Streams:
        """The guided prediction ``[b, ...]``, of the network's answers to ``expand`` at times t."""
        count = 1 + len(self.active)
        answers = [{k: part(v, i, count) for k, v in outputs.items()} for i in range(count)]
        out = dict(answers[0])
        for other, (_, scales) in zip(answers[1:], self.active):
            for name, scale in scales.items():
                if _is_on(scale):
                    added = self._added(name, scale, t, out[name])
                    # (1) out = conditional + (scale - 1) (conditional - unconditional)
                    out[name] = out[name] + added * (out[name] - other[name])
        return out

    def _added(self, name: str, scale: Scale, t: Times, like: Array) -> Scale | Array:
        """``scale - 1``, and 0 outside the stream's interval."""
        if name not in self.intervals:
            return scale - 1
        low, high = self.intervals[name]
        # (3) times are one for all rows, or one per row
        return over_rows(jnp.where((low <= t[name]) & (t[name] <= high), scale - 1, 0.0), like)


def interval_of(where: str, values: Interval) -> Interval:
    """Two numbers as an interval.

    Raises:
      ValueError: they are no (low, high) within [0, 1].
    """
    good = len(values) == 2 and 0 <= values[0] < values[1] <= 1
    rule = "give two times (low, high), 0 <= low < high <= 1 (0 is the data end), or None for all "
    rule += "times; change it in the stream's config."
    require_values(where, good, rule, guidance_interval=values)
    return float(values[0]), float(values[1])


def _is_on(scale: Scale) -> bool:
    """Returns False for a scale of 1; one that is only known inside the program counts as on."""
    return not (isinstance(scale, int | float) and scale == 1)


def interleave(parts: Sequence[Array]) -> Array:
    """``[b, ...]`` of each branch as ``[b * branches, ...]``, example by example."""
    if len(parts) == 1:
        return parts[0]
    stacked = jnp.stack(parts, axis=1)  # [b, branches, ...]
    return stacked.reshape(-1, *stacked.shape[2:])


def part(rows: Array, i: int, branches: int) -> Array:
    """The rows of branch ``i`` out of ``interleave``, ``[b, ...]``."""
    return rows.reshape(-1, branches, *rows.shape[1:])[:, i]

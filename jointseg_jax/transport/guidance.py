"""Guidance: what the prompt adds to a prediction, taken more than once.

1. ``out = conditional + (scale - 1) (conditional - unconditional)``, per stream. Scale 1 is no
   guidance, and gives the conditional prediction bit for bit. (Codes that write
   ``cond + g (cond - uncond)`` have g = scale - 1.)
2. A *branch* is a way to ask the network: some streams replaced, some at other times, another
   text. The unconditional branch of a text network has the empty text; of a joint network, pure
   noise at time 1 in place of the text's latents. Streams that need different unconditional
   branches (image without text, text without image) name their own.
3. All branches are one forward pass, interleaved example by example (conditional, unconditional,
   conditional, ...): the rows of an example stay on the device that holds the example.

Source: 1 classifier-free guidance (Ho & Salimans 2022) eq. 6; 2 UniDiffuser (Bao et al. 2023)
sec. 4.3 and app. B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jointseg_jax.transport.integrator import Predict
from jointseg_jax.types import Streams

Step = Int[Array, ""]
Scale = int | float | Float[Array, ""]
Denoise = Callable[[Streams, Mapping[str, Float[Array, " rows"]], Any], Streams]
"""(latents, times per row, text) -> a prediction for each stream."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """One way to ask the network.

    Attributes:
      latents: streams to replace: an array, or a function of the step (fresh noise at each).
      times: times to replace: a number, an array [batch], or a function of the step.
      text: whatever the denoiser takes beside the streams: None, an array, or a dict of arrays,
        each with the batch in front. All branches must have the same structure.
    """

    latents: Mapping[str, Array | Callable[[Step], Array]] = dataclasses.field(default_factory=dict)
    times: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: Any = None

    def inputs(self, x: Streams, t: Mapping[str, Any], step: Step) -> tuple[Any, Any, Any]:
        """(latents, times [batch], text) of this branch at the solver's (x, t, step).

        Raises:
          ValueError: the branch names a stream that the solver does not have.
        """
        unknown = sorted((set(self.latents) | set(self.times)) - set(x))
        if unknown:
            raise ValueError(
                f"guidance: a branch replaces {', '.join(unknown)} and the streams are "
                f"{', '.join(x)}; mend the branch's `latents` or `times`."
            )
        batch = next(iter(x.values())).shape[0]
        latents = {k: _at(self.latents.get(k, v), step).astype(v.dtype) for k, v in x.items()}
        times = {
            k: jnp.broadcast_to(jnp.asarray(_at(self.times.get(k, v), step), v.dtype), (batch,))
            for k, v in t.items()
        }
        return latents, times, self.text


def _at(value: Any, step: Step) -> Any:
    return value(step) if callable(value) else value


def guided(
    denoise: Denoise,
    conditional: Branch,
    unconditional: Sequence[tuple[Branch, Mapping[str, Scale]]] = (),
) -> Predict:
    """The guided network, as a solver calls it.

    Args:
      unconditional: branches with the guidance scale of each stream that they serve; a stream
        that no branch serves is not guided. A branch whose scales are all 1 is not evaluated.

    Raises:
      ValueError: a stream is served by two branches.
    """
    served = [name for _, scales in unconditional for name in scales]
    twice = sorted({name for name in served if served.count(name) > 1})
    if twice:
        raise ValueError(
            f"guidance: streams {', '.join(twice)} are served by two unconditional branches; each "
            "stream needs one, change the branches' scales."
        )
    active = [(b, s) for b, s in unconditional if any(_on(scale) for scale in s.values())]

    def predict(x: Streams, t: Mapping[str, Any], step: Step) -> Streams:
        branches = [conditional, *(branch for branch, _ in active)]
        asked = [branch.inputs(x, t, step) for branch in branches]
        latents, times, text = jax.tree.map(lambda *parts: interleave(parts), *asked)
        answers = denoise(latents, times, text)
        split = [{k: part(v, i, len(asked)) for k, v in answers.items()} for i in range(len(asked))]
        return _combine(split, [scales for _, scales in active])

    return predict


def _on(scale: Scale) -> bool:
    """Whether a scale does anything (one that is only known inside the program counts)."""
    return not (isinstance(scale, int | float) and scale == 1)


def _combine(answers: Sequence[Streams], scales: Sequence[Mapping[str, Scale]]) -> Streams:
    """Source: the module's 1."""
    out = dict(answers[0])
    for other, served in zip(answers[1:], scales):
        for name, scale in served.items():
            if _on(scale):
                out[name] = out[name] + (scale - 1) * (out[name] - other[name])
    return out


def interleave(parts: Sequence[Array]) -> Array:
    """``[batch, ...]`` of each branch as ``[batch * branches, ...]``, example by example."""
    if len(parts) == 1:
        return parts[0]
    stacked = jnp.stack(parts, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def part(rows: Array, i: int, branches: int) -> Array:
    """The rows of branch ``i`` out of ``interleave``."""
    return rows.reshape(-1, branches, *rows.shape[1:])[:, i]

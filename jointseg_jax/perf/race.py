"""One contender alone, or two in turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jointseg_jax.perf.bench import Child, Here, Result
from jointseg_jax.perf.harness import Request
from jointseg_jax.perf.timing import ratio


def race(requests: Sequence[Request], repetitions: int, say: Callable[[str], None]) -> list[Result]:
    """The results, in the order of the requests.

    Everyone is prepared and warmed up first; then each repetition is one turn of all of them.

    Args:
      say: told how far it is.
    """
    apart = len(requests) > 1 and jax.default_backend() == "cpu"
    with contextlib.ExitStack() as open_ones:
        contenders = []
        for request in requests:
            say(f"preparing {request.what} of {request.name}")
            contender = (Child if apart else Here)(request)
            open_ones.callback(contender.close)
            contender.warm_up()
            contenders.append(contender)
        for turn in range(repetitions):
            say(f"repetition {turn + 1} of {repetitions}")
            for contender in contenders:
                contender.repeat()
        say("speed, memory, trace")
        return [contender.result() for contender in contenders]


def ratios(one: Result, other: Result) -> dict[str, dict[str, Any]]:
    """For each action that both have: how many times as long the second takes, per image.

    Where actions are about images, times are of one image, so that batches may differ.
    """
    found = {}
    for name in one.timings:
        if name in other.timings:
            sides = (_per_image(r.timings[name]) for r in (one, other))
            found[name] = ratio(*sides)
    return found


def _per_image(timing: Any) -> list[float]:
    return [seconds / max(timing.images, 1) for seconds in timing.repetitions]

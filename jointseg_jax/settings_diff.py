"""What changed between the settings that a folder was begun with and those given now.

Nested settings are read as flat keys, ``data/batch_size``, as in ``rules``. A run, or a cache, goes
on only when the two agree outside the keys the caller allows to change (number of steps, logging,
...): regular expressions, each searched for in the key.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jointseg_jax.types import UserError

_ABSENT = "(absent)"


class Difference(NamedTuple):
    """One key with another value; values as JSON text, ``(absent)`` where there is none."""

    key: str
    saved: str
    current: str

    def __str__(self) -> str:
        return f"{self.key}: {self.saved} -> {self.current}"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Each value as JSON text under its slash-joined key; an empty mapping is a value."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{key}/"))
        else:
            flat[key] = json.dumps(value, sort_keys=True)
    return flat


def compare(
    saved: Mapping[str, Any], current: Mapping[str, Any], allowed: Sequence[str] = ()
) -> list[Difference]:
    """The keys that differ and that no regular expression of ``allowed`` covers, by key."""
    old, new = flatten(saved), flatten(current)
    try:
        free = [re.compile(pattern) for pattern in allowed]
    except re.error as error:
        raise UserError(
            f"allowed changes: {error.pattern!r} is no regular expression: {error}."
        ) from error
    return [
        Difference(key, old.get(key, _ABSENT), new.get(key, _ABSENT))
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not any(pattern.search(key) for pattern in free)
    ]


def require_same(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    allowed: Sequence[str] = (),
    *,
    where: str,
    remedy: str = "Put these settings back, or choose another --workdir.",
) -> None:
    """Refuses, field by field, when :func:`compare` finds a difference.

    Args:
      where: what was made with the saved settings (``"checkpoint RUN/checkpoints/30"``).
      remedy: what the user can do, as the last line of the message.
    """
    found = compare(saved, current, allowed)
    if found:
        lines = "\n".join(f"  {difference}" for difference in found)
        fields = "1 field" if len(found) == 1 else f"{len(found)} fields"
        raise UserError(f"{where} was made with other settings, {fields}:\n{lines}\n{remedy}")


def classes_apart(there: Sequence[str], here: Sequence[str]) -> str:
    """How two lists of class names differ, and where first, in words; empty where they do not."""
    for i, names in enumerate(itertools.zip_longest(there, here)):
        if names[0] != names[1]:
            a, b = ("absent" if name is None else repr(name) for name in names)
            counts = f"{len(there)} classes, the data has {len(here)}"
            head = counts if len(there) != len(here) else "other classes"
            return f"{head}: class {i} is {a} there and {b} here"
    return ""

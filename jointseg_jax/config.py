"""``make(table, spec)``: from ``{"name": ..., **arguments}`` to an object.

The constructor is the schema. A name that is not in the table, and an argument that the
constructor does not know, are refused with what would have been accepted.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jointseg_jax.types import UserError


def make(
    table: Mapping[str, Callable[..., Any]], spec: Mapping[str, Any], *, where: str, **extra: Any
) -> Any:
    """Returns ``table[spec["name"]](**rest_of_spec, **extra)``.

    Args:
      table: the names that may stand here and what each constructs.
      spec: ``name`` and keyword arguments, left as it is.
      where: the config path of ``spec``, for messages (``"system.denoiser"``).
      extra: arguments the caller supplies; a spec may not set them.

    Raises:
      UserError: unknown name, unknown or missing argument, or the constructor's own ``ValueError``.
    """
    constructor = check_spec(table, spec, where=where, given=extra)
    arguments = {k: v for k, v in spec.items() if k != "name"}
    try:
        return constructor(**arguments, **extra)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.{where}: {spec['name']}: {error}") from error


def check_spec(
    table: Mapping[str, Callable[..., Any]],
    spec: Mapping[str, Any],
    *,
    where: str,
    given: Collection[str] = (),
) -> Callable[..., Any]:
    """The constructor that a spec names, which knows all its arguments; it is not called.

    Args:
      given: arguments that the spec may not set.

    Raises:
      UserError: unknown name, or unknown argument.
    """
    arguments = dict(spec)
    if "name" not in arguments:
        raise UserError(f"config.{where}: needs a `name`, one of: {', '.join(sorted(table))}.")
    name = arguments.pop("name")
    if name not in table:
        raise UserError(
            f"config.{where}.name: {name!r} is unknown{_closest(name, table)}; "
            f"one of: {', '.join(sorted(table))}."
        )
    constructor = table[name]
    accepted = [
        p.name
        for p in inspect.signature(constructor).parameters.values()
        if p.kind is not p.VAR_KEYWORD
        and p.name not in ("self", "parent", "name")
        and p.name not in given
    ]
    unknown = sorted(set(arguments) - set(accepted))
    if unknown:
        raise UserError(
            f"config.{where}: {name} has no field {', '.join(map(repr, unknown))}"
            f"{_closest(unknown[0], accepted)}; its fields: {', '.join(accepted)}."
        )
    return constructor


def _closest(word: str, words: Any) -> str:
    close = difflib.get_close_matches(str(word), [str(w) for w in words], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

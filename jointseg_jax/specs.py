"""From a spec, ``{"name": ..., **fields}``, to the object that it stands for.

The constructor that the name stands for is the schema of the fields: what it does not take is
refused, with the config path and the fields that there are.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from jointseg_jax.types import UserError

T = TypeVar("T")
Spec = Mapping[str, Any]
"""``{"name": ..., **fields}``: what stands for an object in a config."""


def make(table: Mapping[str, Callable[..., Any]], spec: Spec, *, where: str, **extra: Any) -> Any:
    """Returns ``table[spec["name"]](**rest_of_spec, **extra)``.

    Args:
      table: the names that may stand here and what each constructs.
      spec: ``name`` and keyword arguments, left as it is.
      where: the config path of ``spec``, for messages (``"system.denoiser"``).
      extra: arguments that the caller supplies; a spec may not set them.

    Raises:
      UserError: unknown name, unknown or missing argument, or the constructor's own ``ValueError``.
    """
    fields = {k: v for k, v in spec.items() if k != "name"}
    constructor = find(table, spec, where=where)
    return construct(constructor, fields, where=where, name=spec["name"], **extra)


def construct(
    constructor: Callable[..., T], fields: Mapping[str, Any], *, where: str, name: str, **extra: Any
) -> T:
    """Returns ``constructor(**fields, **extra)``; its refusal names the config path.

    Raises:
      UserError: a field that it does not know or needs, or its own ``ValueError``.
    """
    check_fields(constructor, fields, where=where, name=name, given=extra)
    try:
        return constructor(**fields, **extra)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.{where}: {name}: {error}") from error


def check_spec(
    table: Mapping[str, Callable[..., Any]], spec: Spec, *, where: str, given: Collection[str] = ()
) -> Callable[..., Any]:
    """Returns the constructor that a spec names, without calling it.

    Args:
      given: arguments that the spec may not set.

    Raises:
      UserError: unknown name, or unknown argument.
    """
    constructor = find(table, spec, where=where)
    fields = [k for k in spec if k != "name"]
    check_fields(constructor, fields, where=where, name=spec["name"], given=given)
    return constructor


def find(table: Mapping[str, T], spec: Spec, *, where: str) -> T:
    """What a spec's name stands for in a table.

    Raises:
      UserError: it has none, or an unknown one.
    """
    if "name" not in spec:
        raise UserError(f"config.{where}: needs a `name`, one of: {', '.join(sorted(table))}.")
    name = spec["name"]
    if name not in table:
        raise UserError(
            f"config.{where}.name: {name!r} is unknown{closest(name, table)}; "
            f"one of: {', '.join(sorted(table))}."
        )
    return table[name]


def check_fields(
    constructor: Callable[..., Any],
    fields: Collection[str],
    *,
    where: str,
    name: str,
    given: Collection[str] = (),
) -> None:
    """Refuses (UserError) fields that a constructor does not take, or that the caller supplies."""
    accepted = [n for n in accepts(constructor) if n not in given]
    if unknown := sorted(set(fields) - set(accepted)):
        raise UserError(
            f"config.{where}: {name} has no field {', '.join(map(repr, unknown))}"
            f"{closest(unknown[0], accepted)}; its fields: {', '.join(accepted)}."
        )


def accepts(constructor: Callable[..., Any]) -> list[str]:
    """The keyword arguments that a spec may give a constructor."""
    return [
        p.name
        for p in inspect.signature(constructor).parameters.values()
        # Linen modules also take `parent` and `name`, which are no settings
        if p.kind is not p.VAR_KEYWORD and p.name not in ("self", "parent", "name")
    ]


def closest(word: str, words: Collection[str]) -> str:
    """``(did you mean 'steps'?)`` for the word stepz; empty where nothing is close."""
    close = difflib.get_close_matches(str(word), [str(w) for w in words], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

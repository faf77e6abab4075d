"""Every mistake among overrides on the command line, ``--config.PATH=VALUE``.

absl and ml_collections stop at the first and do not say what else there is; here each is looked at
by itself, against the config it would change.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

KINDS: dict[type, tuple[flags.ArgumentParser, str]] = {
    bool: (flags.BooleanParser(), "true or false"),
    int: (flags.IntegerParser(), "a whole number (int), written in digits"),
    float: (flags.FloatParser(), "a number (float)"),
}
"""How a field of this type is read from text, and what to say where it cannot be."""


class Override(NamedTuple):
    """``--FLAG.PATH=VALUE``; ``value`` is None for a bare switch."""

    flag: str
    path: str
    value: str | None
    words: tuple[str, ...]


def split(argv: Sequence[str]) -> tuple[list[str], list[Override]]:
    """The words of a command line without its overrides, and the overrides."""
    plain, found, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        match = re.fullmatch(r"--?(?:no)?(\w+)\.([^=]+)(?:=(.*))?", word, re.DOTALL)
        if match is None:
            plain.append(word)
            continue
        flag, path, value = match.groups()
        if value is None and words and not words[0].startswith("-"):
            value = words.pop(0)
            found.append(Override(flag, path, value, (word, value)))
        else:
            found.append(Override(flag, path, value, (word,)))
    return plain, found


def mistake(override: Override, configs: Mapping[str, Any]) -> str | None:
    """What is wrong with an override, or None.

    Args:
      configs: nested mappings by the name of their flag.
    """
    if override.flag not in configs:
        return f"{override.words[0]}: there is no flag --{override.flag} with fields."
    node, where = configs[override.flag], override.flag
    for name in override.path.split("."):
        if not hasattr(node, "items"):
            given = f"--{override.flag}.{override.path}"
            return f"{given}: {where} is {node!r} ({type(node).__name__}) and has no fields."
        bare = name.partition("[")[0]
        if bare not in node:
            return _unknown(override, where, bare, list(node))
        node, where = node[bare], f"{where}.{bare}"
    return _misread(override, node)


def _unknown(override: Override, where: str, name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" (did you mean {' or '.join(f'{where}.{c}' for c in close)}?)" if close else ""
    fields = ", ".join(names)
    return (
        f"--{override.flag}.{override.path}: {where} has no field {name!r}{hint}; "
        f"its fields: {fields}."
    )


def _misread(override: Override, value: Any) -> str | None:
    """What is wrong with the value of an override of a field that holds ``value`` now."""
    if type(value) not in KINDS or override.value is None:
        return None
    parser, wanted = KINDS[type(value)]
    try:
        parser.parse(override.value)
    except (ValueError, TypeError):
        given = f"--{override.flag}.{override.path}={override.value}"
        return f"{given}: {override.value!r} is not {wanted}{_as_whole(override.value, value)}."
    return None


def _as_whole(text: str, value: Any) -> str:
    """``, as 10000`` for the text 1e4 where an int is wanted; else the value of now."""
    if isinstance(value, bool):
        return ""
    try:
        number = float(text)
        return f", as {int(number)}" if number == int(number) else f", as {value}"
    except (ValueError, OverflowError):
        return f", as {value}"

"""The fields of a config as text: types, defaults and meaning, read from the classes themselves.

A field's meaning is the comment behind it in its class, or the text below it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jointseg_jax import build
from jointseg_jax.config import PARTS, RunConfig, SystemConfig
from jointseg_jax.specs import accepts
from jointseg_jax.systems.autoencode import Autoencode
from jointseg_jax.systems.bridge import Bridge
from jointseg_jax.systems.joint import Joint
from jointseg_jax.training import optimizer
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import SCHEDULES
from jointseg_jax.types import UserError

SYSTEMS = {"joint": Joint, "bridge": Bridge, "autoencode": Autoencode}

TABLES: tuple[tuple[str, Mapping[str, Callable[..., Any]]], ...] = (
    (r"data\.(train|val)", build.SOURCES),
    (r"(data|evaluate)\.transforms\.\w+", build.TRANSFORMS),
    (r"optimizer", optimizer.OPTIMIZERS),
    (r"optimizer\.schedule", optimizer.SCHEDULES),
    (r"system\.(image|palette|codec)|system\.streams\.\w+\.codec", build.CODECS),
    (r"(system|system\.streams\.\w+)\.process\.schedule", SCHEDULES),
    (r"(system|system\.streams\.\w+)\.process\.weight", build.WEIGHTS),
    (r"system\.denoiser", build.DENOISERS),
    (r"system\.text", build.TEXTS),
    (r"system\.times", build.TIMES),
    (r"system\.times\.distribution(s\.\w+)?", build.DISTRIBUTIONS),
    (r"system\.solver", build.SOLVERS),
)
"""Config path -> what a ``name`` may stand for there."""

CLASSES: tuple[tuple[str, type], ...] = (
    (r"", RunConfig),
    *PARTS.items(),
    (r"system\.streams\.\w+", build.Stream),
    (r"system(\.streams\.\w+)?\.process", Process),
)
"""Config path -> the class that stands there whatever is chosen."""

INTERNAL = ("values", "options")  # fields that no config file writes: ``config`` fills them

KINDS = {"Count": "int >= 1", "CountOrZero": "int >= 0", "PathRules": "(path regex, value) rules"}
"""Names of types in ``config``, in the words of a user."""


class Row(NamedTuple):
    """One field."""

    name: str
    kind: str
    default: str
    meaning: str


def config_help(values: Mapping[str, Any], path: str = "") -> str:
    """The fields at a path of a config, as a page of text.

    Args:
      values: the config, whose own values are shown beside the defaults.
      path: as ``system.solver``; the run itself when empty.

    Raises:
      UserError: the config has nothing there, or a single value.
    """
    node: Any = values
    for name in filter(None, path.split(".")):
        if not isinstance(node, Mapping) or name not in node:
            known = ", ".join(node) if isinstance(node, Mapping) else "none, it is a value"
            raise UserError(
                f"ERROR [flags] --help_config={path}: this config has no {name!r} there; its "
                f"fields: {known}."
            )
        node = node[name]
    if not isinstance(node, Mapping):
        raise UserError(f"ERROR [flags] --help_config={path}: this is a value, {node!r}.")
    head, classes = _classes(path, node)
    lines = [head, ""]
    for cls in classes:
        first = (inspect.getdoc(cls) or cls.__name__).partition("\n\n")[0]
        paragraph = textwrap.wrap(" ".join(first.split()), 100)
        lines += [*paragraph, "", *_table(list(rows(cls)), node), ""]
    head = f"{path}." if path else ""
    if inner := [head + name for name, value in node.items() if isinstance(value, Mapping)]:
        lines.append(f"More, by --help_config PATH: {', '.join(inner)}")
    return "\n".join(lines).rstrip()


def _classes(path: str, node: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """What stands at a path, in words, and the classes that have its fields."""
    for pattern, table in TABLES:
        if re.fullmatch(pattern, path):
            others = ", ".join(sorted(table))
            return f"config.{path}: `name` is one of {others}.", [table[node["name"]]]
    if path == "system":
        return "config.system", [SystemConfig, SYSTEMS[node["name"]]]
    for pattern, cls in CLASSES:
        if re.fullmatch(pattern, path):
            return f"config.{path}".rstrip("."), [cls]
    return f"config.{path}", []


def rows(cls: type) -> Iterator[Row]:
    """The fields that a config may set of a class, with the comments of its source."""
    meanings = {k: v for base in reversed(cls.__mro__) for k, v in _meanings(base).items()}
    defaults = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    for name in accepts(cls):
        if name in INTERNAL:
            continue
        f = defaults.get(name)
        kind = f.type if f is not None and isinstance(f.type, str) else ""
        for ours, words in KINDS.items():
            kind = re.sub(rf"\b{ours}\b", words, kind)
        yield Row(name, kind, _default(f), meanings.get(name, ""))


def _default(f: dataclasses.Field[Any] | None) -> str:
    if f is None or (f.default, f.default_factory) == (dataclasses.MISSING,) * 2:
        return "needed"
    if f.default is dataclasses.MISSING:
        return repr(f.default_factory())  # pyright: ignore[reportCallIssue]
    return "see its fields" if dataclasses.is_dataclass(f.default) else repr(f.default)


def _meanings(cls: type) -> dict[str, str]:
    """Field -> the comment behind it, or the text below it, in the source of one class."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # built in, or no source here
        return {}
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(iter(source.splitlines(True)).__next__)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, str] = {}
    (top,) = ast.parse(source).body
    body = top.body if isinstance(top, ast.ClassDef) else []
    for node, after in zip(body, [*body[1:], None]):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        text = after.value if isinstance(after, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            found[node.target.id] = " ".join(text.value.split())
        elif node.end_lineno in comments:
            found[node.target.id] = comments[node.end_lineno]
    return found


def _table(fields: list[Row], node: Mapping[str, Any]) -> list[str]:
    width = max((len(row.name) for row in fields), default=0)
    lines, indent = [], " " * (width + 4)
    for row in fields:
        own = node.get(row.name)
        here = "" if own is None or isinstance(own, Mapping) else f", here {own!r}"
        kind = f"{row.kind}, " if row.kind else ""
        lines.append(f"  {row.name:<{width}}  {kind}default {row.default}{here}")
        lines += textwrap.wrap(row.meaning, 96, initial_indent=indent, subsequent_indent=indent)
    return lines

"""Ordered ``(regex, value)`` lists over the paths of a tree.

One mini-language for sharding, freezing, weight decay and learning-rate scales. The first rule
whose regex is found in a leaf's path (``re.search`` on ``"params/denoiser/mid_block/..."``)
gives the leaf its value. Strict both ways: a leaf that no rule matches and a rule that matches
no leaf are errors, so that a renamed parameter cannot silently change its treatment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from jointseg_jax.types import UserError

Rules = Sequence[Sequence[Any]]
"""``(regex, value)`` pairs; a pair is a list where the config went through JSON."""


def path_of(key_path: Sequence[object]) -> str:
    """The slash-joined name of one ``jax.tree_util`` key path."""
    # keys of dicts, attributes of dataclasses and NamedTuples, positions in sequences
    return "/".join(
        str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path
    )


def paths(tree: PyTree) -> list[str]:
    """The path of every leaf, in flattening order."""
    return list(by_path(tree))


def by_path(tree: PyTree) -> dict[str, Any]:
    """Every leaf under its path."""
    return {path_of(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def nested(leaves: Mapping[str, object]) -> dict[str, Any]:
    """The nested dict that ``by_path`` makes ``leaves`` of."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def match(
    tree: PyTree, rules: Rules, *, where: str, prefix: str = "", dead: str = "raise"
) -> PyTree:
    """A tree of the same structure whose leaves are the values of the first matching rules.

    Args:
      tree: any pytree.
      rules: ordered ``(regex, value)`` pairs.
      where: what the rules are for (``"trainable"``), for messages.
      prefix: put before every path (``"params/"``).
      dead: ``"raise"`` on a rule without a leaf, or ``"allow"``.

    Raises:
      UserError: an unmatched leaf, a dead rule, or a regex that does not compile.
    """
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise UserError(
                f"{where} rules: {pattern!r} is not a regular expression: {error}."
            ) from error
    used = [False] * len(compiled)
    unmatched: list[str] = []

    def assign(key_path: Sequence[object], _leaf: object) -> Any:
        path = prefix + path_of(key_path)
        for i, (pattern, value) in enumerate(compiled):  # the first match wins
            if pattern.search(path):
                used[i] = True
                return value
        # noted and not raised at once, so that the message counts all of them
        unmatched.append(path)
        return None

    values = jax.tree_util.tree_map_with_path(assign, tree)
    if unmatched:
        shown = ", ".join(unmatched[:5])
        raise UserError(
            f"{where} rules: {len(unmatched)} leaves match no rule, first: {shown}. Add a rule for "
            "them."
        )
    unused = [rules[i][0] for i, u in enumerate(used) if not u]
    if unused and dead == "raise":
        raise UserError(
            f"{where} rules: no leaf matches {', '.join(map(repr, unused))}. Remove or fix the "
            "rule (see rules.paths)."
        )
    return values

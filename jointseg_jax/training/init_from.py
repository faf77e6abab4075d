"""Starting from other weights: those of a trained run, or of a reference file.

``config.start`` (``config.StartConfig``), read before the first checkpoint only. A leaf's first
rule of ``move`` decides (``re.search`` on ``params/denoiser/mid_block/...``, as for ``trainable``),
and its first match is replaced. Every leaf must be matched and must land on a parameter of its own
shape; what nothing lands on keeps its fresh value. Blocks are named as in an unrolled network
(``in_blocks/0/...``), whether either network scans or not.
"""

from __future__ import annotations

import difflib
import logging
import re
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jointseg_jax import rules
from jointseg_jax.config import StartConfig
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.models.uvit import UViT
from jointseg_jax.training.workdir import load_run
from jointseg_jax.types import UserError
from jointseg_jax.weights.architectures import uvit_fields
from jointseg_jax.weights.convert import read_safetensors, stack_blocks, to_ours, unstack_blocks
from jointseg_jax.weights.tables import layout_of, table

log = logging.getLogger("jointseg_jax")

BLOCKS = r"/((?:in_blocks|mid_block|out_blocks)/.+)$"

MAP_STREAM = {
    "random": (),
    "copy": ((r"^params/denoiser/image_stream" + BLOCKS, r"params/denoiser/map_stream/\1"),),
}
"""What the map stream of ``models.two_stream`` takes of the image stream: all blocks, which have
the same shapes. It has no context, time or norm; its embedding, positions and head are those of
another kind of data and cannot be copied."""

MAX_LISTED = 5  # leaves that an error names at most

Leaves = dict[str, Any]
"""Arrays, or their shapes, by the path of a parameter of the unrolled network."""


def load(start: StartConfig, fresh: PyTree, info: DatasetInfo) -> Leaves:
    """The leaves to start from, by the path of the parameter they are for; ``{}`` when fresh.

    Args:
      fresh: the parameters' shapes.
      info: of the data, with whose words the trained ones must agree.

    Raises:
      UserError: nothing to read, or a leaf that finds no place.
    """
    if start.is_fresh:
        return {}
    source, loaded = _of_run(start, info) if start.workdir else _of_file(start)
    wanted = _by_path(jax.eval_shape(unstack_blocks, fresh))
    leaves = remap(start, loaded, wanted)
    log.info("started from %s: %d of %d parameters", source, len(leaves), len(wanted))
    return {p: np.asarray(x, wanted[p].dtype) for p, x in leaves.items()}


def remap(start: StartConfig, given: Leaves, wanted: Leaves) -> Leaves:
    """The given leaves by the path of the parameter that each is for; ``wanted`` has the shapes."""
    moved = _placed(given, start.move, wanted, "start.move", dead="allow")
    # copies are taken of what was moved: their rules speak of the paths in this network
    copies = (*start.copy, *MAP_STREAM[start.init_map_stream])
    matched = {p: x for p, x in moved.items() if any(re.search(r, p) for r, _ in copies)}
    copied = _placed(matched, copies, wanted, "start.copy", dead="raise")
    if duplicates := sorted(set(moved) & set(copied)):
        raise UserError(
            f"config.start.copy: {duplicates[0]} would be copied over what config.start.move put "
            "there; drop it from one of the two with (regex, None)."
        )
    return moved | copied


def insert(fresh: PyTree, given: Leaves) -> PyTree:
    """Fresh parameters with the given leaves in their places."""
    if not given:
        return fresh
    # rules name blocks one by one; a scanned network keeps them stacked in one array
    unrolled = unstack_blocks(fresh)
    scanned = jax.tree.structure(unrolled) != jax.tree.structure(fresh)
    leaves = rules.by_path(unrolled) | {p.removeprefix("params/"): x for p, x in given.items()}
    return stack_blocks(rules.nested(leaves)) if scanned else rules.nested(leaves)


def _of_run(start: StartConfig, info: DatasetInfo) -> tuple[str, Leaves]:
    run = load_run(start.workdir)
    given = _by_path(unstack_blocks(jax.tree.map(np.asarray, run.params)))
    # row i of the embedding is word i of the run's own list
    words = [p for p in given if p.startswith("params/text/")]
    if words and run.info.vocabulary != info.vocabulary:
        raise UserError(
            f"config.start.workdir: {start.workdir} was trained on {len(run.info.vocabulary)} "
            f"words, config.data has {len(info.vocabulary)}, and they are not the same in the "
            "same order, so its word embeddings say nothing here. Start from a run on this data."
        )
    return f"{start.workdir}, step {run.step} ({run.digest})", given


def _of_file(start: StartConfig) -> tuple[str, Leaves]:
    weights, described = read_safetensors(start.file), dict(start.architecture or {})
    layout = described.pop("layout", None) or layout_of(weights)
    module = UViT(**uvit_fields(layout, described))
    params = {"denoiser": to_ours(weights, table(layout, module))}
    return f"{start.file} ({layout})", _by_path(params)


def _by_path(params: PyTree) -> Leaves:
    return {f"params/{p}": x for p, x in rules.by_path(params).items()}


def _placed(given: Leaves, moves: rules.Rules, wanted: Leaves, where: str, *, dead: str) -> Leaves:
    """The leaves at their new paths, each of which is a parameter of that shape."""
    placed: Leaves = {}
    errors = []
    for path, to in _targets(given, moves, where, dead).items():
        if to is None:
            continue
        error = ""
        if to not in wanted:
            close = difflib.get_close_matches(to, wanted, n=1)
            error = "this network has no such parameter"
            error += f" (did you mean {close[0]}?)" if close else ""
        elif np.shape(given[path]) != wanted[to].shape:
            error = f"{np.shape(given[path])} does not fit {wanted[to].shape}"
        elif to in placed:
            error = "another leaf goes there too"
        if error:
            errors.append(f"\n  {path} -> {to}: {error}")
        else:
            placed[to] = given[path]
    if errors:
        more = "\n  ..." if len(errors) > MAX_LISTED else ""
        raise UserError(
            f"config.{where}: {len(errors)} leaves find no place:"
            f"{''.join(errors[:MAX_LISTED])}{more}\nFix the rule, make the networks alike (width, "
            "depth, patch, size), or drop such leaves with (regex, None)."
        )
    return placed


def _targets(given: Leaves, moves: rules.Rules, where: str, dead: str) -> dict[str, str | None]:
    """The new path of every leaf; None for those that are dropped."""
    # the rules' own numbers as values, so that a match also says which pattern to replace
    numbered = [(pattern, i) for i, (pattern, _) in enumerate(moves)]
    found = rules.match(given, numbered, where=where, dead=dead)
    try:
        return {path: _replaced(path, *moves[i]) for path, i in found.items()}
    except (re.error, IndexError) as error:
        raise UserError(
            f"config.{where}: a replacement names a group that its regex lacks: {error}."
        ) from error


def _replaced(path: str, pattern: str, to: str | None) -> str | None:
    return None if to is None else re.sub(pattern, to, path, count=1)

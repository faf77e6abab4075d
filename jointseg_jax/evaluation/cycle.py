"""What a bridge is worth in both directions, over numbers of solver steps.

For every number of steps, on validation pairs:

1. segmentation: IoU of the labels read off the real image with the true ones, with its edges and
   its worst class; and the part of pixels that another seed reads otherwise, which must be 0
2. synthesis: IoU of a judge's labels of the image made from a map with that map, chance beside it.
   Without a judge of its own the bridge reads its image back ("self"): that measures a cycle, not
   what another segmenter would see
3. diversity: mean absolute difference, as a part of the grey range, between two images made from
   one map with different perturbations; 0 means that the map alone decides
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax import sharding
from jointseg_jax.annotations import viz
from jointseg_jax.evaluation.alignment import Alignment, Reconstruction, cycle, number
from jointseg_jax.generation.generate import with_options
from jointseg_jax.rng import sample_keys
from jointseg_jax.training.workdir import Run
from jointseg_jax.types import Array

Judge = Callable[[np.ndarray], np.ndarray]

SHOWN = 8
"""Pairs in the picture of each number of steps."""

log = logging.getLogger("jointseg_jax")


def bridge_report(
    run: Run,
    batches: Callable[[], Any],
    count: int,
    judge: Judge | None,
    seed: int,
    steps: Sequence[int],
) -> dict[str, Any]:
    """One row per number of steps, and the one-step segmentation as a part of the best.

    Args:
      batches: starts anew the validation batches, with ``valid``.
      count: records in them; the pictures show some of them, evenly spread.
      judge: None is the bridge itself.
    """
    rows = []
    every = max(1, count // SHOWN)
    for n in steps:
        rows.append({"steps": n} | _row(run, batches(), judge, seed, n, every))
        log.info("%s", "  ".join(f"{k} {v}" for k, v in rows[-1].items() if not _nested(v)))
    best = max(row["segmentation_miou"] for row in rows)
    one = [row["segmentation_miou"] for row in rows if row["steps"] == 1]
    return {
        "judge": run.config["evaluate"]["judge"] or "self",
        "table": rows,
        "best_segmentation_miou": best,
        "one_step_of_best": number(one[0] / best) if one and best else None,
    }


def _nested(value: Any) -> bool:
    return isinstance(value, (dict, list))


def _row(
    run: Run, batches: Any, judge: Judge | None, seed: int, steps: int, every: int
) -> dict[str, Any]:
    names = run.info.classes.names
    travel = _both_ways(run, steps)
    segmentation = Reconstruction(names)
    differences, unequal, shown, judged = [], [], [], []
    with jax.set_mesh(sharding.own_mesh()):
        for batch in batches:
            real = {k: batch[k] for k in ("image", "labels")}
            made = jax.tree.map(np.asarray, travel(real, seed, batch["index"]))
            valid = batch["valid"]
            segmentation.add(real["labels"], made["read"], valid)
            apart = np.abs(made["first"].astype(np.int16) - made["second"]) / 255
            differences += apart.mean((1, 2, 3))[valid].tolist()
            unequal += (made["read"] != made["read_again"]).mean((1, 2))[valid].tolist()
            for i in np.flatnonzero(valid):
                seen = made["back"][i] if judge is None else judge(made["first"][i])
                judged.append((seen, real["labels"][i]))
                if len(judged) % every == 1 % every and len(shown) < SHOWN:
                    shown.append((real["image"][i], real["labels"][i], made, i))
    grid = _grid(run, shown, steps)
    alignment, found = _alignment(names, judged, seed), segmentation.report()
    return {
        "segmentation_miou": found["reconstruction_miou"],
        "segmentation_edge_miou": found["edge_miou"],
        "segmentation_worst_class": found["worst_class"],
        "segmentation_other_seed": number(np.mean(unequal)),
        "alignment_miou": number(alignment.own.miou()),
        "chance_miou": number(alignment.strangers.miou()),
        "diversity": number(np.mean(differences)),
        "grid": str(grid),
    }


def _alignment(names: Sequence[str], judged: Sequence[tuple], seed: int) -> Alignment:
    """Of (the judge's labels, the map given) of each record; chance with maps of other records."""
    alignment, order = Alignment(names), cycle(len(judged), seed)
    for before, index in zip(np.roll(order, 1), order):
        stranger = judged[before][1] if len(judged) > 1 else None
        alignment.add(*judged[index], stranger)
    return alignment


def _both_ways(run: Run, steps: int) -> Callable:
    """``(pairs, seed, indices) -> `` what the bridge makes of each end, on the device."""
    system = with_options(run.system, steps=steps, guidance=None)
    mesh = sharding.own_mesh()
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    params, frozen = jax.device_put((run.params, run.frozen), everywhere)

    @jax.jit
    def travel(params: Any, frozen: Any, real: Any, seeds: Array, indices: Array) -> Any:
        first, second = (sample_keys(seed, indices) for seed in seeds)

        def go(keys: Array, **given: Array) -> Any:
            return system.generate(params, frozen, None, keys, condition=given)

        image = go(first, labels=real["labels"])["image"]
        return {
            "read": go(first, image=real["image"])["labels"],
            "read_again": go(second, image=real["image"])["labels"],
            "first": image,
            "second": go(second, labels=real["labels"])["image"],
            "back": go(first, image=image)["labels"],
        }

    def on_host(real: Any, seed: int, indices: np.ndarray) -> Any:
        real, indices = jax.device_put((real, indices.astype(np.uint32)), rows)
        return travel(params, frozen, real, jnp.array([seed, seed + 1], jnp.uint32), indices)

    return on_host


def _grid(run: Run, shown: Sequence[tuple], steps: int) -> Any:
    """A row per pair: image, true labels, labels read, and two images made from the map."""
    classes, rows = run.info.classes, []
    scale = max(1, round(viz.READABLE / run.system.size[0]))
    for image, labels, made, i in shown:
        maps = [viz.colourise(m, classes) for m in (labels, made["read"][i])]
        cells = [image, *maps, made["first"][i], made["second"][i]]
        rows.append([viz.enlarge(cell, scale) for cell in cells])
    words = [["image", "its labels", "labels read", "made from the labels", "the same, again"]]
    present = np.unique([labels for _, labels, _, _ in shown]).tolist()
    title = f"{steps} solver step{'s' if steps > 1 else ''}"
    sheet = viz.contact_sheet(rows, captions=words, legend=classes, present=present, title=title)
    folder = run.workdir / "evaluation"
    folder.mkdir(exist_ok=True)
    path = folder / f"bridge-{run.step}-steps{steps}.png"
    if jax.process_index() == 0:
        viz.save_png(path, sheet)
    return path

"""What a bridge is worth in both directions, over numbers of solver steps.

For every number of steps, on validation pairs:

1. segmentation: IoU of the labels made from the real image with the true ones, with its edges and
   its worst class; and the part of pixels that another seed labels otherwise, which must be 0
2. synthesis: IoU of a judge's labels of the image made from a map with that map, and its level of
   chance. Without a judge of its own the bridge segments its image itself ("self"): that measures a
   cycle, not what another segmenter would see
3. diversity: mean absolute difference, as a part of the grey range, between two images made from
   one map with different perturbations; 0 means that the map alone decides
4. of scenes that the oracle judges: shapes and fragments of the images made, real ones beside
   (``scene_report.py``)
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jointseg_jax import build
from jointseg_jax.annotations import viz
from jointseg_jax.evaluation.alignment import (
    Alignment,
    Judge,
    Reconstruction,
    cycle,
    find_judge,
    number,
)
from jointseg_jax.evaluation.held_out import PER_DEVICE, validation_batches
from jointseg_jax.evaluation.scene_report import MOST, measure, real_scenes, scene_source
from jointseg_jax.generation.sampler import Sampler, make_sampler, with_options
from jointseg_jax.rng import sample_keys
from jointseg_jax.systems.system import Generator, Pairs
from jointseg_jax.training.workdir import Run
from jointseg_jax.types import Array, Params

SHOWN = 8
"""Pairs in the picture of each number of steps."""

log = logging.getLogger("jointseg_jax")


def bridge_report(run: Run, num: int, seed: int, steps: Sequence[int]) -> dict[str, Any]:
    """Measures one row per number of steps, and the one-step segmentation as a part of the best."""
    judge = find_judge(run)
    rows = []
    for n in steps or (run.system.solver.steps,):
        rows.append({"steps": n} | _row(run, num, judge, seed, n))
        plain = {k: v for k, v in rows[-1].items() if not isinstance(v, (dict, list))}
        log.info("%s", "  ".join(f"{k} {v}" for k, v in plain.items()))
    best = max(row["segmentation_miou"] for row in rows)
    one = [row["segmentation_miou"] for row in rows if row["steps"] == 1]
    source = scene_source(run.config)
    real = {} if source is None else real_scenes(source, num, pairs=False)
    return {
        "judge": run.config.evaluate.judge or "self",
        "table": rows,
        "best_segmentation_miou": best,
        "one_step_of_best": number(one[0] / best) if one and best else None,
    } | real


Shown = tuple[np.ndarray, ...]
"""A row of the picture: an image [height, width, 3], its labels [height, width], the labels read
from it, and two images made from the labels with different perturbations."""


def _row(run: Run, num: int, judge: Judge | None, seed: int, steps: int) -> dict[str, Any]:
    names = run.info.classes.names
    count = min(num, len(build.source(run.config, "val")))
    every = max(1, count // SHOWN)  # evenly spread over the records
    segmentation = Reconstruction(names)
    differences, unequal, shown, judged, images = [], [], [], [], []
    sampler = both_ways_sampler(run, steps)
    for batch in validation_batches(run, sampler.batch_size, num, "pairs"):
        real = {k: batch[k] for k in ("image", "labels")}
        made = jax.tree.map(np.asarray, sampler(seed, batch["index"], None, real))
        valid = batch["valid"]
        segmentation.add(real["labels"], made["segmented"], valid)
        # int16 before the difference: uint8 would wrap around
        difference = np.abs(made["first"].astype(np.int16) - made["second"]) / 255
        differences += difference.mean((1, 2, 3))[valid].tolist()
        unequal += (made["segmented"] != made["segmented_2"]).mean((1, 2))[valid].tolist()
        for i in np.flatnonzero(valid):
            labels = made["back"][i] if judge is None else judge(made["first"][i])
            judged.append((labels, real["labels"][i]))
            images += [made["first"][i]] if len(images) < MOST else []
            if len(judged) % every == 1 % every and len(shown) < SHOWN:
                pictures = (made[k][i] for k in ("segmented", "first", "second"))
                shown.append((real["image"][i], real["labels"][i], *pictures))
    grid = _save_grid(run, shown, steps)
    alignment, report = _alignment(names, judged, seed), segmentation.report()
    source = scene_source(run.config)
    seen = {} if source is None else {"scenes": measure(np.stack(images), None, None, source)}
    return {
        "segmentation_miou": report["reconstruction_miou"],
        "segmentation_edge_miou": report["edge_miou"],
        "segmentation_worst_class": report["worst_class"],
        "segmentation_other_seed": number(np.mean(unequal)),
        "alignment_miou": number(alignment.own.miou()),
        "chance_miou": number(alignment.others.miou()),
        "diversity": number(np.mean(differences)),
        "grid": str(grid),
    } | seen


def _alignment(
    names: Sequence[str], judged: Sequence[tuple[np.ndarray, np.ndarray]], seed: int
) -> Alignment:
    """Of (the judge's labels, the map given) of each record; chance with maps of other records."""
    alignment, order = Alignment(names), cycle(len(judged), seed)
    for before, index in zip(np.roll(order, 1), order):
        other = judged[before][1] if len(judged) > 1 else None
        labels, given = judged[index]
        alignment.add(labels, given, other)
    return alignment


def both_ways_sampler(run: Run, steps: int) -> Sampler:
    """Returns a sampler of what the bridge makes of each end of a batch."""
    system = with_options(run.system, steps=steps, guidance=None)
    sampler = make_sampler(run, system, per_device=PER_DEVICE)
    jitted = jax.jit(functools.partial(_both_ways, system))
    return dataclasses.replace(sampler, sample_batch=jitted)


def _both_ways(
    system: Generator,
    params: Params,
    frozen: Params,
    text: None,
    real: Pairs,
    seed: Array,
    indices: Array,
) -> Pairs:
    """Segments and synthesizes with two seeds each, and segments the first image."""
    first, second = (sample_keys(s, indices) for s in (seed, seed + 1))
    other_end = functools.partial(system.generate, params, frozen, text)
    image = other_end(first, condition={"labels": real["labels"]})["image"]
    return {
        "segmented": other_end(first, condition={"image": real["image"]})["labels"],
        "segmented_2": other_end(second, condition={"image": real["image"]})["labels"],
        "first": image,
        "second": other_end(second, condition={"labels": real["labels"]})["image"],
        "back": other_end(first, condition={"image": image})["labels"],
    }


def _save_grid(run: Run, shown: Sequence[Shown], steps: int) -> Path:
    """Draws a row per pair: image, true and made labels, and two images made from the labels."""
    classes = run.info.classes
    scale = max(1, round(viz.READABLE / run.system.size[0]))
    rows = []
    for image, labels, segmented, first, second in shown:
        maps = (viz.colourise(drawn, classes) for drawn in (labels, segmented))
        rows.append([viz.enlarge(cell, scale) for cell in (image, *maps, first, second)])
    words = [["image", "its labels", "labels read", "made from the labels", "the same, again"]]
    present = np.unique([labels for _, labels, *_ in shown]).tolist()
    title = f"{steps} solver step{'s' if steps > 1 else ''}"
    sheet = viz.contact_sheet(rows, captions=words, legend=classes, present=present, title=title)
    folder = run.workdir / "evaluation"
    folder.mkdir(exist_ok=True)
    path = folder / f"bridge-{run.step}-steps{steps}.png"
    if jax.process_index() == 0:
        viz.save_png(path, sheet)
    return path

"""The codecs of a config: images encoded and decoded per second, and what a round trip keeps.

1. Inputs are the config's training data where they are on this machine, else random images and
   label maps of smooth blobs.
2. ``NAME encode`` and ``NAME decode`` are jitted calls of one batch on one device.
3. ``miou`` of a label codec is that of decode(encode(labels)) against the labels, over the classes
   in the batch. Without a trained run (``workdir``), a codec with parameters has random ones, and
   the figure says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jointseg_jax.evaluation.confusion import Confusion
from jointseg_jax.perf import bench_masks, machine, subject
from jointseg_jax.perf.harness import Action, Job, Request, wall
from jointseg_jax.systems.bridge import IMAGE
from jointseg_jax.types import UserError

ROWS = 8
"""Images in a batch, where nobody says."""

REGIONS = 40
"""Regions in a made-up label map."""


class Coded(NamedTuple):
    """A codec, its parameters, and the batch field that it codes."""

    codec: Any
    params: Any
    field: str


def codecs(found: subject.Subject) -> dict[str, Coded]:
    """The codecs of a system that have something to do."""
    system, frozen = found.system, found.frozen
    key = jax.random.key(0)
    if hasattr(system, "codec"):
        params = found.params if found.params is not None else jax.jit(system.init)(key)
        return {"codec": Coded(system.codec, params, system.field)}
    if not system.streams:
        image = frozen.get(IMAGE, {}) or system.mask.second.init(key)
        pair = {"image": Coded(system.mask.second, image, "image")}
        return pair | {"mask": Coded(system.mask, image, "labels")}
    return {
        name: Coded(s.codec, frozen.get(name) or s.codec.init(key), s.field)
        for name, s in system.streams.items()
        if s.codec.kind != "latents"
    }


def inputs(found: subject.Subject, rows: int) -> tuple[dict[str, np.ndarray], str]:
    """A host batch with pictures in it, and where it comes from."""
    spec = found.config["data"]["train"]
    if "root" not in spec or Path(spec["root"]).is_dir():
        pictures = dict(found.config["data"]) | {"cache": ""}
        config = dict(found.config) | {"batch": rows, "data": pictures}
        with subject.real_batches(found._replace(config=config)) as batches:
            return next(batches), "the config's data"
    made = subject.random_rows(found, rows, 0)
    (height, width), count = found.system.size, len(found.known.classes)
    maps = [
        bench_masks.label_map(max(height, width), REGIONS, classes=min(count, 200), seed=n)
        for n in range(rows)
    ]
    made["labels"] = np.stack([m[:height, :width] for m in maps]).astype(np.int16)
    return made, "random images and blobs"


def prepare(request: Request) -> Job:
    """The job of ``--what codec``."""
    found = subject.subject(request)
    chosen = codecs(found)
    if not chosen:
        raise UserError(
            "ERROR [flags] --what=codec: every stream of this config is latents that were cached; "
            "there is nothing to encode. Give the config of the codec itself."
        )
    batch, origin = inputs(found, request.batch or ROWS)
    rows = len(batch["labels"])
    actions, quality = {}, {}
    for name, coded in chosen.items():
        encode = jax.jit(coded.codec.encode)
        decode = jax.jit(coded.codec.decode)
        params, values = jax.device_put((coded.params, batch[coded.field]))
        latents = encode(params, values)
        quality[name] = _quality(coded, batch, np.asarray(decode(params, latents)), found)
        quality[name]["latent"] = list(latents.shape[1:])
        quality[name]["parameters"] = _origin(params, request)
        actions[f"{name} encode"] = _action(encode, params, values, rows)
        actions[f"{name} decode"] = _action(decode, params, latents, rows)
    facts = {
        "codecs": {name: type(c.codec).__name__ for name, c in chosen.items()},
        "size": list(found.system.size),
        "classes": len(found.known.classes),
        "batch": rows,
        "input": origin,
        "round_trip": quality,
        "notes": list(found.notes),
    }

    def after(medians: Mapping[str, float]) -> dict[str, Any]:
        del medians
        return {"memory": machine.memory()}

    return Job(actions, facts, after)


def _origin(params: Any, request: Request) -> str:
    if not jax.tree.leaves(params):
        return "none"
    return "trained" if request.workdir else "random"


def _action(call: Any, params: Any, values: Any, rows: int) -> Action:
    return Action(wall(lambda: jax.block_until_ready(call(params, values))), rows)


def _quality(
    coded: Coded, batch: Mapping[str, np.ndarray], decoded: np.ndarray, found: subject.Subject
) -> dict[str, Any]:
    """What a round trip keeps: mIoU of labels, root mean square error of images in 0 .. 255."""
    if coded.codec.kind == "image":
        wanted = batch[coded.field].astype(np.float32)
        return {"rmse": round(float(np.sqrt(np.mean((127.5 * (decoded + 1) - wanted) ** 2))), 3)}
    labels = batch["labels"]
    if coded.codec.kind == "panoptic":
        decoded = decoded[..., 0]
    confusion = Confusion(len(found.known.classes))
    confusion.add(labels, decoded.astype(np.int64))
    return {
        "miou": round(float(confusion.miou()), 5),
        "pixels_kept": round(float((labels == decoded).mean()), 5),
    }

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
from typing import Any, NamedTuple

import jax
import numpy as np

from jointseg_jax.evaluation.confusion import Confusion
from jointseg_jax.perf import abstract, bench_masks
from jointseg_jax.perf.abstract import ModelUnderTest
from jointseg_jax.perf.harness import Action, BenchConfig, Benchmark, Values, wall
from jointseg_jax.systems.bridge import IMAGE
from jointseg_jax.types import Params, UserError

ROWS = 8
"""Images in a batch by default."""

REGIONS = 40
"""Regions in a made-up label map."""


class Coded(NamedTuple):
    """A codec under test."""

    codec: Any
    params: Params
    field: str  # the batch field that it codes


def codecs(model: ModelUnderTest) -> dict[str, Coded]:
    """The codecs of a system that have something to do."""
    system, frozen = model.system, model.frozen
    key = jax.random.key(0)
    if hasattr(system, "codec"):
        params = model.params if model.params is not None else jax.jit(system.init)(key)
        return {"codec": Coded(system.codec, params, system.field)}
    # A bridge has no streams: its image codec and its palette.
    if not system.streams:
        image = frozen.get(IMAGE, {}) or system.mask.second.init(key)
        pair = {"image": Coded(system.mask.second, image, "image")}
        return pair | {"mask": Coded(system.mask, image, "labels")}
    return {
        name: Coded(s.codec, frozen.get(name) or s.codec.init(key), s.field)
        for name, s in system.streams.items()
        if s.codec.kind != "latents"
    }


def inputs(model: ModelUnderTest, rows: int) -> tuple[dict[str, np.ndarray], str]:
    """A host batch with pictures in it, and where it comes from."""
    if abstract.is_here(model.config.data.train):
        config = model.config.replace({"batch": rows, "data.cache": ""})  # pictures, not latents
        with abstract.real_batches(config, model.info) as batches:
            return next(batches), "the config's data"
    shapes = abstract.batch_shapes(model.config, model.system, rows)
    made = abstract.random_rows(model.info, shapes, 0)
    (height, width), count = model.system.size, len(model.info.classes)
    maps = [
        bench_masks.label_map(max(height, width), REGIONS, classes=min(count, 200), seed=n)
        for n in range(rows)
    ]
    made["labels"] = np.stack([m[:height, :width] for m in maps]).astype(np.int16)
    return made, "random images and blobs"


class Codecs(Benchmark):
    """The benchmark of ``--what codec``."""

    def __init__(self, bench: BenchConfig):
        model = abstract.model_under_test(bench)
        chosen = codecs(model)
        if not chosen:
            raise UserError(
                "ERROR [flags] --what=codec: every stream of this config is latents that were "
                "cached; there is nothing to encode. Give the config of the codec itself."
            )
        batch, origin = inputs(model, bench.batch or ROWS)
        rows = len(batch["labels"])
        self.actions, quality = {}, {}
        for name, coded in chosen.items():
            encode, decode = jax.jit(coded.codec.encode), jax.jit(coded.codec.decode)
            # On the device already: encoding is timed, not the way there.
            params, values = jax.device_put((coded.params, batch[coded.field]))
            latents = encode(params, values)
            trained = "trained" if bench.workdir else "random"
            quality[name] = _quality(coded, batch, np.asarray(decode(params, latents)), model)
            quality[name]["latent"] = list(latents.shape[1:])
            quality[name]["parameters"] = trained if jax.tree.leaves(params) else "none"
            for way, call, x in (("encode", encode, values), ("decode", decode, latents)):
                run = wall(lambda call=call, p=params, x=x: jax.block_until_ready(call(p, x)))
                self.actions[f"{name} {way}"] = Action(run, rows)
        self.facts = {
            "codecs": {name: type(c.codec).__name__ for name, c in chosen.items()},
            "size": list(model.system.size),
            "classes": len(model.info.classes),
            "batch": rows,
            "input": origin,
            "round_trip": quality,
            "notes": list(model.notes),
        }


def _quality(
    coded: Coded, batch: Mapping[str, np.ndarray], decoded: np.ndarray, model: ModelUnderTest
) -> Values:
    """What a round trip keeps: mIoU of labels, root mean square error of images in 0 .. 255."""
    if coded.codec.kind == "image":
        # Decoded images are in [-1, 1].
        wanted = batch[coded.field].astype(np.float32)
        return {"rmse": round(float(np.sqrt(np.mean((127.5 * (decoded + 1) - wanted) ** 2))), 3)}
    labels = batch["labels"]
    # [b, h, w, 2] holds labels and instances; the round trip is judged by the labels.
    if coded.codec.kind == "panoptic":
        decoded = decoded[..., 0]
    confusion = Confusion(len(model.info.classes))
    confusion.add(labels, decoded.astype(np.int64))
    return {
        "miou": round(float(confusion.miou()), 5),
        "pixels_kept": round(float((labels == decoded).mean()), 5),
    }

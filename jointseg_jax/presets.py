"""Plain facts that several configs share, and the parser of config arguments.

A config is data; what is written here is data too: model sizes, dataset facts, schedules.
"""

from __future__ import annotations

from typing import Any


def parse_arg(arg: str, **defaults: Any) -> dict[str, Any]:
    """Reads ``"data=camvid,smoke"`` into ``{"data": "camvid", "smoke": True}``.

    A key's type is that of its default; a bare key is ``True``.

    Raises:
      ValueError: an unknown key, or a value that is not of the default's type.
    """
    values = dict(defaults)
    for part in filter(None, arg.split(",")):
        key, given, text = part.partition("=")
        if key not in defaults:
            raise ValueError(f"config argument {key!r} is unknown; one of: {', '.join(defaults)}.")
        default = defaults[key]
        if isinstance(default, bool):
            if text not in ("", "true", "false"):
                raise ValueError(f"config argument {part!r}: {key} is a switch; write {key} alone.")
            values[key] = text != "false"
        elif not given:
            raise ValueError(f"config argument {part!r}: {key} needs a value, as {key}={default}.")
        else:
            try:
                values[key] = type(default)(text)
            except ValueError as error:
                raise ValueError(f"config argument {part!r}: {error}") from error
    return values


def choose(arg: str, key: str, table: dict[str, Any]) -> Any:
    """The table's entry for a config argument's value, or an error that lists the entries."""
    if arg not in table:
        raise ValueError(f"config argument {key}={arg} is unknown; one of: {', '.join(table)}.")
    return table[arg]


def run(**changes: Any) -> dict[str, Any]:
    """The settings that every training run has, with ``changes`` on top."""
    settings: dict[str, Any] = {
        "seed": 0,
        "accumulate": 1,  # micro-batches per update
        "ema": 0.9999,
        "mesh": (-1, 1, 1),  # data, fsdp, model; -1 takes the devices left over
        "sharding": "replicate",  # replicate, zero1, fsdp, or a list of (path regex, tactic)
        "trainable": ((r"", True),),
        "log": {"every": 50},  # steps
        "preview": {"every": 1000, "count": 8},  # steps (0: never), pairs
        "checkpoint": {"every": 1000, "keep": 3},  # steps, checkpoints
        "nan": {"policy": "skip", "limit": 10},  # skip, stop or rollback; refused updates in a row
        "profile": {"start": -1, "steps": 0},  # traced steps
        "finish": {"num": 0},  # pairs generated and judged after the last step
        # judge: "oracle" where the data knows its own labels; transforms: {} for those of training
        "evaluate": {"judge": "", "transforms": {}},
    }
    unknown = sorted(
        set(changes) - set(settings) - {"steps", "batch", "data", "system", "optimizer"}
    )
    if unknown:
        raise ValueError(f"presets.run: unknown settings {unknown}.")
    return settings | changes


def scenes(
    size: int,
    *,
    things: int = 5,
    thing_size: tuple[float, float] = (0.25, 0.5),
    texture: float = 1.0,
) -> dict[str, Any]:
    """The embedded procedural source: endless training scenes, 2,000 held-out ones.

    Args:
      things: most things in a scene.
      thing_size: smallest and largest diameter, as a part of the side.
      texture: strength of stripes, dots and grain.
    """
    source = {
        "name": "scenes",
        "size": size,
        "max_things": things,
        "thing_size": thing_size,
        "texture": texture,
    }
    return {
        "train": source | {"split": "train"},
        "val": source | {"split": "val", "count": 2000},
        "transforms": {},
        "workers": 0,
        "threads": 1,
    }


def crops(size: tuple[int, int], *, mode: str = "crop", flip: float = 0.5) -> dict[str, Any]:
    """Shorter-side resize and crop (or stretch), then a mirror with left/right classes swapped."""
    return {
        "resize": {"name": "resize", "size": size, "mode": mode},
        "flip": {"name": "flip", "probability": flip},
    }


def with_features(data: dict[str, Any], root: str, *fields: str) -> dict[str, Any]:
    """A data set whose records carry arrays computed beforehand; the crop is the centre's."""
    features = {"name": "npy", "root": root, "fields": fields}
    resize = data["transforms"]["resize"] | {"random": False}
    splits = {k: data[k] | {"features": features} for k in ("train", "val")}
    return data | splits | {"transforms": {"resize": resize}}


def dataset(name: str, size: tuple[int, int], **changes: Any) -> dict[str, Any]:
    """Where a real data set lies (relative to the working directory) and how it is read."""
    layouts = {
        "folders": ("data/folders", "folders", "train", "val"),
        "voc": ("data/VOC2012", "voc", "trainaug", "val"),
        "ade20k": ("data/ADEChallengeData2016", "ade20k", "training", "validation"),
        "coco_panoptic": ("data/coco", "coco_panoptic", "train2017", "val2017"),
    }
    root, layout, train, val = layouts[name]
    source = {"name": "folders", "root": root, "layout": layout}
    return {
        "train": source | {"split": train},
        "val": source | {"split": val},
        "transforms": crops(size),
        "workers": 8,
        "threads": 4,
    } | changes


UVIT_SMALL = {"name": "uvit", "width": 512, "depth": 12, "heads": 8}
"""U-ViT-S, 44.7 M parameters with text (U-ViT, table 1)."""

UNIDIFFUSER = {"name": "uvit", "width": 1536, "depth": 30, "heads": 24, "norm": "post"}
"""UniDiffuser-v1 and JoDiffusion, 952-954 M parameters."""

SD_SCHEDULE = {"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000}
"""Stable Diffusion's betas; ``time_offset`` 1 is U-ViT's numbering, 0 that of diffusers."""

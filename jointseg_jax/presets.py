"""What the configs share and no experiment is made of.

The parser of config arguments, the bookkeeping of every run, the smoke size, and where data sets
lie. The numbers of an experiment stand in its own file under ``configs/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

Settings = dict[str, Any]
"""Nested values, as a config holds them."""

Choice = TypeVar("Choice")


def parse_arg(arg: str, **defaults: str | int | float) -> Settings:
    """Reads ``"data=camvid,smoke"`` into ``{"data": "camvid", "smoke": True}``.

    A key's type is that of its default; a bare key is ``True``.

    Raises:
      ValueError: an unknown key, or a value that is not of the default's type.
    """
    values: Settings = dict(defaults)
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


def choose(arg: str, key: str, table: Mapping[str, Choice]) -> Choice:
    """Returns the table's entry for a config argument's value.

    Raises:
      ValueError: no such entry; the message lists them.
    """
    if arg not in table:
        raise ValueError(f"config argument {key}={arg} is unknown; one of: {', '.join(table)}.")
    return table[arg]


def run(**changes: object) -> Settings:
    """Returns the settings that every training run has, with ``changes`` on top."""
    settings: Settings = {
        "seed": 0,
        "accumulate": 1,  # micro-batches per update
        "ema": 0.9999,
        "mesh": (-1, 1, 1),  # data, fsdp, model; -1 takes the devices left over
        "sharding": "replicate",  # zero1, fsdp, fsdp+model, or a list of (path regex, tactic)
        "trainable": ((r"", True),),
        # other weights to begin with: see training/init_from.py
        "start": {"workdir": "", "file": ""},
        "log": {"every": 50},  # steps
        # steps (0: never), the earliest of them, which doubles up to every (0: none), pairs
        "preview": {"every": 1000, "first": 100, "count": 8},
        "checkpoint": {"every": 1000, "keep": 3},  # steps, checkpoints
        # policy: skip, stop or rollback; limit: refused updates in a row; spike: a loss this many
        # times the usual one, on_spike: count or rollback
        "nan": {"policy": "skip", "limit": 10, "spike": 100.0, "on_spike": "count"},
        "watchdog": {"seconds": 1800, "abort": False},  # of silence, before stacks are written
        "profile": {"start": -1, "steps": 0},  # traced steps
        "finish": {"num": 0},  # pairs generated and judged after the last step
        # judge: "oracle" where the data knows its own labels; transforms: {} for those of training
        "evaluate": {"judge": "", "transforms": {}},
    }
    needed = {"steps", "batch", "data", "system", "optimizer"}
    if unknown := sorted(set(changes) - set(settings) - needed):
        raise ValueError(f"presets.run: unknown settings {unknown}.")
    # a run that says how often it is previewed is previewed early all the same
    preview = {**settings["preview"], **cast(Settings, changes.get("preview", {}))}
    return settings | changes | {"preview": preview}


def brief(config: Settings) -> Settings:
    """Returns the same run for four steps."""
    optimizer = config["optimizer"]
    optimizer = optimizer | {"schedule": optimizer["schedule"] | {"warmup": 1}}
    often = {"log": {"every": 2}, "checkpoint": {"every": 2, "keep": 2}}
    return config | {"steps": 4, "batch": 8, "optimizer": optimizer} | often


def shrunk(config: Settings) -> Settings:
    """Returns the same run in seconds and from nothing, to see that its parts work together."""
    config = brief(config) | {"ema": 0.9}
    # A smoke run needs no other run's weights, and keeps the rest of ``start`` to be checked.
    config |= {"start": config["start"] | {"workdir": "", "file": ""}}
    denoiser = config["system"]["denoiser"]
    denoiser |= {"width": 32, "depth": 2, "heads": 2}
    if "widths" in denoiser:
        denoiser |= {"widths": (16,) * len(denoiser["widths"]), "units": 8}
    config["system"]["solver"]["steps"] = 3
    config["finish"]["num"] = min(config["finish"]["num"], 16)
    return config


def scenes(
    size: int,
    *,
    things: int = 5,
    thing_size: tuple[float, float] = (0.25, 0.5),
    texture: float = 1.0,
) -> Settings:
    """Returns the embedded procedural source: endless training scenes, 2,000 held-out ones.

    Args:
      things: most things in a scene.
      thing_size: smallest and largest diameter, as a part of the side.
      texture: strength of stripes, dots and grain.
    """
    source = {"name": "scenes", "size": size, "max_things": things}
    source |= {"thing_size": thing_size, "texture": texture}
    val = source | {"split": "val", "count": 2000}
    return _data(source | {"split": "train"}, val, {}, workers=0, threads=1)


def _data(train: Settings, val: Settings, transforms: Settings, **loading: int) -> Settings:
    # cache: a folder made by launch/encode.py, to train from in place of train
    return {"train": train, "val": val, "cache": "", "transforms": transforms} | loading


def crops(
    size: tuple[int, int],
    *,
    mode: str = "crop",
    random_scale: tuple[float, float] | None = None,
    flip: float = 0.5,
) -> Settings:
    """Returns a resize and crop (or stretch), then a mirror with left/right classes swapped.

    Args:
      random_scale: range of the shorter side before the crop, in units of the crop's.
      flip: probability of the mirror.
    """
    resize: Settings = {"name": "resize", "size": size, "mode": mode}
    if random_scale:
        resize |= {"random_scale": random_scale}
    return {"resize": resize, "flip": {"name": "flip", "probability": flip}}


def with_features(data: Settings, root: str, *fields: str) -> Settings:
    """Returns a data set whose records carry arrays computed beforehand, of the centre crop."""
    # One array per record: a random crop or a mirror would not be the one that was encoded.
    features = {"name": "npy", "root": root, "fields": fields}
    resize = data["transforms"]["resize"] | {"random": False}
    splits = {k: data[k] | {"features": features} for k in ("train", "val")}
    return data | splits | {"transforms": {"resize": resize}}


def dataset(
    name: str,
    size: tuple[int, int],
    *,
    mode: str = "crop",
    random_scale: tuple[float, float] | None = None,
    **changes: Any,
) -> Settings:
    """Returns where a real data set lies (from the working directory) and how it is read.

    ``size``, ``mode`` and ``random_scale`` are those of ``crops``; ``changes`` replace what is
    returned (``workers``, ``threads``, ...).
    """
    layouts = {
        "folders": ("data/folders", "folders", "train", "val"),
        "voc": ("data/VOC2012", "voc", "trainaug", "val"),
        "ade20k": ("data/ADEChallengeData2016", "ade20k", "training", "validation"),
        "coco_panoptic": ("data/coco", "coco_panoptic", "train2017", "val2017"),
        "coco_stuff": ("data/coco", "coco_stuff", "train2017", "val2017"),
        "cityscapes": ("data/cityscapes", "cityscapes", "train", "val"),
        "celebamask_hq": ("data/CelebAMask-HQ", "celebamask_hq", "train", "val"),
    }
    root, layout, train, val = layouts[name]
    source = {"name": "folders", "root": root, "layout": layout}
    transforms = crops(size, mode=mode, random_scale=random_scale)
    splits = (source | {"split": train}, source | {"split": val})
    return _data(*splits, transforms, workers=8, threads=4) | changes

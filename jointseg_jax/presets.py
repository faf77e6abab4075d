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
        "sharding": "replicate",  # zero1, fsdp, fsdp+model, or a list of (path regex, tactic)
        "trainable": ((r"", True),),
        # other weights to begin with: see training/init_from.py
        "start": {"workdir": "", "file": ""},
        "log": {"every": 50},  # steps
        "preview": {"every": 1000, "count": 8},  # steps (0: never), pairs
        "checkpoint": {"every": 1000, "keep": 3},  # steps, checkpoints
        # policy: skip, stop or rollback; limit: refused updates in a row; spike: a loss so many
        # times the usual, on_spike: count or rollback
        "nan": {"policy": "skip", "limit": 10, "spike": 100.0, "on_spike": "count"},
        "watchdog": {"seconds": 1800, "abort": False},  # of silence, before stacks are written
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


def brief(config: dict[str, Any]) -> dict[str, Any]:
    """The same run for four steps."""
    optimizer = config["optimizer"]
    schedule = optimizer["schedule"] | {"warmup": 1}
    return config | {
        "steps": 4,
        "batch": 8,
        "optimizer": optimizer | {"schedule": schedule},
        "log": {"every": 2},
        "checkpoint": {"every": 2, "keep": 2},
    }


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same run in seconds and from nothing, to see that its parts work together."""
    config = brief(config) | {"ema": 0.9}
    config |= {"start": config["start"] | {"workdir": "", "file": ""}}
    config["system"]["denoiser"] |= {"width": 32, "depth": 2, "heads": 2}
    config["system"]["solver"]["steps"] = 3
    config["finish"]["num"] = min(config["finish"]["num"], 16)
    return config


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
        "cache": "",  # folder made by launch/encode.py, to train from in place of train
        "transforms": {},
        "workers": 0,
        "threads": 1,
    }


def easy_scenes(size: int) -> dict[str, Any]:
    """Scenes of at most two large things with little texture: minutes on a CPU show something."""
    return scenes(size, things=2, thing_size=(0.4, 0.6), texture=0.3)


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
        "coco_stuff": ("data/coco", "coco_stuff", "train2017", "val2017"),
        "cityscapes": ("data/cityscapes", "cityscapes", "train", "val"),
        "celebamask_hq": ("data/CelebAMask-HQ", "celebamask_hq", "train", "val"),
    }
    root, layout, train, val = layouts[name]
    source = {"name": "folders", "root": root, "layout": layout}
    return {
        "train": source | {"split": train},
        "val": source | {"split": val},
        "cache": "",  # as in ``scenes``
        "transforms": crops(size),
        "workers": 8,
        "threads": 4,
    } | changes


UVIT_SMALL = {"name": "uvit", "width": 512, "depth": 12, "heads": 8}
"""U-ViT-S, 44.7 M parameters with text (U-ViT, table 1)."""

UVIT_SMALL_REFERENCE = {
    "img_size": 32,
    "in_chans": 4,
    "patch_size": 2,
    "embed_dim": 512,
    "depth": 12,
    "num_heads": 8,
    "clip_dim": 768,
    "num_clip_token": 77,
}
"""U-ViT's own config of its text-to-image weights (MS-COCO, small), for ``start.architecture``."""

UNIDIFFUSER = {"name": "uvit", "width": 1536, "depth": 30, "heads": 24, "norm": "post"}
"""UniDiffuser-v1 and JoDiffusion, 952-954 M parameters."""

SD_SCHEDULE = {"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000}
"""Stable Diffusion's betas; ``time_offset`` 1 is U-ViT's numbering, 0 that of diffusers."""


def bit_pairs(data: str) -> dict[str, Any]:
    """A run of images and maps of analog bits, denoised together by one network.

    The image predicts noise and the map its bits; the map's noise has standard deviation 2 in
    training and at the start of sampling.

    Args:
      data: ``scenes`` and ``folders`` (pixels, small) or ``coco_panoptic`` (latents, as published).

    Source: PDM (arXiv 2412.02929) sections 3 and 4, as its released code trains.
    """
    return choose(data, "data", BIT_PAIRS)()


def with_instances(config: dict[str, Any], bits: int = 8) -> dict[str, Any]:
    """Bit pairs whose map also numbers the instances of its things, in ``bits`` more channels."""
    mask = config["system"]["streams"]["mask"]
    codec = mask["codec"] | {"name": "panoptic_bits", "instance_bits": bits}
    config["system"]["streams"]["mask"] = mask | {"field": "panoptic", "codec": codec}
    return config | {"data": config["data"] | {"panoptic": True}}


def _scene_pairs() -> dict[str, Any]:
    config = _small_pairs(easy_scenes(32), (32, 32), patch=4, bits={"name": "bits"}, steps=1200)
    config["system"]["denoiser"] |= {"width": 128, "depth": 4}
    return config | {
        "ema": 0.995,
        "optimizer": {
            "name": "muon",
            "b2": 0.99,
            "weight_decay": 0.01,
            "clip": 1.0,
            "schedule": {"name": "cosine", "lr": 1e-2, "warmup": 100},
        },
        "preview": {"every": 600, "count": 8},
        "checkpoint": {"every": 300, "keep": 2},
        "evaluate": {"judge": "oracle", "transforms": {}},
        "finish": {"num": 256},
    }


def _folder_pairs() -> dict[str, Any]:
    data = dataset("folders", (64, 64), workers=0, threads=2)
    bits = {"name": "bits", "bits": 8, "order": "msb", "pool": 2, "decoding": "snap"}
    return _small_pairs(data, (64, 64), patch=8, bits=bits, steps=20_000)


def _small_pairs(
    data: dict[str, Any], size: tuple[int, int], *, patch: int, bits: dict[str, Any], steps: int
) -> dict[str, Any]:
    """Pixels instead of latents, trained word embeddings instead of a pretrained encoder's.

    The image predicts velocity on the cosine schedule: in pixels, noise prediction says next to
    nothing about the picture where noise is strong, and brief training shows it.
    """
    cosine = {"name": "cosine"}
    return run(
        steps=steps,
        batch=32,
        ema=0.999,
        data=data,
        system=_bit_system(
            size,
            image={
                "field": "image",
                "codec": {"name": "pixels"},
                "process": {"predicts": "velocity", "schedule": cosine, "clip": 1.0},
                "tokens": {"patch": patch, "conv": True},
                "guidance": 2.0,
            },
            bits=bits,
            schedule=cosine,
            map_patch=patch // bits.get("pool", 1),
            denoiser={"name": "uvit", "width": 256, "depth": 6, "heads": 4},
            text={"name": "words", "width": 128, "length": 24},
        ),
        optimizer={
            "name": "adamw",
            "b2": 0.99,
            "weight_decay": 0.03,
            "clip": 1.0,
            "schedule": {"name": "cosine", "lr": 1e-3, "warmup": 200},
        },
    )


def _coco_pairs() -> dict[str, Any]:
    """From cached latents and text features."""
    features = ("image_latents", "text")
    data = dataset("coco_panoptic", (256, 256))
    return run(
        steps=2_000_000,
        batch=64,
        data=with_features(data, "data/coco/features", *features),
        system=_bit_system(
            (256, 256),
            image={
                "field": "image_latents",
                "codec": {"name": "latents", "channels": 4, "factor": 8},
                "process": {"predicts": "noise", "schedule": BITS_SCHEDULE},
                "tokens": {"patch": 2, "conv": True},
                "guidance": 2.0,
            },
            bits={"name": "bits", "bits": 8, "order": "msb", "pool": 4, "decoding": "snap"},
            schedule=BITS_SCHEDULE,
            map_patch=4,  # patch factor 2: the map has 2 x the sides of the image latent
            denoiser=UVIT_SMALL | {"dtype": "bfloat16"},
            text={"name": "features", "width": 768, "length": 77},
        ),
        optimizer={
            "name": "adamw",
            "b1": 0.9,
            "b2": 0.9,
            "weight_decay": 0.03,
            "decay": ((r"", True),),
            "schedule": {"name": "constant", "lr": 2e-4, "warmup": 5000},
        },
    )


def _bit_system(
    size: tuple[int, int],
    *,
    image: dict[str, Any],
    bits: dict[str, Any],
    schedule: dict[str, Any],
    map_patch: int,
    denoiser: dict[str, Any],
    text: dict[str, Any],
) -> dict[str, Any]:
    return {
        "name": "joint",
        "size": size,
        "streams": {
            "image": image,
            "mask": {
                "field": "labels",
                "codec": bits,
                "process": {
                    "predicts": "data",
                    "schedule": schedule,
                    "scale": 2.0,
                    "clip": 1.0,
                },
                "tokens": {"patch": map_patch, "conv": True, "tanh": True},
                "guidance": 2.0,
            },
        },
        "denoiser": denoiser | {"time_tokens": ("image",)},
        "text": text,
        "text_drop": 0.1,
        "times": {"name": "shared", "distribution": {"name": "uniform", "steps": 1000}},
        "solver": {
            "name": "dpm_solver_pp",
            "steps": 50,
            "order": 3,
            "method": "fast",
            "final": "evaluate",
        },
    }


BITS_SCHEDULE = SD_SCHEDULE | {"time_offset": 1}

BIT_PAIRS = {"scenes": _scene_pairs, "folders": _folder_pairs, "coco_panoptic": _coco_pairs}
"""The data that ``bit_pairs`` knows."""

FROM_IMAGES = {
    "workdir": "runs/pdm_image",
    "file": "",  # or the published U-ViT, with workdir = ""
    "architecture": UVIT_SMALL_REFERENCE,
    "move": ((r"^params/denoiser/", "params/denoiser/image_stream/"), (r"^params/text/", r"\g<0>")),
    "init_map_stream": "random",  # or copy: the map stream's blocks begin as the image stream's
}
"""``start`` of two streams whose image stream is a network that was trained on images alone."""

FROZEN_IMAGE_STREAM = (
    (r"/image_stream/(in_blocks|mid_block|out_blocks)/", False),
    (r"/image_stream/((image|context)_in/project|time_image/fc\d)/|^params/text/", False),
    (r"", True),
)
"""``trainable`` of two streams: of the image stream only positions, last norm and head go on
learning, as in PDM's released code; the map stream and the exchange learn whole."""

"""JoDiffusion (sections 3.1 - 3.3): image, label and text denoised together by a post-norm U-ViT.

  python launch/train.py --config configs/jodiffusion_codec.py --workdir runs/codec
  python launch/train.py --config configs/jodiffusion.py --workdir runs/jodiffusion
  python launch/sample.py --workdir runs/jodiffusion --out pairs --num 64 --absorb 20

The label latents come from the codec trained first (``streams.mask.codec.workdir``). Image, CLIP
and label share one time, text has its own; guidance replaces the text by noise at the last time.

| data | streams | predict | denoiser |
|---|---|---|---|
| scenes, folders | pixels, label latents, words | velocity; words noise | small, CPU or one chip |
| voc, coco_panoptic, ade20k | SD and label latents, CLIP-B/32 image, CLIP-L text | noise | 954 M |

The last three (2129 tokens, as published) read image_latents, clip and text features that were
computed beforehand, one .npy per record, ``data/voc_features/image_latents/SPLIT/ID.npy`` and so on
(``jointseg_jax/data/sources/features.py``). COCO has its 133 panoptic classes here; the paper
paints 80.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets

NOISE = {"predicts": "noise", "schedule": presets.SD_SCHEDULE | {"time_offset": 0}}
COSINE = {"schedule": {"name": "cosine"}}
STEPS = {"voc": 33_100, "coco_panoptic": 36_980, "ade20k": 63_200}
BATCH = {"voc": 32, "coco_panoptic": 64, "ade20k": 32}


def get_config(arg: str = "") -> ConfigDict:
    """``data=``scenes, folders, voc, coco_panoptic or ade20k; ``smoke``: scenes, in seconds."""
    a = presets.parse_arg(arg, data="scenes", smoke=False)
    config = presets.choose(a["data"], "data", {"scenes": scenes, "folders": folders, **PAPERS})()
    if a["smoke"]:
        config = presets.shrunk(scenes())
        config["system"]["streams"]["mask"]["codec"]["refine"] = 1
    return ConfigDict(config).lock()


def scenes() -> dict:
    """Embedded scenes at 32 px."""
    config = small(presets.easy_scenes(32), (32, 32), patch=4, label_patch=1, batch=32, steps=1200)
    config["system"]["denoiser"] |= {"width": 128, "depth": 4}
    config["system"]["streams"]["mask"]["codec"]["refine"] = 1
    config |= {"ema": 0.995}
    return config | {"evaluate": {"judge": "oracle", "transforms": {}}, "finish": {"num": 256}}


def folders() -> dict:
    """A folder data set at 128 x 128 pixels."""
    data = presets.dataset("folders", (128, 128), workers=0, threads=2)
    return small(data, (128, 128), patch=8, label_patch=2, batch=16, steps=20_000)


def small(
    data: dict, size: tuple[int, int], *, patch: int, label_patch: int, batch: int, steps: int
) -> dict:
    """Pixels instead of SD latents, fixed word features instead of CLIP's.

    Image and label predict velocity on the cosine schedule, which brief training in pixels needs
    (``presets.bit_pairs``).
    """
    velocity = COSINE | {"predicts": "velocity"}
    system = joint(
        size,
        image={
            "field": "image",
            "codec": {"name": "pixels"},
            "process": velocity | {"clip": 1.0},
            "tokens": {"patch": patch},
        },
        label=velocity,
        text=COSINE | {"predicts": "noise"},
        solver={"name": "dpm_solver_pp", "steps": 25, "order": 2, "method": "multistep"},
        label_patch=label_patch,
        guidance=2.0,
        weights="explicit",  # pixels would outweigh the few label latents 48 to 1
        denoiser={"name": "uvit", "width": 256, "depth": 6, "heads": 4, "norm": "post"},
        words={"name": "words", "width": 64, "length": 24, "trainable": False},
    )
    # latents are made anew in every update: the codec's own number of steps would take longest
    system["streams"]["mask"]["codec"]["refine"] = 4
    return presets.run(
        steps=steps,
        batch=batch,
        ema=0.998,
        data=data,
        system=system,
        optimizer={
            "name": "muon",
            "weight_decay": 0.01,
            "clip": 1.0,
            "schedule": {"name": "cosine", "lr": 5e-3, "warmup": 100},
        },
    )


def joint(
    size: tuple[int, int],
    *,
    image: dict,
    label_patch: int,
    guidance: float,
    weights: str,
    denoiser: dict,
    words: dict,
    label: dict,
    text: dict,
    solver: dict,
    **streams: dict,
) -> dict:
    """The system that both sizes share; streams in the published token order.

    Args:
      words: the encoder of text.
      label: the label stream's process, ``text`` that of the text's features.
    """
    return {
        "name": "joint",
        "size": size,
        "streams": {
            "text": {
                "field": "text",
                "process": text,
                "tokens": {"inner": 64},
            },
            **streams,
            "image": image | {"guidance": guidance},
            "mask": {
                "field": "labels",
                "codec": {"name": "trained", "workdir": "runs/codec", "scale": "fit"},
                "process": label,
                "tokens": {"patch": label_patch},
                "guidance": guidance,
            },
        },
        "weights": weights,
        "denoiser": denoiser | {"time_tokens": ("image", "text")},
        "text": words,
        "times": {
            "name": "grouped",
            "groups": (("image", "mask", *streams), ("text",)),
            "distribution": {"name": "uniform", "steps": 1000},
        },
        "solver": solver,
    }


def paper(name: str) -> dict:
    """The published network and training, from cached features."""
    config = presets.run(
        steps=STEPS[name],
        batch=BATCH[name],
        ema=0.0,  # the paper keeps no average
        data=presets.with_features(
            presets.dataset(name, (512, 512)),
            f"data/{name}_features",
            "image_latents",
            "clip",
            "text",
        ),
        system=joint(
            (512, 512),
            image={
                "field": "image_latents",
                "codec": {"name": "latents", "channels": 4, "factor": 8},
                "process": NOISE,
                "tokens": {"patch": 2},
            },
            label_patch=2,
            guidance=8.0,
            weights="elements",
            denoiser=presets.UNIDIFFUSER | {"dtype": "bfloat16", "data_types": 2},
            words={"name": "features", "width": 768, "length": 77},
            label=NOISE,
            text=NOISE,
            solver={"name": "multistep_dpm", "steps": 50, "order": 3},
            clip={
                "field": "clip",
                "codec": {"name": "latents", "shape": (1, 512)},
                "process": NOISE,
                "tokens": {},
                "guidance": 8.0,
            },
        ),
        optimizer={
            "name": "adamw",
            "weight_decay": 0.01,
            "clip": 1.0,
            "schedule": {"name": "constant", "lr": 5e-5},
        },
        sharding="zero1",
    )
    config["system"]["unconditional_time"] = 1.001  # label 1000, as published
    config["system"]["streams"]["mask"]["codec"]["scale"] = 0.2
    return config


PAPERS = {name: lambda name=name: paper(name) for name in STEPS}

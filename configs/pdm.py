"""PDM, one stream (section 3.2): image latents and analog bits of the map in one U-ViT.

  python launch/train.py --config configs/pdm.py --workdir runs/pdm
  python launch/train.py --config configs/pdm.py:data=folders --workdir runs/pdm \\
      --config.data.train.root=data/camvid --config.data.val.root=data/camvid

The image predicts noise, the map predicts its bits; the map's noise has standard deviation
kappa = 2 in training and at the start of sampling. Joint DPM-Solver++ of order 3, guidance 2 on
both, the map read from one more evaluation at the end time.

| data | image stream | denoiser |
|---|---|---|
| scenes, folders | pixels | small, CPU or one chip |
| coco_panoptic | cached SD latents (scale 0.23010), CLIP-L text | U-ViT-S, 45.0 M, 590 tokens |

The last reads the features image_latents and text (``jointseg_jax/data/features.py``).
"""

from ml_collections import ConfigDict

from jointseg_jax import presets

SCHEDULE = presets.SD_SCHEDULE | {"time_offset": 1}
KAPPA = 2.0


def get_config(arg: str = "") -> ConfigDict:
    """``data=``scenes, folders or coco_panoptic; ``smoke``: scenes, in seconds."""
    a = presets.parse_arg(arg, data="scenes", smoke=False)
    makers = {"scenes": scenes, "folders": folders, "coco_panoptic": paper}
    config = presets.choose(a["data"], "data", makers)()
    if a["smoke"]:
        config = scenes()
        config |= {"steps": 4, "batch": 8, "ema": 0.9}
        config |= {"log": {"every": 2}, "checkpoint": {"every": 2, "keep": 2}}
        config["system"]["denoiser"] |= {"width": 32, "depth": 2, "heads": 2}
        config["system"]["solver"]["steps"] = 3
        config["finish"]["num"] = 16
    return ConfigDict(config).lock()


def scenes() -> dict:
    """Embedded scenes at 32 px."""
    config = small(presets.scenes(32), (32, 32), patch=4, bits={"name": "bits"}, steps=4000)
    return config | {"evaluate": {"judge": "oracle", "transforms": {}}, "finish": {"num": 256}}


def folders() -> dict:
    """A folder data set at 64 x 64 pixels, maps pooled 2 x."""
    data = presets.dataset("folders", (64, 64), workers=0, threads=2)
    bits = {"name": "bits", "bits": 8, "order": "msb", "pool": 2, "decoding": "snap"}
    return small(data, (64, 64), patch=8, bits=bits, steps=20_000)


def small(data: dict, size: tuple[int, int], *, patch: int, bits: dict, steps: int) -> dict:
    """Pixels instead of SD latents, trained word embeddings instead of CLIP's."""
    image = {
        "field": "image",
        "codec": {"name": "pixels"},
        "process": {"predicts": "noise", "schedule": SCHEDULE, "clip": 1.0},
        "tokens": {"patch": patch, "conv": True},
        "guidance": 2.0,
    }
    return presets.run(
        steps=steps,
        batch=32,
        ema=0.999,
        data=data,
        system=joint(
            size,
            image=image,
            bits=bits,
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


def joint(
    size: tuple[int, int], *, image: dict, bits: dict, map_patch: int, denoiser: dict, text: dict
) -> dict:
    """The system that both sizes share."""
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
                    "schedule": SCHEDULE,
                    "scale": KAPPA,
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


def paper() -> dict:
    """The published network and training, from cached latents and text features."""
    config = presets.run(
        steps=2_000_000,
        batch=64,
        data=presets.with_features(
            presets.dataset("coco_panoptic", (256, 256)),
            "data/coco/features",
            "image_latents",
            "text",
        ),
        system=joint(
            (256, 256),
            image={
                "field": "image_latents",
                "codec": {"name": "latents", "channels": 4, "factor": 8},
                "process": {"predicts": "noise", "schedule": SCHEDULE},
                "tokens": {"patch": 2, "conv": True},
                "guidance": 2.0,
            },
            bits={"name": "bits", "bits": 8, "order": "msb", "pool": 4, "decoding": "snap"},
            map_patch=4,  # patch factor 2: the map has 2 x the sides of the image latent
            denoiser=presets.UVIT_SMALL | {"dtype": "bfloat16"},
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
    return config

"""SemFlow (2405.20282): rectified flow between images and coloured label maps, both ways.

  python launch/train.py --config configs/semflow.py --workdir runs/semflow
  python launch/train.py --config configs/semflow.py:data=folders --workdir runs/semflow \\
      --config.data.train.root=data/camvid --config.data.val.root=data/camvid
  python launch/evaluate.py --workdir runs/semflow --steps 1,2,5,10,25
  python launch/sample.py --workdir runs/semflow --out read --given images=photos
  python launch/sample.py --workdir runs/semflow --out made --given annotations=maps

| data | where it flows | network | training |
|---|---|---|---|
| scenes, folders | pixels | small U-ViT, CPU or one chip | small |
| coco_stuff | latents of ``runs/image_codec``, 8x, 512 px | U-ViT | lr 1e-5, 320,000 x 128 |
| celebamask_hq | the same | the same | lr 2e-5 falling, 80,000 x 256 |
| cityscapes | the same, 512 x 1024 px | the same | lr 5e-5 falling, 8,000 x 256 |

The last three keep the paper's schedules; its network is the U-Net of Stable Diffusion 1.5 started
from its weights and its latents are those of that model's VAE. Train the image codec first:

  python launch/train.py --workdir runs/image_codec \\
      --config configs/image_codec.py:data=folders,factor=8,palette=published

Deviations, each for a reason: labels are resized with nearest and coloured afterwards (bilinear
colours are other classes); a flip swaps left and right classes; times are drawn in float32.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets

PALETTE = {"name": "palette", "k": 6, "s": 50, "void": "white", "perturbation": 6.375}
"""The published colours; they hold 216 classes."""

FITTED = {"name": "palette", "void": "masked", "perturbation": 6.375}
"""As far apart as the classes allow, and no loss where nothing is annotated."""

# released configs: size, crop, batch, learning rate, warm-up, steps, schedule
RUNS = {
    "coco_stuff": ((512, 512), "crop", 128, 1e-5, 10_000, 320_000, "constant"),
    "celebamask_hq": ((512, 512), "crop", 256, 2e-5, 500, 80_000, "linear"),
    "cityscapes": ((512, 1024), "stretch", 256, 5e-5, 500, 8_000, "linear"),
}


def get_config(arg: str = "") -> ConfigDict:
    """``data=``scenes, folders, coco_stuff, celebamask_hq or cityscapes; ``smoke``: seconds."""
    a = presets.parse_arg(arg, data="scenes", smoke=False)
    makers = {"scenes": scenes, "folders": folders, **PAPERS}
    config = presets.choose(a["data"], "data", makers)()
    return ConfigDict(presets.shrunk(scenes()) if a["smoke"] else config).lock()


def scenes() -> dict:
    """Embedded scenes at 32 px."""
    config = small(presets.easy_scenes(32), (32, 32), patch=4, batch=32, steps=2000)
    return config | {"evaluate": {"judge": "oracle", "transforms": {}}, "finish": {"num": 256}}


def folders() -> dict:
    """A folder data set at 96 x 128 pixels."""
    data = presets.dataset("folders", (96, 128), workers=0, threads=2)
    data["transforms"]["resize"]["random_scale"] = (1.0, 1.5)
    return small(data, (96, 128), patch=8, batch=16, steps=2000)


def small(data: dict, size: tuple[int, int], *, patch: int, batch: int, steps: int) -> dict:
    """In pixels, from nothing."""
    return presets.run(
        steps=steps,
        batch=batch,
        ema=0.995,
        data=data,
        system=bridge(
            size,
            image={"name": "pixels"},
            palette=FITTED,
            tokens={"patch": patch, "conv": True},
            denoiser={"name": "uvit", "width": 192, "depth": 6, "heads": 3},
        ),
        optimizer={
            "name": "muon",
            "b2": 0.99,
            "clip": 1.0,
            "schedule": {"name": "cosine", "lr": 1e-2, "warmup": 100},
        },
        preview={"every": 500, "count": 8},
    )


def bridge(
    size: tuple[int, int], *, image: dict, palette: dict, tokens: dict, denoiser: dict
) -> dict:
    """The system that all sizes share."""
    return {
        "name": "bridge",
        "size": size,
        "image": image,
        "palette": palette,
        "tokens": tokens,
        "denoiser": denoiser,
        "process": {"predicts": "velocity", "schedule": {"name": "linear"}},
        "times": {"name": "shared", "distribution": {"name": "uniform"}},
        "solver": {"name": "euler", "steps": 25},
        "correction": 0.0,
        "temperature": 0.1,
    }


def paper(name: str) -> dict:
    """The published training, in the latents of an image codec of our own."""
    size, mode, batch, lr, warmup, steps, schedule = RUNS[name]
    data = presets.dataset(name, size)
    data["transforms"]["resize"]["mode"] = mode
    return presets.run(
        steps=steps,
        batch=batch,
        ema=0.0,  # the paper keeps no average
        data=data,
        system=bridge(
            size,
            image={"name": "trained", "workdir": "runs/image_codec", "scale": "fit"},
            palette=PALETTE,
            tokens={"patch": 2, "conv": True},
            denoiser=presets.UVIT_SMALL | {"dtype": "bfloat16"},
        ),
        optimizer={
            "name": "adamw",
            "weight_decay": 0.01,
            "decay": ((r"", True),),
            "clip": 1.0,
            "schedule": {"name": schedule, "lr": lr, "warmup": warmup},
        },
        checkpoint={"every": 2000, "keep": 1},
    )


PAPERS = {name: lambda name=name: paper(name) for name in RUNS}

"""SemFlow (arXiv 2405.20282): rectified flow between images and coloured label maps, both ways.

  python launch/train.py --config configs/semflow.py --workdir runs/semflow
  python launch/train.py --config configs/semflow.py:data=folders --workdir runs/semflow \\
      --config.data.train.root=data/camvid --config.data.val.root=data/camvid
  python launch/evaluate.py --workdir runs/semflow --steps 1,2,5,10,25
  python launch/sample.py --workdir runs/semflow --out read --given images=photos
  python launch/sample.py --workdir runs/semflow --out made --given annotations=maps

| data | where it flows | training | hardware |
|---|---|---|---|
| scenes | pixels, 32 px | 2,000 updates of 32 | two CPU cores |
| folders | pixels, 96 x 128 px | 2,000 updates of 16 | a few CPU cores or one chip |
| coco_stuff | latents of ``runs/image_codec``, 8x, 512 px | lr 1e-5, 320,000 x 128 | pod |
| celebamask_hq | the same | lr 2e-5 falling, 80,000 x 256 | pod |
| cityscapes | the same, 512 x 1024 px | lr 5e-5 falling, 8,000 x 256 | pod |

The last three keep the paper's schedules; its network is the U-Net of Stable Diffusion 1.5 started
from its weights and its latents are those of that model's VAE. Train the image codec first:

  python launch/train.py --workdir runs/image_codec \\
      --config configs/image_codec.py:data=folders,factor=8,palette=published

Expected, after 1,000 updates (``--config.steps=1000``) and with one solver step: segmentation mIoU
0.983 on scenes, 0.275 on CamVid (22 minutes on two cores); configs/README.md has the tables. The
last three have not been trained here. The paper reports 38.6 mIoU on COCO-Stuff with 25 steps, and
FID 32.6 and LPIPS 0.393 for images of CelebAMask-HQ.

Deviations, each for a reason: labels are resized with nearest and coloured afterwards (bilinear
colours are other classes); a flip swaps left and right classes; times are drawn in float32.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """``data=``scenes, folders, coco_stuff, celebamask_hq or cityscapes; ``smoke``: seconds."""
    a = presets.parse_arg(arg, data="scenes", smoke=False)
    table = {
        "scenes": scenes,
        "folders": folders,
        "coco_stuff": coco_stuff,
        "celebamask_hq": celebamask_hq,
        "cityscapes": cityscapes,
    }
    config = presets.choose(a["data"], "data", table)()
    return ConfigDict(presets.shrunk(scenes()) if a["smoke"] else config).lock()


def scenes() -> dict:
    """Embedded scenes at 32 px, in pixels, from nothing."""
    return presets.run(
        seed=0,
        steps=2000,
        batch=32,
        ema=0.995,
        data=presets.scenes(32, things=2, thing_size=(0.4, 0.6), texture=0.3),
        system=dict(
            name="bridge",
            size=(32, 32),
            image=dict(name="pixels"),
            # as far apart as the classes allow, and no loss where nothing is annotated
            palette=dict(name="palette", void="masked", perturbation=6.375),
            tokens=dict(patch=4, conv=True),
            denoiser=dict(name="uvit", width=192, depth=6, heads=3),
            process=dict(predicts="velocity", schedule=dict(name="linear")),
            times=dict(name="shared", distribution=dict(name="uniform")),
            solver=dict(name="euler", steps=25),
            correction=0.0,
            temperature=0.1,
        ),
        optimizer=dict(
            name="muon",
            b2=0.99,
            clip=1.0,
            schedule=dict(name="cosine", lr=1e-2, warmup=100),
        ),
        preview=dict(every=500, count=8),
        evaluate=dict(judge="oracle", transforms={}),
        finish=dict(num=256),
    )


def folders() -> dict:
    """A folder data set at 96 x 128 pixels, in pixels, from nothing."""
    return presets.run(
        seed=0,
        steps=2000,
        batch=16,
        ema=0.995,
        data=presets.dataset("folders", (96, 128), random_scale=(1.0, 1.5), workers=0, threads=2),
        system=dict(
            name="bridge",
            size=(96, 128),
            image=dict(name="pixels"),
            palette=dict(name="palette", void="masked", perturbation=6.375),
            tokens=dict(patch=8, conv=True),
            denoiser=dict(name="uvit", width=192, depth=6, heads=3),
            process=dict(predicts="velocity", schedule=dict(name="linear")),
            times=dict(name="shared", distribution=dict(name="uniform")),
            solver=dict(name="euler", steps=25),
            correction=0.0,
            temperature=0.1,
        ),
        optimizer=dict(
            name="muon",
            b2=0.99,
            clip=1.0,
            schedule=dict(name="cosine", lr=1e-2, warmup=100),
        ),
        preview=dict(every=500, count=8),
    )


def coco_stuff() -> dict:
    """COCO-Stuff, 171 classes, 512-px crops."""
    data = presets.dataset("coco_stuff", (512, 512))
    schedule = dict(name="constant", lr=1e-5, warmup=10_000)
    return paper(data, (512, 512), steps=320_000, batch=128, schedule=schedule)


def celebamask_hq() -> dict:
    """CelebAMask-HQ, 19 classes, 512-px crops."""
    data = presets.dataset("celebamask_hq", (512, 512))
    schedule = dict(name="linear", lr=2e-5, warmup=500)
    return paper(data, (512, 512), steps=80_000, batch=256, schedule=schedule)


def cityscapes() -> dict:
    """Cityscapes, 19 classes, whole pictures stretched to 512 x 1024 px."""
    data = presets.dataset("cityscapes", (512, 1024), mode="stretch")
    schedule = dict(name="linear", lr=5e-5, warmup=500)
    return paper(data, (512, 1024), steps=8000, batch=256, schedule=schedule)


def paper(data: dict, size: tuple[int, int], *, steps: int, batch: int, schedule: dict) -> dict:
    """What the released configs have in common, in the latents of an image codec of our own."""
    return presets.run(
        seed=0,
        steps=steps,
        batch=batch,
        ema=0.0,  # the paper keeps no average
        data=data,
        system=dict(
            name="bridge",
            size=size,
            image=dict(name="trained", workdir="runs/image_codec", scale="fit"),
            # the published colours; they hold 216 classes
            palette=dict(name="palette", k=6, s=50, void="white", perturbation=6.375),
            tokens=dict(patch=2, conv=True),
            denoiser=dict(name="uvit", width=512, depth=12, heads=8, dtype="bfloat16"),
            process=dict(predicts="velocity", schedule=dict(name="linear")),
            times=dict(name="shared", distribution=dict(name="uniform")),
            solver=dict(name="euler", steps=25),
            correction=0.0,
            temperature=0.1,
        ),
        optimizer=dict(
            name="adamw",
            weight_decay=0.01,
            decay=((r"", True),),
            clip=1.0,
            schedule=schedule,
        ),
        checkpoint=dict(every=2000, keep=1),
    )

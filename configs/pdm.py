"""PDM, one stream (arXiv 2412.02929, section 3.2): an image and the analog bits of its map.

  python launch/train.py --config configs/pdm.py --workdir runs/pdm
  python launch/train.py --config configs/pdm.py:data=folders --workdir runs/pdm \\
      --config.data.train.root=data/camvid --config.data.val.root=data/camvid
  python launch/train.py --config configs/pdm.py:data=coco_panoptic --workdir runs/pdm_coco

One network denoises both, a U-ViT as published; in the small scenes a U-Net around one, in which
image and map meet in every cell. The image predicts noise (data or velocity in pixels), the map its
bits; the map's noise has standard deviation kappa = 2 (``streams.mask.process.scale``) in training
and at the start of sampling. Joint DPM-Solver++ of order 3, guidance 2 on both, the map read from
one more evaluation at the end time.

| data | image stream | network | hardware |
|---|---|---|---|
| scenes | pixels, 32 px | small U-Net | two CPU cores |
| folders | pixels, 64 px | small U-ViT | a few CPU cores or one chip |
| coco_panoptic | cached SD latents (scale 0.23010) | U-ViT-S, 45.0 M, 590 tokens | pod |

Expected: alignment mIoU 0.918 on 64 scenes (chance 0.102) after the 1,400 updates. coco_panoptic
has not been trained here; launch/pod/README.md says what the compiler makes of it (v5e:16x16, 32
rows a chip: 47.2 ms an update besides attention). The paper reports FID 18.52, CLIP score 26.32 and
MCD 1.638 for it, sampled by a solver whose map update has a wrong sign.

coco_panoptic reads the features image_latents and text (CLIP-L;
``jointseg_jax/data/sources/features.py``). Its map has patch factor f = 2: twice the sides of the
latent (codec.pool = 8 / f) in patches of 2 f (tokens.patch); f = 1 and 4 change these two.

``:instances`` adds eight bits that number the things of an image (for sources with segments:
scenes, coco_panoptic), so that the results are panoptic in fact; the paper's are semantic.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """``data=``scenes, folders or coco_panoptic; ``instances``: panoptic; ``smoke``: seconds."""
    a = presets.parse_arg(arg, data="scenes", instances=False, smoke=False)
    table = {"scenes": scenes, "folders": folders, "coco_panoptic": coco_panoptic}
    config = presets.choose("scenes" if a["smoke"] else a["data"], "data", table)()
    if a["instances"]:
        mask = config["system"]["streams"]["mask"]
        codec = mask["codec"] | dict(name="panoptic_bits", instance_bits=8)
        config["system"]["streams"]["mask"] = mask | dict(field="panoptic", codec=codec)
        config["data"] = config["data"] | dict(panoptic=True)
    return ConfigDict(presets.shrunk(config) if a["smoke"] else config).lock()


def scenes() -> dict:
    """Embedded scenes at 32 px, in pixels."""
    # In pixels, noise prediction says next to nothing about the picture where noise is strong, and
    # brief training shows it: both streams predict data, as in configs/quickstart.py.
    cosine = dict(name="cosine")
    weight = dict(name="inverse_sigma", cap=5.0)
    process = dict(predicts="data", schedule=cosine, weight=weight, clip=1.0)
    return presets.run(
        seed=0,
        steps=1400,
        batch=16,
        ema=0.995,
        data=presets.scenes(32, things=2, thing_size=(0.4, 0.6), texture=0.3),
        system=dict(
            name="joint",
            size=(32, 32),
            streams=dict(
                image=dict(
                    field="image",
                    codec=dict(name="pixels"),
                    process=dict(process),
                    tokens=dict(patch=4),
                    guidance=2.0,
                ),
                mask=dict(
                    field="labels",
                    codec=dict(name="bits"),
                    process=process | dict(scale=2.0),
                    tokens=dict(patch=4),
                    guidance=2.0,
                ),
            ),
            denoiser=dict(
                name="unet",
                width=128,
                depth=2,
                heads=2,
                widths=(64,),
                units=32,
                time_tokens=("image",),
                time_mlp=True,
                activation="relu2",
            ),
            text=dict(name="words", width=128, length=16),
            text_drop=0.1,
            times=dict(name="shared", distribution=dict(name="high_noise", power=0.5)),
            solver=dict(name="dpm_solver_pp", steps=25, order=3, method="fast", final="evaluate"),
        ),
        optimizer=dict(
            name="muon",
            b2=0.99,
            weight_decay=0.01,
            clip=1.0,
            schedule=dict(name="cosine", lr=1e-2, warmup=100),
        ),
        preview=dict(every=600, count=8),
        checkpoint=dict(every=300, keep=2),
        evaluate=dict(judge="oracle", transforms={}),
        finish=dict(num=256),
    )


def folders() -> dict:
    """A folder data set at 64 x 64 pixels, in pixels; trained word embeddings."""
    cosine = dict(name="cosine")
    return presets.run(
        seed=0,
        steps=20_000,
        batch=32,
        ema=0.999,
        data=presets.dataset("folders", (64, 64), workers=0, threads=2),
        system=dict(
            name="joint",
            size=(64, 64),
            streams=dict(
                image=dict(
                    field="image",
                    codec=dict(name="pixels"),
                    process=dict(predicts="velocity", schedule=cosine, clip=1.0),
                    tokens=dict(patch=8, conv=True),
                    guidance=2.0,
                ),
                mask=dict(
                    field="labels",
                    codec=dict(name="bits", bits=8, order="msb", pool=2, decoding="snap"),
                    process=dict(predicts="data", schedule=cosine, scale=2.0, clip=1.0),
                    tokens=dict(patch=4, conv=True, tanh=True),  # patch 8 of pixels / pool 2
                    guidance=2.0,
                ),
            ),
            denoiser=dict(name="uvit", width=256, depth=6, heads=4, time_tokens=("image",)),
            text=dict(name="words", width=128, length=24),
            text_drop=0.1,
            times=dict(name="shared", distribution=dict(name="uniform", steps=1000)),
            solver=dict(name="dpm_solver_pp", steps=50, order=3, method="fast", final="evaluate"),
        ),
        optimizer=dict(
            name="adamw",
            b2=0.99,
            weight_decay=0.03,
            clip=1.0,
            schedule=dict(name="cosine", lr=1e-3, warmup=200),
        ),
    )


def coco_panoptic() -> dict:
    """COCO panoptic at 256 px as published, from cached latents and text features."""
    # Stable Diffusion's betas, numbered from 1 as U-ViT does
    schedule = dict(
        name="scaled_linear", beta_start=0.00085, beta_end=0.012, steps=1000, time_offset=1
    )
    data = presets.dataset("coco_panoptic", (256, 256))
    return presets.run(
        seed=0,
        steps=2_000_000,
        batch=64,
        ema=0.9999,
        data=presets.with_features(data, "data/coco/features", "image_latents", "text"),
        system=dict(
            name="joint",
            size=(256, 256),
            streams=dict(
                image=dict(
                    field="image_latents",
                    codec=dict(name="latents", channels=4, factor=8),
                    process=dict(predicts="noise", schedule=schedule),
                    tokens=dict(patch=2, conv=True),
                    guidance=2.0,
                ),
                mask=dict(
                    field="labels",
                    codec=dict(name="bits", bits=8, order="msb", pool=4, decoding="snap"),
                    process=dict(predicts="data", schedule=schedule, scale=2.0, clip=1.0),
                    tokens=dict(patch=4, conv=True, tanh=True),
                    guidance=2.0,
                ),
            ),
            denoiser=dict(  # U-ViT-S
                name="uvit",
                width=512,
                depth=12,
                heads=8,
                dtype="bfloat16",
                time_tokens=("image",),
            ),
            text=dict(name="features", width=768, length=77),
            text_drop=0.1,
            times=dict(name="shared", distribution=dict(name="uniform", steps=1000)),
            solver=dict(name="dpm_solver_pp", steps=50, order=3, method="fast", final="evaluate"),
        ),
        optimizer=dict(
            name="adamw",
            b1=0.9,
            b2=0.9,
            weight_decay=0.03,
            decay=((r"", True),),  # of everything, norms and biases too
            schedule=dict(name="constant", lr=2e-4, warmup=5000),
        ),
    )

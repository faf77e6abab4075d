"""PDM, two streams (arXiv 2412.02929, section 3.3): a frozen image stream beside a map stream.

  python launch/train.py --config configs/pdm_two_stream.py:stage=image --workdir runs/pdm_image
  python launch/train.py --config configs/pdm_two_stream.py --workdir runs/pdm_two_stream

The first command trains a U-ViT on images and their captions alone. The second starts from it: the
image stream is that network (``start``), of which only positions, last norm and head go on learning
(``trainable``); the map stream and the exchange between the two begin from nothing, the latter at
zero, so that the first image predictions are those of the image stream. Map bits, kappa = 2, times,
solver and guidance are those of configs/pdm.py.

| data | image stream | pair stage | hardware |
|---|---|---|---|
| scenes | pixels, 32 px | 800 updates of 16 | two CPU cores |
| folders | pixels, 64 px | 20,000 updates of 32 | a few CPU cores or one chip |
| coco_panoptic | SD latents, U-ViT-S, 1 M updates of 256 | 2 M updates of 64, 92.5 M | pod |

Expected: alignment mIoU 0.569 on 256 scenes (chance 0.122) after 800 updates of each stage.
coco_panoptic has not been trained here; launch/pod/README.md says what the compiler makes of it.
The paper reports FID 10.99, CLIP score 27.53 and MCD 1.592 for patch factor 2, sampled by a solver
whose map update has a wrong sign.

With coco_panoptic the published U-ViT may take the place of the first command, as safetensors:
--config.start.workdir= --config.start.file=mscoco_uvit_small.safetensors
``start.init_map_stream=copy`` lets the map stream's blocks begin as the image stream's;
``system.denoiser.exchange_bias=True`` gives the exchange the biases of the released code.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets

FROM_IMAGES = dict(
    workdir="runs/pdm_image",
    file="",  # or the published U-ViT as safetensors, with workdir=""
    # its own config: text to image, MS-COCO, small
    architecture=dict(
        img_size=32,
        in_chans=4,
        patch_size=2,
        embed_dim=512,
        depth=12,
        num_heads=8,
        clip_dim=768,
        num_clip_token=77,
    ),
    # what goes where: (path there, path here)
    move=((r"^params/denoiser/", "params/denoiser/image_stream/"), (r"^params/text/", r"\g<0>")),
    init_map_stream="random",  # or copy: the map stream's blocks begin as the image stream's
)
"""``start`` of two streams: the image stream is a network that was trained on images alone."""

FROZEN_IMAGE_STREAM = (
    (r"/image_stream/(in_blocks|mid_block|out_blocks)/", False),
    (r"/image_stream/((image|context)_in/project|time_image/fc\d)/|^params/text/", False),
    (r"", True),
)
"""``trainable`` of two streams: of the image stream only positions, last norm and head go on
learning, as in PDM's released code; the map stream and the exchange learn whole."""


def get_config(arg: str = "") -> ConfigDict:
    """``data=``scenes, folders or coco_panoptic; ``stage=``image or pair; ``smoke``: seconds."""
    a = presets.parse_arg(arg, data="scenes", stage="pair", smoke=False)
    change = presets.choose(a["stage"], "stage", {"image": image_stage, "pair": dict})
    data = "scenes" if a["smoke"] else a["data"]
    table = {"scenes": scenes, "folders": folders, "coco_panoptic": coco_panoptic}
    config = change(presets.choose(data, "data", table)())
    if a["stage"] == "image" and data == "coco_panoptic":
        # as U-ViT trains; its latents cannot be drawn without their VAE
        config |= dict(steps=1_000_000, batch=256, preview=dict(every=0, count=8))
    return ConfigDict(presets.shrunk(config) if a["smoke"] else config).lock()


def image_stage(config: dict) -> dict:
    """The network of the image stream, trained whole and from nothing on images and text alone."""
    system = config["system"]
    del system["streams"]["mask"], system["denoiser"]["exchange_bias"]
    system["denoiser"]["name"] = "uvit"
    finish = dict(num=0)  # there are no maps to judge
    start, trainable = dict(workdir="", file=""), ((r"", True),)
    return config | dict(start=start, trainable=trainable, finish=finish)


def scenes() -> dict:
    """Embedded scenes at 32 px, in pixels."""
    # In pixels, noise prediction says next to nothing about the picture where noise is strong, and
    # brief training shows it: both streams predict data, as in configs/quickstart.py.
    cosine = dict(name="cosine")
    weight = dict(name="inverse_sigma", cap=5.0)
    process = dict(predicts="data", schedule=cosine, weight=weight, clip=1.0)
    return presets.run(
        seed=0,
        steps=800,
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
                    tokens=dict(patch=4, units=32),
                    guidance=2.0,
                ),
                mask=dict(
                    field="labels",
                    codec=dict(name="bits"),
                    process=process | dict(scale=2.0),
                    tokens=dict(patch=4, units=32),
                    guidance=2.0,
                ),
            ),
            denoiser=dict(
                name="two_stream",
                width=128,
                depth=4,
                heads=4,
                time_tokens=("image",),
                time_mlp=True,
                activation="relu2",
                exchange_bias=False,
            ),
            text=dict(name="words", width=128, length=16),
            text_drop=0.1,
            times=dict(name="shared", distribution=dict(name="high_noise", power=0.5)),
            solver=dict(name="dpm_solver_pp", steps=25, order=3, method="fast", final="evaluate"),
        ),
        start=FROM_IMAGES,
        trainable=FROZEN_IMAGE_STREAM,
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
            denoiser=dict(
                name="two_stream",
                width=256,
                depth=6,
                heads=4,
                time_tokens=("image",),
                exchange_bias=False,
            ),
            text=dict(name="words", width=128, length=24),
            text_drop=0.1,
            times=dict(name="shared", distribution=dict(name="uniform", steps=1000)),
            solver=dict(name="dpm_solver_pp", steps=50, order=3, method="fast", final="evaluate"),
        ),
        start=FROM_IMAGES,
        trainable=FROZEN_IMAGE_STREAM,
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
            denoiser=dict(  # two of U-ViT-S
                name="two_stream",
                width=512,
                depth=12,
                heads=8,
                dtype="bfloat16",
                time_tokens=("image",),
                exchange_bias=False,
            ),
            text=dict(name="features", width=768, length=77),
            text_drop=0.1,
            times=dict(name="shared", distribution=dict(name="uniform", steps=1000)),
            solver=dict(name="dpm_solver_pp", steps=50, order=3, method="fast", final="evaluate"),
        ),
        start=FROM_IMAGES,
        trainable=FROZEN_IMAGE_STREAM,
        optimizer=dict(
            name="adamw",
            b1=0.9,
            b2=0.9,
            weight_decay=0.03,
            decay=((r"", True),),  # of everything, norms and biases too
            schedule=dict(name="constant", lr=2e-4, warmup=5000),
        ),
    )

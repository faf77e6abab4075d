"""PDM with maps given (arXiv 2412.02929, sections 3.4 and 4): images that follow a label map.

  python launch/train.py --config configs/pdm_given_maps.py --workdir runs/pdm_given_maps
  python launch/sample.py --workdir runs/pdm_given_maps --out made --given annotations=DIR

The network sees the clean map at time 0 in every step of training and sampling (``system.known``)
and the loss is the image's alone. As published, the map's features are added to the image's before
the image head (``add_features``); the map's own head is there, as in the paper's weights, and is
not trained. In the small scenes image and map share every cell instead. The rest is as in
configs/pdm.py.

| streams | network | starts from |
|---|---|---|
| one | that of configs/pdm.py | nothing |
| two | that of configs/pdm_two_stream.py, image stream frozen | its first stage |

Hardware: scenes two CPU cores; folders a few CPU cores or one chip; coco_panoptic a pod.
Expected: alignment mIoU 1.000 on 64 images from unseen maps of scenes (chance 0.102) after the 600
updates. coco_panoptic has not been trained here; the paper reports FID 8.21 and CLIP score 28.40
with one stream, 11.61 and 28.19 with two.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets

UNUSED_HEAD = ((r"/mask_out/", False),)

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
    """``data=``scenes, folders or coco_panoptic; ``streams=``one or two; ``smoke``: seconds."""
    a = presets.parse_arg(arg, data="scenes", streams="one", smoke=False)
    change = presets.choose(a["streams"], "streams", {"one": dict, "two": two_streams})
    table = {"scenes": scenes, "folders": folders, "coco_panoptic": coco_panoptic}
    config = change(presets.choose("scenes" if a["smoke"] else a["data"], "data", table)())
    return ConfigDict(presets.shrunk(config) if a["smoke"] else config).lock()


def two_streams(config: dict) -> dict:
    """A map stream beside a trained image stream, in place of tokens of one network."""
    denoiser, streams = config["system"]["denoiser"], config["system"]["streams"]
    if "widths" in denoiser:  # of scenes: the network of configs/pdm_two_stream.py instead
        del denoiser["widths"]
        units = denoiser.pop("units")
        for stream in streams.values():
            stream["tokens"] |= dict(units=units)
        denoiser |= dict(depth=4, heads=4, add_features=(("mask", "image"),))
    denoiser |= dict(name="two_stream", exchange_bias=False)
    return config | dict(start=FROM_IMAGES, trainable=(*UNUSED_HEAD, *FROZEN_IMAGE_STREAM))


def scenes() -> dict:
    """Embedded scenes at 32 px, in pixels; image and map meet in every cell."""
    # In pixels, noise prediction says next to nothing about the picture where noise is strong, and
    # brief training shows it: the image predicts data, as in configs/quickstart.py.
    cosine = dict(name="cosine")
    weight = dict(name="inverse_sigma", cap=5.0)
    process = dict(predicts="data", schedule=cosine, weight=weight, clip=1.0)
    return presets.run(
        seed=0,
        steps=600,
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
            times=dict(name="shared", distribution=dict(name="uniform")),
            solver=dict(name="dpm_solver_pp", steps=25, order=3, method="fast", final="evaluate"),
            known=("mask",),
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
            denoiser=dict(
                name="uvit",
                width=256,
                depth=6,
                heads=4,
                time_tokens=("image",),
                add_features=(("mask", "image"),),
            ),
            text=dict(name="words", width=128, length=24),
            text_drop=0.1,
            times=dict(name="shared", distribution=dict(name="uniform", steps=1000)),
            solver=dict(name="dpm_solver_pp", steps=50, order=3, method="fast", final="evaluate"),
            known=("mask",),
        ),
        trainable=(*UNUSED_HEAD, (r"", True)),
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
                add_features=(("mask", "image"),),
            ),
            text=dict(name="features", width=768, length=77),
            text_drop=0.1,
            times=dict(name="shared", distribution=dict(name="uniform", steps=1000)),
            solver=dict(name="dpm_solver_pp", steps=50, order=3, method="fast", final="evaluate"),
            known=("mask",),
        ),
        trainable=(*UNUSED_HEAD, (r"", True)),
        optimizer=dict(
            name="adamw",
            b1=0.9,
            b2=0.9,
            weight_decay=0.03,
            decay=((r"", True),),  # of everything, norms and biases too
            schedule=dict(name="constant", lr=2e-4, warmup=5000),
        ),
    )

"""JoDiffusion (arXiv 2512.13014, sections 3.1 - 3.3): image, label and text denoised together.

  python launch/train.py --config configs/jodiffusion_codec.py --workdir runs/codec
  python launch/train.py --config configs/jodiffusion.py --workdir runs/jodiffusion
  python launch/sample.py --workdir runs/jodiffusion --out pairs --num 64 --absorb 20

One post-norm U-ViT denoises all streams; in the small scenes a pre-norm one is the middle of a
U-Net, through which the image goes, and its tokens carry the label latents too. The label latents
come from the codec trained first (``streams.mask.codec.workdir``). Image, CLIP and label share one
time, text has its own; guidance replaces the text by noise at the last time.

| data | streams | predict | denoiser | hardware |
|---|---|---|---|---|
| scenes | pixels, label latents, words | data | small U-Net | two CPU cores |
| folders | the same | velocity; words noise | small U-ViT | one chip |
| the others | SD and label latents, CLIP-B/32 image, CLIP-L text | noise | 954 M | pod |

The others, voc, coco_panoptic and ade20k (2129 tokens, as published), read image_latents, clip and
text features that were computed beforehand, one .npy per record,
``data/voc_features/image_latents/SPLIT/ID.npy`` and so on
(``jointseg_jax/data/sources/features.py``). COCO has its 133 panoptic classes here; the paper
paints 80.

Expected: alignment mIoU 0.832 on 256 scenes (chance 0.120) after the 1,400 updates, twelve minutes
on two slow cores. The 954 M have not been trained here; launch/pod/README.md says what the compiler
makes of them (v5e:16x16, 4 rows a chip: 318.0 ms an update besides attention). The paper reports
72.5 mIoU for DeepLabV3-R50 trained on 40,000 generated pairs of VOC alone, 77.4 on the real ones.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """``data=``scenes, folders, voc, coco_panoptic or ade20k; ``smoke``: scenes, in seconds."""
    a = presets.parse_arg(arg, data="scenes", smoke=False)
    table = {
        "scenes": scenes,
        "folders": folders,
        # 100, 20 and 100 epochs of the released training scripts
        "voc": lambda: paper("voc", steps=33_100, batch=32),
        "coco_panoptic": lambda: paper("coco_panoptic", steps=36_980, batch=64),
        "ade20k": lambda: paper("ade20k", steps=63_200, batch=32),
    }
    config = presets.choose(a["data"], "data", table)()
    return ConfigDict(presets.shrunk(scenes()) if a["smoke"] else config).lock()


def scenes() -> dict:
    """Embedded scenes at 32 px: pixels instead of SD latents, fixed word features for CLIP's."""
    # Image and label predict data on the cosine schedule: noise prediction says next to nothing
    # about pixels where noise is strong, and brief training shows it.
    cosine = dict(name="cosine")
    weight = dict(name="inverse_sigma", cap=5.0)
    process = dict(predicts="data", schedule=cosine, weight=weight)
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
                text=dict(
                    field="text",
                    process=dict(process),
                    tokens=dict(inner=64),
                ),
                image=dict(
                    field="image",
                    codec=dict(name="pixels"),
                    process=process | dict(clip=1.0),
                    tokens=dict(patch=4),
                    guidance=2.0,
                ),
                mask=dict(
                    field="labels",
                    # Latents are made again in every update: the codec's own number of refinement
                    # steps would take longest.
                    codec=dict(name="trained", workdir="runs/codec", scale="fit", refine=1),
                    process=dict(process),
                    tokens=dict(patch=1),
                    guidance=2.0,
                ),
            ),
            weights="explicit",  # pixels would outweigh the few label latents 12 to 1
            denoiser=dict(
                name="unet",
                width=128,
                depth=2,
                heads=2,
                widths=(64,),
                units=32,
                share=("mask",),  # 8 x 8 label latents on the tokens of the image's 4 x 4 pixels
                time_tokens=("image", "text"),
                time_mlp=True,
                activation="relu2",
            ),
            text=dict(name="words", width=64, length=16, trainable=False),
            times=dict(
                name="grouped",
                groups=(("image", "mask"), ("text",)),
                distribution=dict(name="high_noise", power=0.5),
                # pairs are made from whole prompts, and without one for guidance
                distributions=dict(text=dict(name="ends", clean=0.7, noise=0.1)),
            ),
            solver=dict(name="ancestral", steps=25, grid="time_quadratic"),
        ),
        optimizer=dict(
            name="muon",
            b2=0.99,
            weight_decay=0.01,
            clip=1.0,
            schedule=dict(name="cosine", lr=1e-2, warmup=100),
        ),
        evaluate=dict(judge="oracle", transforms={}),
        finish=dict(num=256),
    )


def folders() -> dict:
    """A folder data set at 128 x 128 pixels, otherwise as ``scenes`` and wider."""
    cosine = dict(name="cosine")
    return presets.run(
        seed=0,
        steps=20_000,
        batch=16,
        ema=0.998,
        data=presets.dataset("folders", (128, 128), workers=0, threads=2),
        system=dict(
            name="joint",
            size=(128, 128),
            streams=dict(
                text=dict(
                    field="text",
                    process=dict(schedule=cosine, predicts="noise"),
                    tokens=dict(inner=64),
                ),
                image=dict(
                    field="image",
                    codec=dict(name="pixels"),
                    process=dict(schedule=cosine, predicts="velocity", clip=1.0),
                    tokens=dict(patch=8),
                    guidance=2.0,
                ),
                mask=dict(
                    field="labels",
                    codec=dict(name="trained", workdir="runs/codec", scale="fit", refine=4),
                    process=dict(schedule=cosine, predicts="velocity"),
                    tokens=dict(patch=2),
                    guidance=2.0,
                ),
            ),
            weights="explicit",
            denoiser=dict(
                name="uvit",
                width=256,
                depth=6,
                heads=4,
                norm="post",
                time_tokens=("image", "text"),
            ),
            text=dict(name="words", width=64, length=24, trainable=False),
            times=dict(
                name="grouped",
                groups=(("image", "mask"), ("text",)),
                distribution=dict(name="uniform", steps=1000),
            ),
            solver=dict(name="dpm_solver_pp", steps=25, order=2, method="multistep"),
        ),
        optimizer=dict(
            name="muon",
            weight_decay=0.01,
            clip=1.0,
            schedule=dict(name="cosine", lr=5e-3, warmup=100),
        ),
    )


def paper(data: str, *, steps: int, batch: int) -> dict:
    """The published network and training at 512 px, from cached features."""
    # Stable Diffusion's betas, numbered from 0 as diffusers does
    schedule = dict(
        name="scaled_linear", beta_start=0.00085, beta_end=0.012, steps=1000, time_offset=0
    )
    noise = dict(predicts="noise", schedule=schedule)  # of every stream
    fields = ("image_latents", "clip", "text")
    return presets.run(
        seed=0,
        steps=steps,
        batch=batch,
        ema=0.0,  # the paper keeps no average
        data=presets.with_features(
            presets.dataset(data, (512, 512)), f"data/{data}_features", *fields
        ),
        system=dict(
            name="joint",
            size=(512, 512),
            streams=dict(  # in the published order of tokens
                text=dict(field="text", process=noise, tokens=dict(inner=64)),
                clip=dict(
                    field="clip",
                    codec=dict(name="latents", shape=(1, 512)),
                    process=noise,
                    tokens={},
                    guidance=8.0,
                ),
                image=dict(
                    field="image_latents",
                    codec=dict(name="latents", channels=4, factor=8),
                    process=noise,
                    tokens=dict(patch=2),
                    guidance=8.0,
                ),
                mask=dict(
                    field="labels",
                    codec=dict(name="trained", workdir="runs/codec", scale=0.2),
                    process=noise,
                    tokens=dict(patch=2),
                    guidance=8.0,
                ),
            ),
            weights="elements",
            denoiser=dict(  # UniDiffuser-v1 and a label stream
                name="uvit",
                width=1536,
                depth=30,
                heads=24,
                norm="post",
                dtype="bfloat16",
                data_types=2,
                time_tokens=("image", "text"),
            ),
            text=dict(name="features", width=768, length=77),
            times=dict(
                name="grouped",
                groups=(("image", "mask", "clip"), ("text",)),
                distribution=dict(name="uniform", steps=1000),
            ),
            solver=dict(name="multistep_dpm", steps=50, order=3),
            unconditional_time=1.001,  # label 1000, as published
        ),
        optimizer=dict(
            name="adamw",
            weight_decay=0.01,
            clip=1.0,
            schedule=dict(name="constant", lr=5e-5),
        ),
        sharding="zero1",
    )

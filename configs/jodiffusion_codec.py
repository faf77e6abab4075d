"""The label autoencoder of JoDiffusion (arXiv 2512.13014, section 3.2, eq. 1).

Label maps become 4-channel latents, 8 times smaller (4 times in the small scenes).

  python launch/train.py --config configs/jodiffusion_codec.py --workdir runs/codec
  python launch/train.py --config configs/jodiffusion_codec.py:data=folders --workdir runs/codec \\
      --config.data.train.root=data/camvid --config.data.val.root=data/camvid

A second, short stage lets the decoder learn the refined latents it will be given (``refine``):

  python launch/train.py --config configs/jodiffusion_codec.py:data=folders --workdir runs/codec2 \\
      --config.start.workdir=runs/codec --config.system.codec.refine_in_training=5 \\
      --config.steps=300 --config.optimizer.schedule.lr=3e-3 --config.ema=0.98 ...

| data | network | hyper-parameters | hardware |
|---|---|---|---|
| scenes | under 2 M parameters; VOID is ignored | small, 1,200 updates of 8 | two CPU cores |
| folders | the same | small, 5,000 updates of 8 | a few CPU cores or one chip |
| the others | 14.8 - 15.4 M parameters, as published | AdamW, batch 32, 512 px | pod |

Expected: 0.996 mIoU over the 2,000 validation maps of scenes, after five minutes on two cores. On
CamVid 0.970 after 6,500 updates in four legs, 0.985 after the second stage (configs/README.md says
how). The paper's Table 1 reports 99.50 / 98.85 / 98.74 validation mIoU (VOC / COCO / ADE20K), which
have not been trained here.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """``data=``scenes, folders, voc, coco_panoptic or ade20k; ``smoke``: scenes, in seconds."""
    a = presets.parse_arg(arg, data="scenes", smoke=False)
    table = {
        "scenes": scenes,
        "folders": folders,
        "voc": voc,
        "coco_panoptic": coco_panoptic,
        "ade20k": ade20k,
    }
    config = presets.choose(a["data"], "data", table)()
    if a["smoke"]:
        config = presets.brief(config | dict(data=scenes()["data"]))
        config["system"] |= dict(size=(32, 32))
        config["system"]["codec"] |= dict(
            widths=(8, 16), middle_width=16, up_widths=(8,), groups=4, refine=2
        )
        config["data"]["val"]["count"] = 32
    return ConfigDict(config).lock()


def scenes() -> dict:
    """Embedded scenes at 32 px; minutes on two cores."""
    return presets.run(
        seed=0,
        steps=1200,
        batch=8,
        ema=0.99,
        data=presets.scenes(32, things=2, thing_size=(0.4, 0.6), texture=0.3),
        system=dict(
            name="autoencode",
            size=(32, 32),
            codec=dict(
                name="label_ae",
                patch=2,
                widths=(64, 128),
                middle_width=128,
                middle_blocks=2,
                up_widths=(64,),
                groups=16,
                refine=20,  # gradient steps on a latent when it is encoded
                refine_in_training=0,
            ),
        ),
        optimizer=dict(
            name="muon",
            b2=0.99,
            clip=1.0,
            schedule=dict(name="cosine", lr=1e-2, warmup=100),
        ),
        preview=dict(every=1000, count=8),
    )


def folders() -> dict:
    """A folder data set: 128-px crops of maps whose shorter side is about 512 px."""
    # validated as the paper does: shorter side 512, centre crop
    validation = dict(resize=dict(name="resize", size=(512, 512), mode="crop"))
    return presets.run(
        seed=0,
        steps=5000,
        batch=8,
        ema=0.99,
        data=presets.dataset("folders", (128, 128), random_scale=(3.6, 4.4), workers=0, threads=2),
        system=dict(
            name="autoencode",
            size=(128, 128),
            codec=dict(
                name="label_ae",
                patch=2,
                widths=(32, 64, 128),
                middle_width=128,
                middle_blocks=2,
                up_widths=(96, 64),
                groups=16,
                refine=20,
                refine_in_training=0,
            ),
        ),
        optimizer=dict(
            name="muon",
            b2=0.99,
            clip=1.0,
            schedule=dict(name="cosine", lr=1e-2, warmup=100),
        ),
        preview=dict(every=1000, count=8),
        evaluate=dict(judge="", transforms=validation),
    )


def voc() -> dict:
    """PASCAL VOC 2012 (trainaug), 50 epochs; label 0 is its background."""
    codec = dict(name="label_ae", background="zero", latent="sample", prob_threshold=0.5)
    return paper("voc", codec, steps=16_550, lr=1e-5)


def coco_panoptic() -> dict:
    """COCO with its 133 panoptic classes, 20 epochs."""
    # No background class here; the original calls label 0 one.
    codec = dict(
        name="label_ae",
        background="code",
        latent="sample",
        prob_threshold=0.5,
        threshold_to="void",
    )
    return paper("coco_panoptic", codec, steps=73_940, lr=1e-4)


def ade20k() -> dict:
    """ADE20K with 150 classes, 100 epochs."""
    # No background class here either: label 0 of the files is "other".
    codec = dict(
        name="label_ae",
        background="code",
        latent="sample",
        prob_threshold=0.5,
        threshold_to="void",
    )
    return paper("ade20k", codec, steps=63_200, lr=1e-4)


def paper(data: str, codec: dict, *, steps: int, lr: float) -> dict:
    """What the released training scripts have in common."""
    return presets.run(
        seed=0,
        steps=steps,
        batch=32,
        ema=0.0,  # the paper keeps no average
        data=presets.dataset(data, (512, 512)),
        system=dict(name="autoencode", size=(512, 512), codec=codec),
        optimizer=dict(
            name="adamw",
            weight_decay=0.05,
            clip=3.0,
            schedule=dict(name="constant", lr=lr),
        ),
    )

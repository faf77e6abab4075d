"""Quickstart: pairs of embedded scenes and their label maps on a laptop, in minutes.

  python launch/train.py --config configs/quickstart.py --workdir runs/quickstart

Image pixels and analog bits of the label map (both predict data) are denoised together by one small
U-Net around a U-ViT, from captions. When training ends it generates 256 pairs and judges them by an
exact oracle: every category of the scenes owns a hue.

Hardware: two CPU cores are enough.
Expected: alignment mIoU 0.972 on the 256 pairs, chance 0.126; things asked for that are there
0.75, shapes 0.723 (real renders 0.931), in 12 min 55 s with installation, on a slow machine and
beside other work (seed 0).
Paper: the one-stream mechanism is that of PDM (arXiv 2412.02929, section 3.2), whose full-size
config is configs/pdm.py.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """``smoke``: the same in seconds."""
    a = presets.parse_arg(arg, smoke=False)
    # One schedule for both streams: an override of one is an override of the other.
    cosine = dict(name="cosine")
    weight = dict(name="inverse_sigma", cap=5.0)
    process = dict(predicts="data", schedule=cosine, weight=weight, clip=1.0)
    config = presets.run(
        seed=0,
        steps=1400,
        batch=16,  # twice the updates of 32 in the same minutes
        ema=0.995,
        data=presets.scenes(32, things=2, thing_size=(0.4, 0.6), texture=0.3),
        system=dict(
            name="joint",
            size=(32, 32),  # pixels
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
                    process=dict(process),
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
                self_condition=True,  # shapes are made over several steps
                time_tokens=("image",),
                time_mlp=True,
                activation="relu2",  # erf takes a fifth of a CPU's time
            ),
            text=dict(name="words", width=128, length=16),  # the longest caption of two things
            # more of the times at which it is decided what is there at all
            times=dict(name="shared", distribution=dict(name="high_noise", power=1.0)),
            solver=dict(name="ancestral", steps=25, grid="time_quadratic"),  # clean edges
        ),
        optimizer=dict(
            name="muon",
            b2=0.99,
            weight_decay=0.01,
            clip=1.0,
            schedule=dict(name="cosine", lr=1e-2, warmup=100),
        ),
        log=dict(every=50),
        preview=dict(every=600, first=100, count=8),
        checkpoint=dict(every=300, keep=2),
        evaluate=dict(judge="oracle", transforms={}),
        finish=dict(num=256),
    )
    return ConfigDict(presets.shrunk(config) if a["smoke"] else config).lock()

"""Quickstart: pairs of embedded scenes and their label maps on a laptop, in minutes.

  python launch/train.py --config configs/quickstart.py --workdir runs/quickstart

Image pixels (velocity prediction) and analog bits of the label map (data prediction) are denoised
together by one small U-ViT, from captions. Two CPU cores are enough. When training ends it
generates 256 pairs and judges them by an exact oracle: every category of the scenes owns a hue.
The one-stream mechanism is PDM's (section 3.2); its full-size config is configs/pdm.py.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """``smoke``: the same in seconds."""
    a = presets.parse_arg(arg, smoke=False)
    size = 32  # pixels
    cosine = {"name": "cosine"}
    config = presets.run(
        steps=1400,
        batch=32,
        ema=0.995,
        data=presets.easy_scenes(size),
        system={
            "name": "joint",
            "size": (size, size),
            "streams": {
                "image": {
                    "field": "image",
                    "codec": {"name": "pixels"},
                    "process": {"predicts": "velocity", "schedule": cosine, "clip": 1.0},
                    "tokens": {"patch": 4},
                },
                "mask": {
                    "field": "labels",
                    "codec": {"name": "bits"},
                    "process": {"predicts": "data", "schedule": cosine, "clip": 1.0},
                    "tokens": {"patch": 4},
                },
            },
            "denoiser": {
                "name": "uvit",
                "width": 128,
                "depth": 4,
                "heads": 4,
                "time_tokens": ("image",),
                "time_mlp": True,
                "share": ("image", "mask"),  # half the tokens: time matters most here
            },
            "text": {"name": "words", "width": 128, "length": 24},
            "times": {"name": "shared", "distribution": {"name": "uniform"}},
            "solver": {"name": "dpm_solver_pp", "steps": 25, "order": 2, "method": "multistep"},
        },
        optimizer={
            "name": "muon",
            "b2": 0.99,
            "weight_decay": 0.01,
            "clip": 1.0,
            "schedule": {"name": "cosine", "lr": 1e-2, "warmup": 100},
        },
        log={"every": 50},
        preview={"every": 600, "count": 8},
        checkpoint={"every": 300, "keep": 2},
        evaluate={"judge": "oracle", "transforms": {}},
        finish={"num": 256},
    )
    return ConfigDict(presets.shrunk(config) if a["smoke"] else config).lock()

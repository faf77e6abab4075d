"""An image autoencoder of our own: images as 4-channel latents, 4 or 8 times smaller.

  python launch/train.py --config configs/image_codec.py --workdir runs/image_codec
  python launch/train.py --config configs/image_codec.py:data=folders --workdir runs/image_codec \\
      --config.data.train.root=data/camvid --config.data.val.root=data/camvid

Latent models on small data then need no downloaded weights: the codec of a stream, or of a bridge,
is {"name": "trained", "workdir": "runs/image_codec", "scale": "fit"}. Half of the rows are label
maps in the colours of ``palette=`` (fitted to the classes, or the published 6 x 6 x 6 lattice), so
that the same codec serves chain(palette, image codec). Trained on images alone it loses the labels:
on scenes 0.30 mIoU came back after 600 steps, and with label maps 0.75 after 353.

| data | crops | 4x (``factor=4``) | 8x (``factor=8``) |
|---|---|---|---|
| scenes | 32 px | 0.6 M parameters | 1.1 M |
| folders | 128 px, of images whose shorter side is 128 to 256 px | the same | the same |

Source: TAESD (network); the loss is in ``codecs/image_tiny.py``.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets

WIDTHS, BLOCKS = (16, 32, 64, 64), (1, 1, 2, 2)

PALETTES = {
    "fitted": {"name": "palette", "void": "masked", "perturbation": 6.375},
    "published": {"name": "palette", "k": 6, "s": 50, "void": "white", "perturbation": 6.375},
}

LEVELS = {"4": 3, "8": 4}
"""Widths in use, by the pixels per latent cell along each side."""


def get_config(arg: str = "") -> ConfigDict:
    """``data=``scenes or folders; ``factor=``4 or 8; ``palette=``fitted or published; ``smoke``."""
    a = presets.parse_arg(arg, data="scenes", factor="4", palette="fitted", smoke=False)
    config = presets.choose(a["data"], "data", {"scenes": scenes, "folders": folders})()
    codec = network(presets.choose(a["factor"], "factor", LEVELS))
    palette = presets.choose(a["palette"], "palette", PALETTES)
    if a["smoke"]:
        config = presets.brief(scenes())
        config["data"]["val"]["count"] = 32
        narrow = (8,) * len(codec["widths"])
        codec |= {"widths": narrow, "up_widths": narrow}
    config["system"] |= {"codec": codec, "palette": palette}
    return ConfigDict(config).lock()


def scenes() -> dict:
    """Embedded scenes at 32 px; minutes on two cores."""
    return small(presets.scenes(32), (32, 32), steps=2000)


def folders() -> dict:
    """A folder data set in 128-px crops."""
    data = presets.dataset("folders", (128, 128), workers=0, threads=2)
    data["transforms"]["resize"]["random_scale"] = (1.0, 2.0)
    return small(data, (128, 128), steps=5000)


def network(levels: int) -> dict:
    """An autoencoder of so many sizes of the picture, wider as it gets smaller."""
    return {
        "name": "image_tiny",
        "widths": WIDTHS[:levels],
        "blocks": BLOCKS[:levels],
        "up_widths": WIDTHS[:levels][::-1],
        "up_blocks": BLOCKS[:levels][::-1],
        "latent_channels": 4,
        "noise": 0.05,
    }


def small(data: dict, size: tuple[int, int], *, steps: int) -> dict:
    """Training of the small network."""
    return presets.run(
        steps=steps,
        batch=16,
        ema=0.99,
        data=data,
        system={"name": "autoencode", "field": "image", "size": size, "painted": 0.5},
        optimizer={
            "name": "muon",
            "b2": 0.99,
            "clip": 1.0,
            "schedule": {"name": "cosine", "lr": 1e-2, "warmup": 100},
        },
        preview={"every": 1000, "count": 8},
    )

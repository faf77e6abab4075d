"""An image autoencoder of our own: images as 4-channel latents, 4 or 8 times smaller.

  python launch/train.py --config configs/image_codec.py --workdir runs/image_codec
  python launch/train.py --config configs/image_codec.py:data=folders --workdir runs/image_codec \\
      --config.data.train.root=data/camvid --config.data.val.root=data/camvid

Latent models on small data then need no downloaded weights: the codec of a stream, or of a bridge,
is {"name": "trained", "workdir": "runs/image_codec", "scale": "fit"}. Half of the rows are label
maps in the colours of ``palette=`` (fitted to the classes, or the published 6 x 6 x 6 lattice), so
that the same codec serves chain(palette, image codec).

| data | crops | 4x (``factor=4``) | 8x (``factor=8``) | hardware |
|---|---|---|---|---|
| scenes | 32 px | 0.6 M parameters | 1.1 M | two CPU cores |
| folders | 128 px, of images whose shorter side is 128 to 256 px | the same | the same | one chip |

Expected: trained on images alone it loses the labels: on scenes 0.30 mIoU came back after 600
steps, and with label maps 0.75 after 353.

Source: TAESD (network); the loss is in ``codecs/image_tiny.py``. No paper of the others has it.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets

PALETTES = {
    "fitted": dict(name="palette", void="masked", perturbation=6.375),
    "published": dict(name="palette", k=6, s=50, void="white", perturbation=6.375),
}

CODECS = {
    "4": dict(
        name="image_tiny",
        widths=(16, 32, 64),
        blocks=(1, 1, 2),
        up_widths=(64, 32, 16),
        up_blocks=(2, 1, 1),
        latent_channels=4,
        noise=0.05,
    ),
    "8": dict(
        name="image_tiny",
        widths=(16, 32, 64, 64),
        blocks=(1, 1, 2, 2),
        up_widths=(64, 64, 32, 16),
        up_blocks=(2, 2, 1, 1),
        latent_channels=4,
        noise=0.05,
    ),
}
"""By the pixels per latent cell along each side: wider as the picture gets smaller."""


def get_config(arg: str = "") -> ConfigDict:
    """``data=``scenes or folders; ``factor=``4 or 8; ``palette=``fitted or published; ``smoke``."""
    a = presets.parse_arg(arg, data="scenes", factor="4", palette="fitted", smoke=False)
    config = presets.choose(a["data"], "data", {"scenes": scenes, "folders": folders})()
    codec = dict(presets.choose(a["factor"], "factor", CODECS))
    palette = presets.choose(a["palette"], "palette", PALETTES)
    if a["smoke"]:
        config = presets.brief(scenes())
        config["data"]["val"]["count"] = 32
        narrow = (8,) * len(codec["widths"])
        codec |= dict(widths=narrow, up_widths=narrow)
    config["system"] |= dict(codec=codec, palette=palette)
    return ConfigDict(config).lock()


def scenes() -> dict:
    """Embedded scenes at 32 px; minutes on two cores."""
    return presets.run(
        seed=0,
        steps=2000,
        batch=16,
        ema=0.99,
        data=presets.scenes(32, things=5, thing_size=(0.25, 0.5), texture=1.0),
        system=dict(name="autoencode", field="image", size=(32, 32), painted=0.5),
        optimizer=dict(
            name="muon",
            b2=0.99,
            clip=1.0,
            schedule=dict(name="cosine", lr=1e-2, warmup=100),
        ),
        preview=dict(every=1000, count=8),
    )


def folders() -> dict:
    """A folder data set in 128-px crops."""
    return presets.run(
        seed=0,
        steps=5000,
        batch=16,
        ema=0.99,
        data=presets.dataset("folders", (128, 128), random_scale=(1.0, 2.0), workers=0, threads=2),
        system=dict(name="autoencode", field="image", size=(128, 128), painted=0.5),
        optimizer=dict(
            name="muon",
            b2=0.99,
            clip=1.0,
            schedule=dict(name="cosine", lr=1e-2, warmup=100),
        ),
        preview=dict(every=1000, count=8),
    )

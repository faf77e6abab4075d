"""PDM, one stream (section 3.2): image latents and analog bits of the map in one U-ViT.

  python launch/train.py --config configs/pdm.py --workdir runs/pdm
  python launch/train.py --config configs/pdm.py:data=folders --workdir runs/pdm \\
      --config.data.train.root=data/camvid --config.data.val.root=data/camvid

The image predicts noise (velocity in pixels), the map its bits; the map's noise has standard
deviation kappa = 2 (``streams.mask.process.scale``) in training and at the start of sampling. Joint
DPM-Solver++ of order 3, guidance 2 on both, the map read from one more evaluation at the end time.

| data | image stream | denoiser |
|---|---|---|
| scenes, folders | pixels | small, CPU or one chip |
| coco_panoptic | cached SD latents (scale 0.23010), CLIP-L text | U-ViT-S, 45.0 M, 590 tokens |

The last reads the features image_latents and text (``jointseg_jax/data/sources/features.py``). Its
map has patch factor f = 2: twice the sides of the latent (codec.pool = 8 / f) in patches of 2 f
(tokens.patch); f = 1 and 4 change these two. What the settings are: ``presets.bit_pairs``.

``:instances`` adds eight bits that number the things of an image (for sources with segments:
scenes, coco_panoptic), so that the results are panoptic in fact; the paper's are semantic.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """``data=``scenes, folders or coco_panoptic; ``instances``: panoptic; ``smoke``: seconds."""
    a = presets.parse_arg(arg, data="scenes", instances=False, smoke=False)
    config = presets.bit_pairs("scenes" if a["smoke"] else a["data"])
    if a["instances"]:
        config = presets.with_instances(config)
    return ConfigDict(presets.shrunk(config) if a["smoke"] else config).lock()

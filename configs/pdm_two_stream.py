"""PDM, two streams (section 3.3): a trained image stream, frozen, and a map stream beside it.

  python launch/train.py --config configs/pdm_two_stream.py:stage=image --workdir runs/pdm_image
  python launch/train.py --config configs/pdm_two_stream.py --workdir runs/pdm_two_stream

The first command trains a U-ViT on images and their captions alone. The second starts from it: the
image stream is that network (``start``), of which only positions, last norm and head go on learning
(``trainable``); the map stream and the exchange between the two begin from nothing, the latter at
zero, so that the first image predictions are those of the image stream. Everything else (map bits,
kappa = 2, times, solver, guidance) is as in configs/pdm.py.

| data | image stream | pair stage |
|---|---|---|
| scenes, folders | pixels, small | as many steps as configs/pdm.py |
| coco_panoptic | SD latents, U-ViT-S, 256 x 1 M steps | 64 x 2 M steps, 92.5 M |

With coco_panoptic the published U-ViT may take the place of the first command, as safetensors:
--config.start.workdir= --config.start.file=mscoco_uvit_small.safetensors
``start.init_map_stream=copy`` lets the map stream's blocks begin as the image stream's;
``system.denoiser.exchange_bias=True`` gives the exchange the biases of the released code.
"""

from ml_collections import ConfigDict

from jointseg_jax import presets


def get_config(arg: str = "") -> ConfigDict:
    """``data=``scenes, folders or coco_panoptic; ``stage=``image or pair; ``smoke``: seconds."""
    a = presets.parse_arg(arg, data="scenes", stage="pair", smoke=False)
    stage = presets.choose(a["stage"], "stage", {"image": image_stage, "pair": pair_stage})
    config = stage("scenes" if a["smoke"] else a["data"])
    return ConfigDict(presets.shrunk(config) if a["smoke"] else config).lock()


def image_stage(data: str) -> dict:
    """Images and text alone, by the network that becomes the image stream."""
    config = presets.bit_pairs(data) | {"finish": {"num": 0}}  # there are no maps to judge
    del config["system"]["streams"]["mask"]
    if data == "coco_panoptic":  # as U-ViT trains; its latents cannot be drawn without their VAE
        config |= {"steps": 1_000_000, "batch": 256, "preview": {"every": 0, "count": 8}}
    return config


def pair_stage(data: str) -> dict:
    """Images and maps, from the image stage's weights."""
    config = presets.bit_pairs(data)
    config["system"]["denoiser"] |= {"name": "two_stream", "exchange_bias": False}
    start, trainable = presets.FROM_IMAGES, presets.FROZEN_IMAGE_STREAM
    return config | {"start": start, "trainable": trainable}

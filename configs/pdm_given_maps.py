"""PDM with maps given (sections 3.4 and 4): images that follow a clean label map.

  python launch/train.py --config configs/pdm_given_maps.py --workdir runs/pdm_given_maps
  python launch/sample.py --workdir runs/pdm_given_maps --out made --given annotations=DIR

The network sees the clean map at time 0 in every step of training and sampling (``system.known``),
the map's features are added to the image's before the image head (``add_features``), and the loss
is the image's alone; the map's own head is there, as in the paper's weights, and is not trained.
Everything else is as in configs/pdm.py.

| streams | network | starts from |
|---|---|---|
| one | the U-ViT of configs/pdm.py | nothing |
| two | that of configs/pdm_two_stream.py, image stream frozen | its first stage |
"""

from ml_collections import ConfigDict

from jointseg_jax import presets

UNUSED_HEAD = ((r"/mask_out/", False),)


def get_config(arg: str = "") -> ConfigDict:
    """``data=``scenes, folders or coco_panoptic; ``streams=``one or two; ``smoke``: seconds."""
    a = presets.parse_arg(arg, data="scenes", streams="one", smoke=False)
    kind = presets.choose(a["streams"], "streams", {"one": one_stream, "two": two_streams})
    config = presets.bit_pairs("scenes" if a["smoke"] else a["data"])
    config["system"]["known"] = ("mask",)
    config["system"]["denoiser"] |= {"add_features": (("mask", "image"),)}
    config = kind(config)
    return ConfigDict(presets.shrunk(config) if a["smoke"] else config).lock()


def one_stream(config: dict) -> dict:
    """Image and map as tokens of one network."""
    return config | {"trainable": (*UNUSED_HEAD, (r"", True))}


def two_streams(config: dict) -> dict:
    """A map stream beside a trained image stream."""
    config["system"]["denoiser"] |= {"name": "two_stream", "exchange_bias": False}
    trainable = (*UNUSED_HEAD, *presets.FROZEN_IMAGE_STREAM)
    return config | {"start": presets.FROM_IMAGES, "trainable": trainable}

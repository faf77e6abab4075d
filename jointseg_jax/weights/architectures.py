"""The ``UViT`` that a reference config describes.

Reference configs (``config.nnet`` of U-ViT and UniDiffuser, ``config.json`` of diffusers folders)
hold sizes, and switches of variants nobody published. A switch that would change the numbers is
refused rather than ignored.

Source: the constructors of baofff/U-ViT, thu-ml/unidiffuser, diffusers and 00why00/JoDiffusion.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jointseg_jax.models.embed import Patches, Tokens
from jointseg_jax.types import UserError

Config = Mapping[str, Any]


def uvit_fields(layout: str, config: Config) -> dict[str, Any]:
    """Keyword arguments of ``UViT`` for a reference config, by the layout names of ``tables``.

    Raises:
      UserError: an unknown layout, a size that is absent, or a switch that is not supported.
    """
    if layout not in BUILDERS:
        raise UserError(f"layout {layout!r} is unknown; one of: {', '.join(BUILDERS)}.")
    try:
        return BUILDERS[layout](config)
    except KeyError as error:
        raise UserError(
            f"config of layout {layout!r} lacks {error}; it has {', '.join(sorted(config))}."
        ) from error


def _uvit(config: Config) -> dict[str, Any]:
    image = _image(config, conv=config.get("conv", True))
    return _original(config) | {
        "streams": (("image", image),),
        "time_tokens": ("image",),
        "classes": max(config.get("num_classes", 0), 0),  # U-ViT says -1 for none
        "norm": "pre",
        "skip": config.get("skip", True),
    }


def _uvit_t2i(config: Config) -> dict[str, Any]:
    context = Tokens(count=config["num_clip_token"], width=config["clip_dim"])
    return _uvit(config) | {"context": context}


def _unidiffuser(config: Config) -> dict[str, Any]:
    return _original(config) | {
        "streams": (
            ("text", Tokens(count=config["num_text_tokens"], width=config["text_dim"])),
            ("clip", Tokens(count=1, width=config["clip_img_dim"])),
            ("image", _image(config, conv=False)),
        ),
        "time_tokens": ("image", "text"),
        "data_types": 2,
        "norm": "post",
    }


def _original(config: Config) -> dict[str, Any]:
    """Sizes under the names that U-ViT and the original UniDiffuser share."""
    _only(config, "qk_scale", None)
    return {
        "width": config["embed_dim"],
        "depth": config["depth"],
        "heads": config["num_heads"],
        "mlp_ratio": config.get("mlp_ratio", 4),
        "qkv_bias": config.get("qkv_bias", False),
        "time_mlp": config.get("mlp_time_embed", False),
    }


def _image(config: Config, *, conv: bool) -> Patches:
    # The original UniDiffuser ends without a convolution, U-ViT may.
    size, channels, patch = (config[k] for k in ("img_size", "in_chans", "patch_size"))
    grid = (size, size) if isinstance(size, int) else tuple(size)
    return Patches(grid=grid, channels=channels, patch=patch, conv=bool(conv))


def _diffusers(config: Config, *, mask: bool = False) -> dict[str, Any]:
    # Variants that nobody published, and whose numbers would differ.
    _only(config, "block_type", "unidiffuser")
    _only(config, "activation_fn", "gelu")
    _only(config, "norm_type", "layer_norm")
    _only(config, "norm_elementwise_affine", True)
    _only(config, "use_patch_pos_embed", False)
    _only(config, "out_channels", config["in_channels"])
    size = config["sample_size"]
    image = Patches(grid=(size, size), channels=config["in_channels"], patch=config["patch_size"])
    inner = config["inner_text_dim"] if mask else 0
    text = Tokens(count=config["num_text_tokens"], width=config["text_dim"], inner=inner)
    streams = {"text": text, "clip": Tokens(count=1, width=config["clip_img_dim"]), "image": image}
    # label latents have the image's grid and channels
    streams |= {"mask": image} if mask else {}
    return {
        "streams": tuple(streams.items()),
        "time_tokens": ("image", "text"),
        "data_types": 2 if config["use_data_type_embedding"] else 0,
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": 4,  # diffusers' blocks know no other
        "qkv_bias": config.get("attention_bias", False),
        "time_mlp": config.get("use_timestep_embedding", False),
        "norm": "pre" if config.get("pre_layer_norm", False) else "post",
        "join_norm": True,
    }


def _only(config: Config, key: str, value: object) -> None:
    own = config.get(key, value)
    # diffusers writes None for "as many as come in".
    if own != value and not (own is None and key == "out_channels"):
        raise UserError(f"config: {key}={own!r} is not supported; only {value!r} is.")


BUILDERS = {
    "uvit": _uvit,
    "uvit_t2i": _uvit_t2i,
    "unidiffuser": _unidiffuser,
    "unidiffuser_diffusers": _diffusers,
    "jodiffusion": functools.partial(_diffusers, mask=True),
}

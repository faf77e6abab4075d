"""Reference weights of the image autoencoder: sizes from its config, and the table of its tensors.

Source: the constructor and the state dict of diffusers' ``AutoencoderTiny``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jointseg_jax.codecs.image_tiny import CHANNELS, MAGNITUDE, ImageTiny
from jointseg_jax.rules import by_path
from jointseg_jax.types import UserError
from jointseg_jax.weights.convert import Entry, Table
from jointseg_jax.weights.tables import CONV, SAME

# Reference setting -> field of ours.
RENAMED = {
    "encoder_block_out_channels": "widths",
    "num_encoder_blocks": "blocks",
    "decoder_block_out_channels": "up_widths",
    "num_decoder_blocks": "up_blocks",
    "latent_channels": "latent_channels",
    "act_fn": "activation",
    "scaling_factor": "scale",
}
# Settings of which one value is supported, since it is part of our network.
ONLY = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "upsampling_scaling_factor": 2,
    "upsample_fn": "nearest",
    "latent_magnitude": MAGNITUDE,
    "latent_shift": 0.5,
    "shift_factor": 0.0,
}
IDLE = ("force_upcast", "block_out_channels")  # what a reference config repeats or only hints at


def fields(config: Mapping[str, object]) -> dict[str, Any]:
    """Keyword arguments of ``ImageTiny`` for a reference config.

    Raises:
      UserError: a setting that is unknown, or of which only the published value is supported.
    """
    config = {k: v for k, v in config.items() if not k.startswith("_") and k not in IDLE}
    for key, value in config.items():
        if key not in RENAMED and key not in ONLY:
            known = ", ".join([*RENAMED, *ONLY, *IDLE])
            raise UserError(f"image_tiny config: {key} is unknown; known: {known}.")
        if key in ONLY and value != ONLY[key]:
            raise UserError(
                f"image_tiny config: {key} = {value!r} is not supported; only {ONLY[key]!r} is."
            )
    ours: dict[str, Any] = {RENAMED[key]: v for key, v in config.items() if key in RENAMED}
    if "scale" in ours:
        ours["scale"] = float(ours["scale"])  # JSON may write 1.0 as 1
    return ours


def table(codec: ImageTiny) -> Table:
    """The place of every tensor of this codec's network.

    Raises:
      UserError: the codec is not one that the reference network can be.
    """
    for name in ("widths", "up_widths"):
        if len(set(getattr(codec, name))) > 1:
            raise UserError(
                f"image_tiny weights: {name} = {getattr(codec, name)}; the reference network has "
                "one width. Change the codec config."
            )
    flat = by_path(jax.eval_shape(codec.init, jax.random.key(0)))
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    names = dict([*_encoder(codec), *_decoder(codec)])
    entries = tuple(_entry(path, names) for path in shapes)
    return Table(name="image_tiny", entries=entries, shapes=shapes)


def _entry(path: str, names: Mapping[str, str]) -> Entry:
    layer, _, leaf = path.rpartition("/")
    name, layout = ("weight", CONV) if leaf == "kernel" else ("bias", SAME)
    return Entry(theirs=(f"{names[layer]}.{name}",), ours=(path,), layout=layout)


def _encoder(codec: ImageTiny) -> Iterator[tuple[str, str]]:
    # Reference keys are positions in a sequence, counted over layers, activations and resizes.
    yield "encoder/conv_in", "encoder.layers.0"
    n = 1
    for i, count in enumerate(codec.blocks):
        if i > 0:
            yield f"encoder/halve_{i}", f"encoder.layers.{n}"
            n += 1
        yield from _blocks("encoder", i, count, n)
        n += count
    yield "encoder/conv_out", f"encoder.layers.{n}"


def _decoder(codec: ImageTiny) -> Iterator[tuple[str, str]]:
    yield "decoder/conv_in", "decoder.layers.0"
    n = 2  # conv, activation
    for i, count in enumerate(codec.up_blocks):
        if i > 0:
            yield f"decoder/conv_up_{i}", f"decoder.layers.{n + 1}"
            n += 2  # resize, conv
        yield from _blocks("decoder", i, count, n)
        n += count
    yield "decoder/conv_out", f"decoder.layers.{n}"


def _blocks(part: str, level: int, count: int, start: int) -> Iterator[tuple[str, str]]:
    for j, i in itertools.product(range(count), (1, 2, 3)):
        # conv, relu, conv, relu, conv: every second position is an activation
        there = f"{part}.layers.{start + j}.conv.{2 * (i - 1)}"
        yield f"{part}/block_{level}_{j}/conv_{i}", there

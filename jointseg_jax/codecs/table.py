"""The codecs a config can name."""

from jointseg_jax.codecs.bits import Bits
from jointseg_jax.codecs.chain import Chain
from jointseg_jax.codecs.image_tiny import ImageTiny
from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.codecs.palette import Palette
from jointseg_jax.codecs.panoptic import PanopticBits
from jointseg_jax.codecs.pixels import Latents, Pixels

CODECS = {
    "pixels": Pixels,
    "latents": Latents,
    "bits": Bits,
    "panoptic_bits": PanopticBits,
    "label_ae": LabelAE,
    "palette": Palette,
    "image_tiny": ImageTiny,
    "chain": Chain,
}

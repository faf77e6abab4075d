"""The codecs a config can name."""

from jointseg_jax.codecs.bits import Bits
from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.codecs.pixels import Latents, Pixels

CODECS = {"pixels": Pixels, "latents": Latents, "bits": Bits, "label_ae": LabelAE}

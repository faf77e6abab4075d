"""Every codec is what the protocols say, and only those of labels say how sure they are."""

import pytest

from jointseg_jax.codecs.bits import Bits, PanopticBits
from jointseg_jax.codecs.chain import Chain
from jointseg_jax.codecs.codec import AnnotationCodec, Codec, PanopticCodec, TrainableCodec
from jointseg_jax.codecs.image_tiny import ImageTiny
from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.codecs.palette import Palette
from jointseg_jax.codecs.pixels import Latents, Pixels

PALETTE = Palette(classes=3)
PROTOCOLS = {
    Bits(classes=3): {AnnotationCodec},
    PanopticBits(classes=3): {PanopticCodec},
    LabelAE(classes=3): {AnnotationCodec, TrainableCodec},
    ImageTiny(): {TrainableCodec},
    PALETTE: {AnnotationCodec},
    Chain(first=PALETTE, second=Pixels()): {AnnotationCodec},
    Pixels(): set(),
    Latents(): set(),
}


@pytest.mark.parametrize("codec", PROTOCOLS, ids=lambda codec: type(codec).__name__)
def test_codecs_keep_the_protocols(codec):
    assert isinstance(codec, Codec)
    kinds = {"labels": AnnotationCodec, "panoptic": PanopticCodec}
    assert kinds.get(codec.kind) in PROTOCOLS[codec] | {None}
    for protocol in (AnnotationCodec, TrainableCodec):
        assert isinstance(codec, protocol) == (protocol in PROTOCOLS[codec])

"""What a config says of instances: which field, how many numbers, what does not go together."""

import pytest

from jointseg_jax import build
from jointseg_jax.codecs.bits import PanopticBits
from jointseg_jax.data.classes import Classes
from jointseg_jax.types import UserError


def config(panoptic=True, field="panoptic", **codec):
    mask = {"field": field, "codec": {"name": "panoptic_bits"} | codec}
    image = {"field": "image", "codec": {"name": "pixels"}}
    streams = {"text": {"field": "text"}, "image": image, "mask": mask}
    return {"data": {"panoptic": panoptic}, "system": {"streams": streams}}


def test_instances_are_numbered_as_high_as_the_codec_reads():
    assert build.instances(config()) == 255
    assert build.instances(config(instance_bits=4)) == 15
    plain = config(panoptic=False, field="labels", name="bits")
    assert build.instances(plain) == 0
    del plain["data"]["panoptic"]
    assert build.instances(plain) == 0
    assert build.instances(config(field="labels", name="bits")) == 255  # asked for, not coded
    assert build.instances({"data": {}, "system": {"codec": {"name": "label_ae"}}}) == 0


@pytest.mark.parametrize("wrong", [{"panoptic": False}, {"field": "labels"}])
def test_a_panoptic_codec_needs_its_field(wrong):
    with pytest.raises(UserError, match=r"system\.streams\.mask: its codec panoptic_bits codes"):
        build.instances(config(**wrong))


def test_panoptic_codecs_are_told_the_classes():
    facts = build.DatasetInfo(Classes(names=("sky", "ball")), (), ())
    spec = {"name": "panoptic_bits", "instance_bits": 4}
    assert build.codec(spec, facts, "here") == PanopticBits(classes=2, instance_bits=4)
    with pytest.raises(UserError, match=r"config\.here: panoptic_bits: .*instance_bits = 16"):
        build.codec(spec | {"instance_bits": 16}, facts, "here")

"""What a config says of instances: which field, how many numbers, what does not go together."""

import pytest

from jointseg_jax import build
from jointseg_jax.codecs.bits import PanopticBits
from jointseg_jax.config import RunConfig
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.transport.loss_weight import UNIFORM, InverseSigma
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import Cosine
from jointseg_jax.types import UserError


def config(panoptic=True, field="panoptic", **codec):
    mask = {"field": field, "codec": {"name": "panoptic_bits"} | codec}
    image = {"field": "image", "codec": {"name": "pixels"}}
    streams = {"text": {"field": "text"}, "image": image, "mask": mask}
    data = {"train": {}, "val": {}} | ({} if panoptic is None else {"panoptic": panoptic})
    return run_config(data, {"streams": streams})


def run_config(data, system):
    given = {"steps": 1, "batch": 1, "optimizer": {}, "data": data}
    return RunConfig.parse(given | {"system": {"name": "joint", "size": (8, 8)} | system})


def test_instances_are_numbered_as_high_as_the_codec_reads():
    assert build.instances(config()) == 255
    assert build.instances(config(instance_bits=4)) == 15
    assert build.instances(config(panoptic=False, field="labels", name="bits")) == 0
    assert build.instances(config(panoptic=None, field="labels", name="bits")) == 0
    assert build.instances(config(field="labels", name="bits")) == 255  # asked for, not coded
    assert (
        build.instances(run_config({"train": {}, "val": {}}, {"codec": {"name": "label_ae"}})) == 0
    )


@pytest.mark.parametrize("wrong", [{"panoptic": False}, {"field": "labels"}])
def test_a_panoptic_codec_needs_its_field(wrong):
    with pytest.raises(UserError, match=r"system\.streams\.mask: its codec panoptic_bits codes"):
        build.instances(config(**wrong))


def test_panoptic_codecs_are_told_the_classes():
    facts = DatasetInfo(Classes(names=("sky", "ball")), (), ())
    spec = {"name": "panoptic_bits", "instance_bits": 4}
    assert build.codec(spec, facts, "here") == PanopticBits(classes=2, instance_bits=4)
    with pytest.raises(UserError, match=r"config\.here: panoptic_bits: .*instance_bits = 16"):
        build.codec(spec | {"instance_bits": 16}, facts, "here")


def test_a_process_has_a_schedule_and_a_weight():
    spec = {"schedule": {"name": "cosine"}, "predicts": "data"}
    assert build.process(spec, "here").weight == UNIFORM
    made = build.process(spec | {"weight": {"name": "inverse_sigma", "cap": 4.0}}, "here")
    assert made == Process(schedule=Cosine(), predicts="data", weight=InverseSigma(cap=4.0))

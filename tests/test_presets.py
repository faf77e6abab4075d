"""Facts and arguments of configs."""

import jax
import pytest

from jointseg_jax import presets
from jointseg_jax.models.uvit import UViT
from jointseg_jax.transport.schedules import ScaledLinear


def test_arguments_take_the_types_of_their_defaults():
    parse = presets.parse_arg
    defaults = {"data": "scenes", "size": 32, "rate": 0.5, "smoke": False}
    assert parse("", **defaults) == defaults
    given = parse("size=64,smoke,data=voc,rate=1", **defaults)
    assert given == {"data": "voc", "size": 64, "rate": 1.0, "smoke": True}
    assert type(given["rate"]) is float
    assert parse("smoke=true", smoke=False) == {"smoke": True}
    assert parse("smoke=false", smoke=True) == {"smoke": False}


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("dat=voc", "config argument 'dat' is unknown; one of: data, size, smoke."),
        ("smoke=yes", "config argument 'smoke=yes': smoke is a switch; write smoke alone."),
        ("data", "config argument 'data': data needs a value, as data=scenes."),
        ("size=big", "config argument 'size=big': invalid literal for int"),
    ],
)
def test_mistaken_arguments_are_named(arg, message):
    with pytest.raises(ValueError) as error:
        presets.parse_arg(arg, data="scenes", size=32, smoke=False)
    assert message in str(error.value)


def test_a_choice_outside_the_table_lists_it():
    assert presets.choose("voc", "data", {"voc": 1, "coco": 2}) == 1
    with pytest.raises(ValueError, match="config argument data=vox is unknown; one of: voc, coco"):
        presets.choose("vox", "data", {"voc": 1, "coco": 2})


def test_a_run_takes_changes_of_known_settings_only():
    run = presets.run(steps=5, batch=2, ema=0.0)
    assert (run["steps"], run["ema"], run["seed"]) == (5, 0.0, 0)
    with pytest.raises(ValueError, match=r"presets.run: unknown settings \['epochs', 'stepz'\]"):
        presets.run(stepz=5, epochs=1)
    run["log"]["every"] = 7
    assert presets.run()["log"]["every"] != 7  # every run has settings of its own


def test_a_shrunk_run_starts_from_nothing_and_is_otherwise_the_same():
    start = {"workdir": "runs/other", "file": "", "move": ()}
    run = presets.shrunk(presets.bit_pairs("scenes") | {"start": start})
    assert run["start"] == start | {"workdir": ""}
    assert run["steps"] < 10 and run["finish"]["num"] == 16
    plain = presets.bit_pairs("scenes")
    changed = {k for k in plain if run[k] != plain[k]}
    assert changed == {
        *("steps", "batch", "optimizer", "ema", "start", "log", "checkpoint", "finish", "system")
    }
    assert run["optimizer"]["schedule"]["warmup"] < run["steps"]
    assert presets.shrunk(run | {"finish": {"num": 0}})["finish"] == {"num": 0}


BETAS, COSINE = presets.SD_SCHEDULE | {"time_offset": 1}, {"name": "cosine"}


@pytest.mark.parametrize(
    ("data", "predicts", "schedule"),
    [
        ("coco_panoptic", "noise", BETAS),  # as published
        ("scenes", "velocity", COSINE),  # in pixels
        ("folders", "velocity", COSINE),
    ],
)
def test_bit_pairs_share_one_time_and_schedule(data, predicts, schedule):
    """The map predicts its bits and its noise has deviation 2, whatever the image predicts."""
    system = presets.bit_pairs(data)["system"]
    image, mask = (s["process"] for s in system["streams"].values())
    assert (image["predicts"], image.get("scale", 1.0)) == (predicts, 1.0)
    assert (mask["predicts"], mask["scale"]) == ("data", 2.0)
    assert image["schedule"] == mask["schedule"] == schedule
    assert system["times"]["distribution"] == {"name": "uniform", "steps": 1000}
    assert system["text_drop"] == 0.1 and system["solver"]["final"] == "evaluate"
    with pytest.raises(ValueError, match="data=vox is unknown; one of: scenes, folders, coco_pan"):
        presets.bit_pairs("vox")


DATASETS = ("folders", "voc", "ade20k", "coco_panoptic", "coco_stuff", "cityscapes")


@pytest.mark.parametrize("name", [*DATASETS, "celebamask_hq"])
def test_data_sets_are_read_relative_to_the_working_directory(name):
    data = presets.dataset(name, (64, 48), workers=1)
    assert not data["train"]["root"].startswith("/")
    assert data["train"]["split"] != data["val"]["split"] and data["workers"] == 1
    assert data["transforms"]["resize"]["size"] == (64, 48)


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        # the published counts; UniDiffuser's without the 26,112 that its diffusers port never uses
        (
            presets.UVIT_SMALL
            | {
                "streams": {"image": {"channels": 4, "conv": True}},
                "time_tokens": ("image",),
                "context": {"kind": "tokens", "count": 77, "width": 768},
            },
            44_692_644,
        ),
        (
            presets.UNIDIFFUSER
            | {
                "streams": {
                    "text": {"kind": "tokens", "count": 77, "width": 64},
                    "clip": {"kind": "tokens", "count": 1, "width": 512},
                    "image": {"grid": (64, 64), "channels": 4},
                },
                "time_tokens": ("image", "text"),
                "data_types": 2,
            },
            952_509_520,
        ),
    ],
    ids=["uvit_small", "unidiffuser"],
)
def test_model_sizes_are_the_published_ones(fields, parameters):
    fields = {k: v for k, v in fields.items() if k != "name"}
    patches = {"kind": "patches", "grid": (32, 32), "patch": 2}
    fields["streams"] = {
        k: patches | v if "channels" in v else v for k, v in fields["streams"].items()
    }
    module = UViT(**fields, scan=True)
    shapes = jax.eval_shape(module.init, jax.random.key(0), **module.input_shapes())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == parameters


def test_the_schedule_is_the_default_one():
    fields = {k: v for k, v in presets.SD_SCHEDULE.items() if k != "name"}
    assert ScaledLinear(**fields) == ScaledLinear()

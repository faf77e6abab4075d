"""What configs share: their arguments, the settings of every run, the smoke size, data sets."""

import runpy
from pathlib import Path

import pytest

from jointseg_jax import presets

PDM = runpy.run_path(str(Path(__file__).parents[1] / "configs/pdm.py"))


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


def test_a_run_that_says_how_often_it_is_previewed_is_previewed_early_all_the_same():
    first = presets.run()["preview"]["first"]
    assert first > 0
    preview = presets.run(preview={"every": 600, "count": 4})["preview"]
    assert preview == {"every": 600, "first": first, "count": 4}
    assert presets.run(preview={"every": 600, "first": 0})["preview"]["first"] == 0


def test_a_shrunk_run_starts_from_nothing_and_is_otherwise_the_same():
    start = {"workdir": "runs/other", "file": "", "move": ()}
    plain = PDM["scenes"]()
    run = presets.shrunk(PDM["scenes"]() | {"start": start})
    assert run["start"] == start | {"workdir": ""}
    assert run["steps"] < 10 and run["finish"]["num"] == 16
    changed = {k for k in plain if run[k] != plain[k]}
    assert changed == {
        *("steps", "batch", "optimizer", "ema", "start", "log", "checkpoint", "finish", "system")
    }
    assert run["optimizer"]["schedule"]["warmup"] < run["steps"]
    assert presets.shrunk(run | {"finish": {"num": 0}})["finish"] == {"num": 0}


DATASETS = ("folders", "voc", "ade20k", "coco_panoptic", "coco_stuff", "cityscapes")


@pytest.mark.parametrize("name", [*DATASETS, "celebamask_hq"])
def test_data_sets_are_read_relative_to_the_working_directory(name):
    data = presets.dataset(name, (64, 48), workers=1)
    assert not data["train"]["root"].startswith("/")
    assert data["train"]["split"] != data["val"]["split"] and data["workers"] == 1
    assert data["transforms"]["resize"] == {"name": "resize", "size": (64, 48), "mode": "crop"}


def test_crops_may_be_stretched_and_of_several_scales():
    data = presets.dataset("folders", (64, 48), mode="stretch", random_scale=(1.0, 2.0))
    resize = data["transforms"]["resize"]
    assert (resize["mode"], resize["random_scale"]) == ("stretch", (1.0, 2.0))

"""F14: a run that would go on with other settings is refused, field by field, unless told to."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from jointseg_jax import build
from jointseg_jax.config import RunConfig
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.training import resume
from jointseg_jax.types import UserError


def config():
    path = Path(__file__).parents[2] / "configs/quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("smoke").to_dict()


def settings(given):
    return resume.settings(RunConfig.parse(given), build.source(RunConfig.parse(given), "train"))


@pytest.fixture(scope="module")
def saved():
    """What is read back from beside a checkpoint."""
    return {"step": 7, "config": json.loads(json.dumps(settings(config())))}


def put(given, path, value):
    *parents, name = path.split("/")
    for parent in parents:
        given = given[parent]
    given[name] = value


CHANGES = {
    "batch": ("batch", 64),
    "seed": ("seed", 1),
    "dataset": ("data/train/count", 99),
    "classes": ("data/train/max_things", 1),
    "model width": ("system/denoiser/width", 64),
    "dtype": ("system/denoiser/dtype", "bfloat16"),
    "optimizer": ("optimizer/name", "adamw"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_changed_is_named_and_may_be_allowed(saved, what):
    path, value = CHANGES[what]
    given = config()
    put(given, path, value)
    current = settings(given)
    with pytest.raises(UserError) as error:
        resume.require_settings(saved, current, (), Path("W"))
    text = str(error.value)
    assert re.search(rf"{path}: .+ -> {re.escape(json.dumps(value))}", text), text
    assert "the checkpoint of step 7 in W" in text and "--allow=FIELD to change one" in text
    allowed = (f"^{path}$", *([r"^source/"] if path.startswith("data/") else []))
    resume.require_settings(saved, current, allowed, Path("W"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("log/every", 3),
        ("checkpoint/keep", 9),
        ("mesh", (1, 2, 1)),
        ("sharding", "fsdp"),
        ("data/workers", 4),
        ("nan/policy", "rollback"),
        ("watchdog", {"seconds": 60}),
    ],
)
def test_what_does_not_touch_the_result_may_change(saved, path, value):
    given = config()
    put(given, path, value)
    resume.require_settings(saved, settings(given), (), Path("W"))


def test_other_classes_or_words_are_refused(tmp_path):
    """The first class that differs is told (C6)."""
    known = DatasetInfo(Classes(names=("sky", "road", "car")), ("a", "car"), ())
    (tmp_path / "facts.json").write_text(known.dump())
    resume.require_info(known, tmp_path / "facts.json")
    other = DatasetInfo(Classes(names=("sky", "street", "car")), ("a", "car"), ())
    with pytest.raises(UserError, match="street"):
        resume.require_info(other, tmp_path / "facts.json")
    words = DatasetInfo(known.classes, ("a",), ())
    with pytest.raises(UserError, match="2 words, the data has 1"):
        resume.require_info(words, tmp_path / "facts.json")

"""Steps that are not finite: what a whole run does about them, by each policy."""

import collections
import dataclasses
import functools
import importlib.util
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax import build, sharding
from jointseg_jax.config import NanConfig, ReadConfig, RunConfig
from jointseg_jax.data.pipeline import batches
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.training import clock
from jointseg_jax.training.checkpoints import Checkpoints
from jointseg_jax.training.clock import Telemetry
from jointseg_jax.training.faults import Faults, NonFinite
from jointseg_jax.training.loop import train
from jointseg_jax.training.writers import read_records
from jointseg_jax.types import UserError

SIDE, ROWS, WORDS, WIDTH = 8, 8, 2, 4
STEP = 2  # the poison's; noticed when step 4 is logged, after checkpoint 2
READS = collections.Counter()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisoned(Scenes):
    """Scenes with text features; those of record ``poison`` are NaN the first ``doses`` times."""

    poison: int = -1
    doses: int = 0

    def __getitem__(self, index):
        READS[index] += 1
        text = np.full((WORDS, WIDTH), 0.5, np.float32)
        # the first reading is for the captions, before training
        if index == self.poison and 1 < READS[index] <= 1 + self.doses:
            text[0, 0] = np.nan
        return super().__getitem__(index) | {"features": {"text": text}}


def source(**fields):
    scenes = {"size": SIDE, "count": 64, "thing_size": (0.5, 0.6), "max_things": 1}
    return {"name": "poisoned", **scenes, **fields}


@pytest.fixture(autouse=True)
def setting(monkeypatch, caplog):
    monkeypatch.setitem(build.SOURCES, "poisoned", Poisoned)
    READS.clear()
    caplog.set_level(logging.WARNING, logger="jointseg_jax")


@pytest.fixture
def devices(monkeypatch, request):
    """As many as asked for, else one: all eight take many times as long to save and restore."""
    count = getattr(request, "param", 1)
    make = functools.partial(sharding.make_mesh, devices=jax.devices()[:count])
    monkeypatch.setattr(sharding, "make_mesh", make)


@pytest.fixture(scope="module")
def records():
    """The records in the batch of step ``STEP``."""
    clean = Scenes(**{k: v for k, v in source().items() if k != "name"})
    with batches(clean, ReadConfig(), batch=ROWS, seed=0, transforms=(), start_step=STEP) as data:
        return next(data)["index"].tolist()


def config(poison, *, doses, **nan):
    """The quickstart's smoke run, smaller, with text from the source's features."""
    path = Path(__file__).parents[2] / "configs/quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.get_config("smoke").to_dict()
    found["data"] |= {"train": source(poison=poison, doses=doses), "val": source(split="val")}
    found["system"] |= {
        "size": (SIDE, SIDE),
        "text": {"name": "features", "width": WIDTH, "length": WORDS},
        "text_drop": 0.0,
    }
    found["system"]["denoiser"] |= {"width": 8, "depth": 1, "heads": 1, "time_mlp": False}
    found["optimizer"] = {"name": "adamw", "schedule": {"name": "constant", "lr": 1e-3}}
    return found | {
        "batch": ROWS,
        "steps": 6,
        "log": {"every": 2},
        "checkpoint": {"every": 2, "keep": 2},
        "preview": {"every": 0, "count": ROWS},
        "nan": {"limit": 2} | nan,
    }


def counters(workdir):
    """What the newest checkpoint says of step, skipped and retries."""
    names = ("step", "skipped", "retries")
    wanted = {name: jax.ShapeDtypeStruct((), jnp.int32) for name in names}
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        found, _ = checkpoints.restore_newest(wanted, only=names)
    return tuple(int(found[name]) for name in names)


def named(message, records):
    """Whether a message says where, in which records, and what can be gone back to."""
    shown = ", ".join(map(str, records))
    return (
        f"step {STEP}: " in message
        and f"records {shown} " in message
        and ("last checkpoint: 2" in message)
    )


# F15; a loss, one gradient leaf, one row: test_step.py
@pytest.mark.thorough
def test_skip_leaves_the_step_out(devices, tmp_path, records, caplog):
    assert train(RunConfig.parse(config(records[5], doses=99, policy="skip")), tmp_path) == 0
    (warning,) = caplog.messages
    assert named(warning, records)
    assert counters(tmp_path) == (6, 0, 0)
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [2, 4, 6]
    assert all(np.isfinite(r["loss"]) for r in read_records(tmp_path / "metrics.jsonl"))


@pytest.mark.thorough
def test_stop_ends_the_run_with_what_a_user_needs(devices, tmp_path, records):
    with pytest.raises(NonFinite) as error:
        train(RunConfig.parse(config(records[5], doses=99, policy="stop")), tmp_path)
    assert isinstance(error.value, UserError) and named(str(error.value), records)
    assert str(error.value).startswith("ERROR [train] step 2: the loss or a gradient is not fin")
    assert "set config.nan.policy to skip or rollback." in str(error.value)
    assert counters(tmp_path)[0] == 2


@pytest.mark.thorough
@pytest.mark.parametrize("devices", [2], indirect=True)
def test_rollback_goes_back_and_on(devices, tmp_path, records, caplog):
    assert train(RunConfig.parse(config(records[5], doses=1, policy="rollback")), tmp_path) == 0
    warning, back = caplog.messages
    assert named(warning, records) and back == "rolled back to step 2, retry 1"
    assert counters(tmp_path) == (6, 0, 1)
    # the record of step 4 is that of the second try
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [2, 4, 6]


@pytest.mark.thorough
def test_rollback_gives_up_where_nothing_changes(devices, tmp_path, records, caplog):
    with pytest.raises(NonFinite) as error:
        train(RunConfig.parse(config(records[5], doses=99, policy="rollback")), tmp_path)
    assert [m for m in caplog.messages if m.startswith("rolled back")] == [
        "rolled back to step 2, retry 1",
        "rolled back to step 2, retry 2",
    ]
    assert named(str(error.value), records)
    assert "last checkpoint: 2, where the run has returned 2 times" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("on_spike", ["count", "rollback"])
def test_a_loss_that_leaps(devices, tmp_path, caplog, monkeypatch, on_spike):
    """F16: x 1000 at step 13, read with the window of 14; the checkpoint is that of 12 or 14."""

    class Leaping(Telemetry):
        doses = 1

        def read(self, **options):
            found = super().read(**options)
            for i, (step, loss, ids) in enumerate(self.losses):
                if step == 13 and Leaping.doses:
                    Leaping.doses -= 1
                    self.losses[i] = (step, 1000 * loss, ids)
            return found

    monkeypatch.setattr(clock, "Telemetry", Leaping)
    given = config(-1, doses=0, spike=20.0, on_spike=on_spike) | {"steps": 18}
    assert train(RunConfig.parse(given), tmp_path) == 0
    warning, *back = caplog.messages
    assert warning.startswith("step 13: the loss") and "1 in this launch" in warning
    assert back == (["rolled back to step 14, retry 1"] if on_spike == "rollback" else [])
    assert counters(tmp_path) == (18, 0, int(on_spike == "rollback"))
    records = read_records(tmp_path / "metrics.jsonl")
    assert {r["step"]: r.get("spikes") for r in records}[18] == 1


# ------------------------------------------------------------------------- the decision

BAD = [(7, np.arange(3)), (9, np.arange(3, 6))]


def test_too_many_refusals_in_a_row_end_a_run():
    faults = Faults(NanConfig(policy="skip", limit=3))
    assert not faults.go_back(BAD, refused=3, saved=None)
    with pytest.raises(NonFinite, match=r"4 updates in a row were refused.*config.nan.limit = 3"):
        faults.go_back(BAD, refused=4, saved=None)


def test_the_message_counts_steps_and_shortens_long_lists(caplog):
    Faults(NanConfig()).go_back([(7, np.arange(100)), *BAD], refused=1, saved=None)
    (message,) = caplog.messages
    assert "(3 such steps in this window; the update was not applied)" in message
    assert "records 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, ... were" in message
    assert message.endswith("last checkpoint: None")


def test_without_a_checkpoint_rollback_skips_and_says_so(caplog):
    assert not Faults(NanConfig(policy="rollback")).go_back(BAD, refused=1, saved=None)
    assert caplog.messages[-1] == "there is no checkpoint to go back to yet; the step is left out"


def test_returns_are_counted_for_each_checkpoint():
    faults = Faults(NanConfig(policy="rollback", limit=2))
    for saved in (10, 10, 20, 20, 30):
        assert faults.go_back(BAD, refused=1, saved=saved)
    assert faults.go_back(BAD, refused=1, saved=30)
    with pytest.raises(NonFinite, match="last checkpoint: 30, where the run has returned 2 times"):
        faults.go_back(BAD, refused=1, saved=30)


@pytest.mark.parametrize("fields", [{"policy": "ignore"}, {"policy": "skip", "limit": -1}])
def test_a_policy_that_is_none_is_refused(fields):
    with pytest.raises(UserError, match=r"config.nan: .* one of skip, stop, rollback and limit"):
        Faults(NanConfig(**fields))

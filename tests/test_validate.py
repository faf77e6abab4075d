"""Looking at a run before it: what is well, everything that is not, and nothing that is left."""

import dataclasses
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from jointseg_jax import chips, sharding, validate
from jointseg_jax.config import RunConfig
from jointseg_jax.perf import report
from jointseg_jax.perf.programs import Lowered
from jointseg_jax.training import goodput
from jointseg_jax.training.checkpoints import read_meta
from jointseg_jax.training.encode import encode
from jointseg_jax.training.encode_plan import EncodeOptions
from jointseg_jax.training.loop import train

ROOT, SIDE, ROWS = Path(__file__).parents[1], 16, 8


def config(**changes):
    """The quickstart, as small as it gets."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "configs/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.get_config("smoke").to_dict()
    scenes = {"name": "scenes", "size": SIDE, "count": 64, "thing_size": (0.5, 0.6)}
    found["data"] |= {"train": scenes | {"split": "train"}, "val": scenes | {"split": "val"}}
    found["system"]["size"] = (SIDE, SIDE)
    found["system"]["text"] |= {"width": 4, "length": 2}
    found["system"]["denoiser"] |= {"width": 8, "depth": 1, "heads": 1, "time_mlp": False}
    found["optimizer"] = {"name": "adamw", "schedule": {"name": "constant", "lr": 1e-3}}
    found |= {"batch": ROWS, "steps": 4, "log": {"every": 1}, "preview": {"every": 0, "count": 8}}
    return found | {"checkpoint": {"every": 2, "keep": 2}} | changes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 4 steps."""
    workdir = tmp_path_factory.mktemp("run")
    train_alone(workdir)
    return workdir


def train_alone(workdir):
    """On one device: all eight take many times as long to save."""
    with pytest.MonkeyPatch.context() as patch:
        one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
        patch.setattr(sharding, "make_mesh", one)
        assert train(RunConfig.parse(config()), workdir) == 0


def contents(folder):
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).digest())
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(validate, "present_devices", lambda: jax.devices()[:1])


def validated(given, workdir, **options):
    return validate.validate(given, str(workdir), **{"limit": 8} | options)


def steps_of(workdir):
    records = goodput.records(workdir / goodput.FILE)
    return [record.get("step", record.get("begin")) for record in records]


@pytest.mark.thorough
def test_the_loop_tells_where_its_time_went(run):
    found = goodput.summary(run)
    assert (found.step, found.launches, found.lost_steps, found.lost) == (4, 1, 0, 0)
    assert all(found.seconds[p] > 0 for p in ("start", "compile", "data", "step", "save"))
    assert found.seconds["evaluation"] == 0
    assert steps_of(run) == [0, 1, 2, 2, 3, 4, 4]  # the beginning, each log point, each save


@pytest.mark.slow
def test_a_run_that_lost_its_last_checkpoint_has_lost_those_steps(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    shutil.rmtree(workdir / "checkpoints/4")
    train_alone(workdir)
    found = goodput.summary(workdir)
    assert (found.step, found.launches, found.lost_steps) == (4, 2, 2) and found.lost > 0
    assert steps_of(workdir) == [0, 1, 2, 2, 3, 4, 4, 2, 3, 4, 4]


@pytest.mark.thorough
def test_a_run_that_can_go_on(run):
    before = contents(run)
    found = validated(config(steps=6), run, allow=["steps"])
    page = found.page()
    assert found.problems == [], page
    assert page.startswith("valid: this run can start; nothing was trained or written.")
    for said in (
        "6 steps of 8 rows",
        "8 of 64 records read, all good; 12 classes; sizes (width x height) 16x16 (8);",
        f"the run goes on from step 4 in {run}; 2 steps are left",
        "image uint8[16, 16, 3], labels int16[16, 16], text int32[2]",
        "data 1 x fsdp 1 x model 1 on 1 x cpu; 8 rows per data shard",
        "by the compiler's plan: state and batch",
        "fit, by name, shape and dtype",
        "2 checkpoints of",
    ):
        assert said in " ".join(page.split()), said
    assert contents(run) == before


@pytest.mark.thorough
def test_arrays_of_another_size_are_refused(run):
    meta, found = read_meta(run / "checkpoints"), validate.Findings()
    other = {"params": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)}}
    validate._arrays(meta, other, run, found)
    (text,) = found.problems
    assert "checkpoints/4 does not fit this model" in text
    assert "ema/denoiser/" in text and "saved, absent wanted" in text


@pytest.fixture
def damaged(tmp_path):
    """A folder of three pairs: one has a cut image, one a label that there is none of."""
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        for folder, shape in (("images", (SIDE, SIDE, 3)), ("annotations", (SIDE, SIDE))):
            path = tmp_path / f"data/{folder}/train/{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            high = 255 if folder == "images" else 2
            Image.fromarray(rng.integers(0, high, shape).astype(np.uint8)).save(path)
    cut = tmp_path / "data/images/train/b.png"
    cut.write_bytes(cut.read_bytes()[:-100])
    Image.fromarray(np.full((SIDE, SIDE), 37, np.uint8)).save(
        tmp_path / "data/annotations/train/c.png"
    )
    (tmp_path / "data/classes.json").write_text('{"classes": ["sky", "road"]}')
    return tmp_path / "data"


@pytest.mark.thorough
def test_everything_that_is_wrong_is_told_at_once(run, damaged):
    before = contents(run)
    given = config(ema=1.5, mesh=(3, 1, 1), batch=9)
    given["data"]["train"] = {"name": "folders", "root": str(damaged), "split": "train"}
    given["optimizer"]["schedule"] |= {"warmup": 100}
    page = validated(given, run).page()
    assert page.startswith("ERROR [validate] ")
    for said in (
        "config.ema = 1.5: must lie in [0, 1)",
        "config.steps = 4: the warm-up alone takes 100",
        "must be the number of devices, 1; for example (1, 1, 1)",
        f"ERROR [data] {damaged}/images/train/b.png: ",
        f"ERROR [data] {damaged}/annotations/train/c.png: ",
        "37",
        "(record 2 of 3)",
        "config.data.train: 2 bad among 3 records looked at",
        "facts.json: this workdir was trained on other classes or words",
        "12 classes, the data has 2: class 1 is 'hills' there and 'road' here",
        "the checkpoint of step 4",
        "ema: 0.9 -> 1.5",
        "What is well:",
        "data.val",
        "not looked at",
    ):
        assert said in " ".join(page.split()), said
    assert contents(run) == before


def test_an_encoded_data_set_is_read_whole(tmp_path):
    given, out = config(ema=2.0), tmp_path / "cache"  # refused, so that nothing is compiled
    options = EncodeOptions(out=out, latents=(), limit=4)
    encode(RunConfig.parse(config()), options, progress=functools.partial(tqdm, disable=True))
    given["data"] |= {"cache": str(out)}
    page = validated(given, tmp_path / "run").page()
    assert "4 encoded records read, none damaged" in page
    assert "8 of 64 records read, all good" in " ".join(page.split())  # the validation's
    (shard,) = out.glob("*-of-*.bin")
    shard.write_bytes(b"\7" + shard.read_bytes()[1:])
    given["data"] |= {"val": {"name": "folders", "root": "nowhere", "split": "val"}}
    page = " ".join(validated(given, tmp_path / "run").page().split())
    assert "the shard is damaged" in page
    assert "config.data.val.root = nowhere: there is no such folder" in page
    assert f"launch/encode.py --split=val --out={out} adds it" in page


def test_a_new_folder_is_not_made(tmp_path):
    found = validated(config(ema=2.0), tmp_path / "new/run")
    assert "the run starts at step 0" in " ".join(found.page().split())
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_does_not_fit_says_what_would_help():
    lowered = Lowered(program=None, mesh=(1, 1, 1), batch=8, flops=None, notes=())
    sizes = dict.fromkeys(("arguments", "outputs", "shared", "temporaries", "code"), 1.0)
    chip = dataclasses.replace(chips.CHIPS["v5e"], hbm=16.0)

    def found(peak, **fields):
        memory = None if peak is None else report.Memory(**sizes, peak=peak)
        made = report.Report(lowered=lowered, chip=chip, seconds=1.0, memory=memory, **fields)
        page = validate.Findings()
        validate._fits(made, "v5e:1x1", page)
        return page

    (text,) = found(20.0).problems
    assert text.startswith("config.batch: the update takes 20.00 GiB on each device, which has 16")
    assert "remat='full'" in text and "config.sharding zero1 or fsdp" in text
    (text,) = found(None, refusal="Ran out of memory").problems
    assert "does not fit" in text and text.endswith("The compiler says:\nRan out of memory")
    assert "(93.8%, tight)" in found(15.0).page() and found(15.0).problems == []
    assert "8.00 GiB of 16.00 GiB per device (50.0%)" in " ".join(found(8.0).page().split())


COMMAND = (sys.executable, "launch/train.py", "--config=configs/quickstart.py:smoke", "--validate")


def launched(*words):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 600}
    return subprocess.run([*COMMAND, *words], cwd=ROOT, **options)


@pytest.mark.thorough
def test_a_launch_that_finds_something_leaves_nothing(tmp_path):
    words = ("--config.ema=1.5", "--config.mesh=3,1,1", "--scan=4")
    done = launched(f"--workdir={tmp_path / 'run'}", *words)
    assert done.returncode == 2, done.stderr
    assert "config.ema = 1.5" in done.stderr and "the number of devices, 1;" in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("topology", [None, "v5e:2x2"])
def test_a_launch_that_finds_nothing(tmp_path, topology):
    if topology is not None:
        pytest.importorskip("libtpu")
    words = ("--config.optimizer.schedule.warmup=1", "--scan=4")
    words = (*words, *([f"--topology={topology}"] if topology else []))
    done = launched(f"--workdir={tmp_path / 'run'}", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("valid: this run can start")
    assert f"on {topology or '1 x cpu'};" in done.stdout and list(tmp_path.iterdir()) == []

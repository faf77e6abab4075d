"""The table of bad configs, C1 to C12: what is wrong, and the words that must say so.

Each row changes one thing of the quickstart. What the text says is asserted, and that nothing else
is said: one mistake makes one message.
"""

import copy
import functools
import importlib.util
import json
import os
import pickle
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.flax import save_file as save_flax
from safetensors.numpy import save_file

from jointseg_jax import cli, sharding
from jointseg_jax.check import checked
from jointseg_jax.config import Problems, RunConfig
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.training import resume
from jointseg_jax.training.step import check_batch
from jointseg_jax.types import UserError
from jointseg_jax.weights.convert import Entry, Layout, Table, read_safetensors, to_ours

ROOT = Path(__file__).parents[1]


@functools.cache
def loaded(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().to_dict()


def config(changes=(), name="quickstart"):
    """A config with other values, by path."""
    made = copy.deepcopy(loaded(name))
    for path, value in dict(changes).items():
        *way, last = path.split(".")
        node = made
        for step in way:
            node = node[step]
        node[last] = value
    return made


def mistakes_of(values, workdir=None):
    """Everything that is wrong, as texts."""
    return list(checked(values, workdir)[1])


FOLDERS = {"name": "folders", "split": "train", "layout": "voc"}
MASK, IMAGE = "system.streams.mask", "system.streams.image"

ROWS = [
    # C4: both numbers, and the nearest that is good
    (
        {"batch": 30, "mesh": (4, 1, 1)},
        "config.batch = 30: must be a multiple of data shards x accumulate = 4 x 1; the nearest "
        "is 32.",
    ),
    (
        {"batch": 12, "accumulate": 5},
        "config.batch = 12: must be a multiple of data shards x accumulate = 1 x 5; the nearest "
        "is 10.",
    ),
    # C5, as far as it goes without devices
    ({"mesh": (2, 4)}, "config.mesh = (2, 4): give three sizes ('data', 'fsdp', 'model')"),
    ({"mesh": (-1, -1, 1)}, "one of them may be -1."),
    ({"mesh": ("a", 1, 1)}, "config.mesh = ('a', 1, 1): give three sizes"),
    # C7: numbers
    (
        {f"{IMAGE}.tokens.patch": 5},
        f"config.{IMAGE}.tokens: Patches: 32x32 latent cells cannot be cut into patches of 5x5",
    ),
    (
        {f"{MASK}.codec": {"name": "bits", "bits": 3}},
        f"config.{MASK}.codec: bits: bits codec: bits = 3; it must be large enough for 13 codes "
        "and at most 16; 4 are enough.",
    ),
    (
        {
            "data.train": FOLDERS | {"root": ".", "layout": "coco_panoptic"},
            f"{MASK}.codec": {"name": "bits", "bits": 7},
        },
        "bits = 7; it must be large enough for 134 codes and at most 16; 8 are enough.",
    ),
    (
        {f"{MASK}.codec": {"name": "bits", "pool": 5}},
        f"config.{MASK}.codec: bits codec: a map of 32 x 32 pixels was given; both sides must be "
        "positive multiples of 5.",
    ),
    # C8: the path
    (
        {"data.train": FOLDERS | {"root": "/nowhere/voc"}},
        "config.data.train.root = /nowhere/voc: there is no such folder. Set "
        "--config.data.train.root=PATH.",
    ),
    (
        {"data.val": FOLDERS | {"root": str(ROOT / "README.md")}},
        "README.md: is no folder. Set --config.data.val.root=PATH.",
    ),
    (
        {"data.val": FOLDERS | {"root": "gs://bucket/voc"}},
        "config.data.val.root = gs://bucket/voc: is in a bucket, and data are read from folders of "
        "this machine. Mount it (gcsfuse), or copy it: pip install gcsfs, then python -c "
        "\"import gcsfs; gcsfs.GCSFileSystem().get('bucket/voc', 'DIR', recursive=True)\".",
    ),
    (
        {"start": {"workdir": "runs/none", "file": ""}},
        "config.start.workdir = runs/none: there is no such folder.",
    ),
    (
        {f"{MASK}.codec": {"name": "trained", "workdir": "runs/none"}},
        f"config.{MASK}.codec.workdir = runs/none: no trained run here (config.json is missing).",
    ),
    # C9: the names there are
    (
        {"data.train.name": "coco"},
        "config.data.train.name: 'coco' is unknown; one of: arrayrecord, folders, scenes, tfds.",
    ),
    (
        {"data.train": FOLDERS | {"root": ".", "layout": "pascal"}},
        "config.data.train.layout: 'pascal' is unknown; one of: folders, mmseg, voc,",
    ),
    (
        {"system.solver.name": "dpm_solver"},
        "config.system.solver.name: 'dpm_solver' is unknown (did you mean 'dpm_solver_pp'?); one "
        "of: ancestral, ddim, ddpm, ",
    ),
    (
        {f"{IMAGE}.process.schedule": {"name": "cosinus"}},
        f"config.{IMAGE}.process.schedule.name: 'cosinus' is unknown (did you mean 'cosine'?); "
        "one of: beta_linear, cosine, linear, scaled_linear.",
    ),
    (
        {"optimizer.schedule.name": "step"},
        "config.optimizer.schedule.name: 'step' is unknown; one of: constant, cosine, linear.",
    ),
    ({"optimizer.name": "adam"}, "'adam' is unknown (did you mean 'adamw'?); one of: adamw, muon."),
    ({"system.name": "join"}, "config.system.name: 'join' is unknown; one of: joint, bridge, auto"),
    (
        {"system.denoiser.name": "dit"},
        "config.system.denoiser.name: 'dit' is unknown; one of: two_stream, unet, uvit.",
    ),
    (
        {"system.times.name": "same"},
        "config.system.times.name: 'same' is unknown (did you mean 'shared'?); one of: ",
    ),
    ({"system.text.name": "clip"}, "config.system.text.name: 'clip' is unknown; one of: features"),
    ({f"{MASK}.codec.name": "bit"}, f"config.{MASK}.codec.name: 'bit' is unknown (did you mean"),
    ({"data.transforms": {"a": {"name": "crop"}}}, "config.data.transforms.a.name: 'crop' is unk"),
    ({"sharding": "zero3"}, "config.sharding = 'zero3' is unknown; one of: replicate, zero1, fsdp"),
    ({"nan.policy": "raise"}, "policy 'raise' must be one of skip, stop, rollback"),
    ({"data.bad": "drop"}, "config.data.bad = 'drop': one of: "),
    # C10: the key and what it may be
    ({"steps": 0}, "config.steps = 0: must be a whole number, 1 or more."),
    ({"batch": 0}, "config.batch = 0: must be a whole number, 1 or more."),
    ({"log.every": 0}, "config.log.every = 0: must be a whole number, 1 or more."),
    ({"checkpoint.keep": 0}, "config.checkpoint.keep = 0: must be a whole number, 1 or more."),
    ({"seed": 2**32 + 5}, "config.seed = 4294967301: must be a whole number, 0 to 4294967295."),
    ({"seed": -1}, "config.seed = -1: must be a whole number, 0 to 4294967295."),
    (
        {"system.text.seed": 2**32},
        "words: seed = 4294967296; it must be a whole number, 0 to 42949",
    ),
    ({"ema": 1.5}, "config.ema = 1.5: must lie in [0, 1)"),
    ({"ema": -0.1}, "config.ema = -0.1: must lie in [0, 1)"),
    (
        {"optimizer.schedule.lr": -1e-3},
        "config.optimizer: muon: schedule.lr -0.001 must be > 0 and schedule.warmup 100 >= 0.",
    ),
    ({"optimizer.b2": 1.0}, "config.optimizer: muon: b1, b2 = 0.9, 1.0 must lie in [0, 1)."),
    (
        {f"{MASK}.guidance": -2.0},
        f"config.{MASK}: stream: stream 'labels': weight=1.0, guidance=-2.0: must both be at least",
    ),
    ({"system.text_drop": 1.5}, "text_drop=1.5: must lie in [0, 1)"),
    ({"system.solver.steps": 0}, "config.system.solver: ancestral: solver: steps=0"),
    ({"system.size": (32,)}, "config.system.size = (32,): give (height, width) in pixels"),
    ({"system.denoiser.heads": 3}, "width: even and a multiple of heads=3; given 128"),
    (
        {f"{IMAGE}.process.weight": {"name": "min_snr", "gama": 5.0}},
        f"config.{IMAGE}.process.weight: min_snr has no field 'gama' (did you mean 'gamma'?)",
    ),
    (
        {f"{IMAGE}.process.weight": "min_snr"},
        f"config.{IMAGE}.process.weight = 'min_snr': give a mapping with `name`, one of: "
        "inverse_sigma, loss_of, min_snr, uniform; a stream's own weight stands beside `process`.",
    ),
]


@pytest.mark.parametrize(("changes", "said"), ROWS, ids=[text[:48] for _, text in ROWS])
def test_a_mistake_is_named_once_and_alone(changes, said):
    (text,) = mistakes_of(config(changes))
    assert said in text


@pytest.mark.parametrize("name", ["quickstart", "pdm", "pdm_given_maps", "semflow", "image_codec"])
def test_good_configs_have_none(name, tmp_path):
    assert mistakes_of(config(name=name), str(tmp_path / "new")) == []


def test_all_are_told_at_once():
    rows = [0, 5, 9, 16, 17, 21, 26, 33, 37]
    changes = {k: v for i in rows for k, v in ROWS[i][0].items()}
    with pytest.raises(UserError) as error:
        checked(config(changes))[1].raise_if_any()
    head, *lines = str(error.value).splitlines()
    assert head == f"ERROR [config] {len(rows)} problems:" and len(lines) == len(rows)
    for i in rows:
        assert ROWS[i][1] in str(error.value)
    assert Problems(["one"]).block() == "one"


def test_a_run_shorter_than_its_warm_up():
    (text,) = mistakes_of(config({"steps": 40}))
    assert text.startswith("config.steps = 40: the warm-up alone takes 100")
    assert "set config.steps to 100 or more" in text and "warmup to 40 or less" in text


def test_a_resumed_run_needs_no_weights_to_start_from(tmp_path):
    given = config({"start": {"workdir": "runs/none", "file": ""}})
    assert len(mistakes_of(given, str(tmp_path))) == 1
    (tmp_path / "checkpoints/7").mkdir(parents=True)
    assert mistakes_of(given, str(tmp_path)) == []


def test_paths_that_cannot_be_read_or_written(tmp_path):
    """C8."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (text,) = mistakes_of(config({"data.val": FOLDERS | {"root": str(loop)}}))
    assert f"{loop}: cannot be read (Too many levels of symbolic links)." in text
    (tmp_path / "file").write_text("")
    (text,) = mistakes_of(config(), str(tmp_path / "file/run"))
    assert f"{tmp_path / 'file'} is no folder. Choose another --workdir." in text
    (text,) = mistakes_of(config(), "gs://bucket/run")
    assert text.startswith("--workdir=gs://bucket/run: runs are written to a folder")


# ------------------------------------------------------------ C1, C2, C3: the command line


def override(*words):
    plain, found = cli.split_overrides(["train.py", "--config", "c.py", *words])
    assert plain == ["train.py", "--config", "c.py"]
    return [cli.mistake(o, {"config": ConfigDict(config())}) for o in found]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "--config.optimizer.schedule.lrr=1",
            "--config.optimizer.schedule.lrr: config.optimizer.schedule has no field 'lrr' (did "
            "you mean config.optimizer.schedule.lr?); its fields: lr, name, warmup.",
        ),
        ("--config.stepz=1", "config has no field 'stepz' (did you mean config.steps or "),
        ("--config.optim.lr=1", "config has no field 'optim' (did you mean config.optimizer?)"),
        ("--config.data.train.root=x", "config.data.train has no field 'root'; its fields: max"),
        ("--config.steps.x=1", "--config.steps.x: config.steps is 1400 (int) and has no fields."),
        ("--confog.steps=1", "--confog.steps=1: there is no flag --confog with fields."),
        (
            "--config.steps=1e4",
            "--config.steps=1e4: '1e4' is not a whole number (int), written in digits, as 10000.",
        ),
        ("--config.steps=many", "'many' is not a whole number (int), written in digits, as 1400."),
        ("--config.ema=x", "--config.ema=x: 'x' is not a number (float), as 0.995."),
        ("--config.system.denoiser.time_mlp=on", "'on' is not true or false."),
    ],
)
def test_overrides_that_are_wrong(word, said):
    (text,) = override(word)
    assert said in text


def test_overrides_that_are_right():
    words = ("--config.steps=7", "-config.ema=.5", "--noconfig.system.denoiser.time_mlp")
    assert override(*words, "--config.batch", "8", "--config.mesh=1,1,1") == [None] * 5


COMMAND = (sys.executable, "launch/train.py", "--config=configs/quickstart.py", "--workdir=runs/x")


@pytest.mark.thorough
def test_a_launch_tells_everything_before_jax_is_up():
    """No such platform: had jax looked for devices, it would have said so, with a traceback."""
    words = (
        *("config.lr=3", "stray", "--confg=1", "--config.stepz=3", "--config.steps=1e4"),
        *("--config.ema=1.5", "--config.system.solver.name=dpm", "--config.batch=0"),
    )
    before = os.times()
    done = subprocess.run(
        [*COMMAND, *words],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    after = os.times()
    assert done.returncode == 2, done.stderr
    for said in (
        "not understood: config.lr=3 stray. Overrides start with two dashes: --config.lr=3 stray.",
        "there is no flag --confg; did you mean --config?",
        "config has no field 'stepz'",
        "'1e4' is not a whole number (int)",
        "config.ema = 1.5: must lie in [0, 1)",
        "config.system.solver.name: 'dpm' is unknown",
        "config.batch = 0",
    ):
        assert said in done.stderr, said
    assert "Traceback" not in done.stderr and not (ROOT / "runs/x").exists()
    # of the processor, not of a clock that other processes hold up
    spent = sum(after[2:4]) - sum(before[2:4])
    assert spent < 6  # it takes 3 where nothing is compiled to bytecode yet


# --------------------------------------------------------- C4, C5: what the devices decide


def test_batch_and_mesh_against_the_devices():
    with pytest.raises(UserError) as error:
        sharding.make_mesh((3, 1, 1))
    assert "config.mesh = (3, 1, 1)" in str(error.value)
    assert "must be the number of devices, 8; for example (8, 1, 1)" in str(error.value)
    with pytest.raises(UserError, match=r"batch = 30: .* = 8 x 1; the nearest is 32"):
        check_batch(RunConfig.parse(config({"batch": 30})), sharding.make_mesh((-1, 1, 1)))


# ------------------------------------------------------------------ C6: another list of classes


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("sky", "car", "road"), "other classes: class 1 is 'road' there and 'car' here."),
        (("sky",), "2 classes, the data has 1: class 1 is 'road' there and absent here."),
        (("sea", "sky", "car"), "2 classes, the data has 3: class 0 is 'sky' there and 'sea' here"),
    ],
)
def test_other_classes_than_the_workdir_was_trained_on(tmp_path, names, said):
    if len(names) == 3 and names[0] == "sky":
        saved = ("sky", "road", "car")
    else:
        saved = ("sky", "road")
    path = tmp_path / "facts.json"
    path.write_text(DatasetInfo(Classes(names=saved), ("a",), ()).dump())
    resume.require_info(DatasetInfo(Classes(names=saved), ("a",), ("another",)), path)
    with pytest.raises(UserError) as error:
        resume.require_info(DatasetInfo(Classes(names=names), ("a",), ()), path)
    assert said in str(error.value) and str(path) in str(error.value)
    with pytest.raises(UserError, match="gives now: 1 words, the data has 2"):
        resume.require_info(DatasetInfo(Classes(names=saved), ("a", "b"), ()), path)


# ------------------------------------------------------- C11: pickles; C12: what a file holds


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth", ".safetensors"])
def test_a_pickle_is_refused_and_nothing_in_it_runs(tmp_path, suffix):
    path, sang = tmp_path / f"weights{suffix}", tmp_path / "sang"
    path.write_bytes(pickle.dumps(Canary(sang)))
    start = {"workdir": "", "file": str(path), "architecture": {"depth": 1}}
    (text,) = mistakes_of(config({"start": start}))
    with pytest.raises(UserError) as error:
        read_safetensors(path)
    assert text == str(error.value)
    assert f"{path} is a pickle (torch.save) file and is refused: pickle can run code" in text
    assert "Convert it where you trust it, with torch.load(FILE, weights_only=True)" in text
    assert not sang.exists()
    pickle.loads(path.read_bytes())
    assert sang.exists()  # it would have


def test_a_feature_file_that_hides_a_pickle_is_refused_too(tmp_path):
    from jointseg_jax.data.records import BadSample
    from jointseg_jax.data.sources.features import WithFeatures
    from jointseg_jax.data.sources.scenes import Scenes

    source = Scenes(size=16, count=1)
    name, sang = source[0]["id"], tmp_path / "sang"
    file = tmp_path / f"text/train/{name}.npy"
    file.parent.mkdir(parents=True)
    np.save(file, np.array([Canary(sang)], object), allow_pickle=True)
    made = WithFeatures(source=source, root=str(tmp_path), split="train", fields=("text",))
    with pytest.raises(BadSample, match="allow_pickle=False"):
        made[0]
    assert not sang.exists()


SAME = Layout(ours=lambda a: [a], theirs=lambda a: [a])
NAMES = tuple(f"w{i}" for i in range(8))
TABLE = Table(
    name="toy",
    entries=tuple(Entry(theirs=(n,), ours=(n,), layout=SAME) for n in NAMES),
    shapes=dict.fromkeys(NAMES, (2, 3)),
)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (
            dict.fromkeys(NAMES, (3, 2)),
            "8 of another shape (w0: given (3, 2), the model has (2, 3); w1: ",
        ),
        ({}, "8 missing (w0 (2, 3); w1 (2, 3); w2 (2, 3); w3 (2, 3); w4 (2, 3); ...)"),
        (
            dict.fromkeys((*NAMES, *(f"x{i}" for i in range(9))), (2, 3)),
            "9 left over (x0 (2, 3); x1 (2, 3); x2 (2, 3); x3 (2, 3); x4 (2, 3); ...)",
        ),
    ],
)
def test_differences_are_counted_and_the_first_five_shown(tmp_path, shapes, said):
    path = tmp_path / "w.safetensors"
    save_file({n: np.zeros(s, np.float32) for n, s in shapes.items()}, path)
    with pytest.raises(UserError) as error:
        to_ours(read_safetensors(path), TABLE)
    assert said in str(error.value)
    assert str(error.value).count(";") <= 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_floats_that_are_read(tmp_path, dtype):
    path = tmp_path / "w.safetensors"
    save_flax({n: jnp.full((2, 3), 1.5, dtype) for n in NAMES}, path)
    read = to_ours(read_safetensors(path), TABLE)
    assert all(a.dtype == np.float32 and (a == 1.5).all() for a in read.values())


def raw(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_files_that_are_no_safetensors_inside(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(UserError, match=r"not a whole safetensors file: .*header too large"):
        read_safetensors(path)
    raw(path, {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}, b"\0" * 4)
    with pytest.raises(UserError, match=r"not a whole safetensors file: .*invalid shape"):
        read_safetensors(path)
    raw(path, {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, b"\0" * 4)
    with pytest.raises(UserError, match=r"holds tensors of a dtype .*float8.*bfloat16 and int"):
        read_safetensors(path)


def test_looking_takes_no_time():
    start = time.process_time()
    mistakes_of(config({k: v for changes, _ in ROWS[:6] for k, v in changes.items()}))
    assert time.process_time() - start < 0.5  # it takes 0.03

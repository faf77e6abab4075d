"""Trained codecs copied into another run's workdir; no training here, only what a run leaves."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jointseg_jax import build, rules
from jointseg_jax.config import SystemConfig, plain
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.training import pretrained, workdir
from jointseg_jax.training import state as states
from jointseg_jax.training.checkpoints import Checkpoints
from jointseg_jax.training.workdir import load_codecs
from jointseg_jax.types import UserError


def system_config(values):
    return SystemConfig.parse(values["system"])


NAMES = ("sky", "road", "car")
SIZE = (8, 8)
CODEC = {
    "name": "label_ae",
    "widths": (4, 4),
    "middle_width": 4,
    "up_widths": (4,),
    "groups": 2,
    "latent_channels": 2,
}
NOISE = {"predicts": "noise", "schedule": {"name": "cosine"}}


def facts(names=NAMES):
    return DatasetInfo(Classes(names=names), (), ())


def leave(workdir, config, known, params, ema=None):
    """Makes ``workdir`` what a run of ``config`` leaves behind."""
    workdir.mkdir(parents=True, exist_ok=True)
    data = {"train": {"name": "scenes"}, "val": {"name": "scenes"}}
    config = {"steps": 1, "batch": 1, "optimizer": {}, "data": data} | config
    (workdir / "config.json").write_text(json.dumps(plain(config)))
    (workdir / "facts.json").write_text(known.dump())
    everything = jax.tree.map(lambda _: True, params)
    state = states.create(params, everything, optax.identity())
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, state.replace(ema=params if ema is None else ema), {})


def parameters(system, seed=0):
    """Some parameters, without compiling the network's own."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes)


def codec_run(workdir, *, names=NAMES, seed=0, **changes):
    """A codec's workdir and its averaged parameters."""
    system = {"name": "autoencode", "size": SIZE, "codec": CODEC | changes}
    known = facts(names)
    made = build.system(SystemConfig.parse(system), known)
    params, ema = parameters(made, seed), parameters(made, seed + 1000)
    leave(workdir, {"system": system}, known, params, ema)
    return ema


def joint_config(codec_workdir, **changes):
    codec = {"name": "trained", "workdir": str(codec_workdir), **changes}
    mask = {"field": "labels", "codec": codec, "process": NOISE, "tokens": {"patch": 1}}
    denoiser = {"name": "uvit", "width": 8, "depth": 1, "heads": 1, "time_tokens": ("mask",)}
    system = {
        "name": "joint",
        "size": SIZE,
        "streams": {"mask": mask},
        "denoiser": denoiser,
        "times": {"name": "shared"},
        "solver": {"name": "euler", "steps": 2},
    }
    return {"system": system}


def batches(count=20, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"labels": rng.integers(-1, len(NAMES), (4, *SIZE)).astype(np.int16)}


def unread():
    raise AssertionError("batches were read, and nothing is to be fitted")
    yield


def same(got, want):
    assert rules.paths(got) == rules.paths(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """A codec's workdir, to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "codec"
    codec_run(folder)
    return folder


def test_only_trained_codecs_are_gathered(tmp_path, codec):
    config = joint_config(codec)
    streams = config["system"]["streams"]
    streams["image"] = streams["mask"] | {"codec": {"name": "pixels"}}
    assert list(system_config(config).trained_codecs()) == ["mask"]
    assert SystemConfig.parse({"name": "autoencode"}).trained_codecs() == {}
    streams.pop("mask")
    pretrained.import_codecs(tmp_path, system_config(config), facts(), unread())
    assert not list(tmp_path.iterdir())
    assert load_codecs(tmp_path, system_config(config)) == ({}, {})


def test_the_averaged_parameters_and_the_fields_are_copied(tmp_path):
    ema, config = codec_run(tmp_path / "codec"), joint_config(tmp_path / "codec")
    pretrained.import_codecs(tmp_path / "joint", system_config(config), facts(), unread())
    specs, params = load_codecs(tmp_path / "joint", system_config(config))
    same(params["mask"], ema)
    assert specs == {"mask": plain(CODEC)}
    assert sorted(p.name for p in (tmp_path / "joint/frozen").iterdir()) == [
        "mask.json",
        "mask.safetensors",
    ]


@pytest.mark.thorough
def test_codecs_are_gathered_once(tmp_path):
    ema, config = codec_run(tmp_path / "codec"), joint_config(tmp_path / "codec", scale="fit")
    pretrained.import_codecs(tmp_path / "joint", system_config(config), facts(), batches())
    before = (tmp_path / "joint/frozen/mask.json").read_bytes()
    shutil.rmtree(tmp_path / "codec")
    codec_run(tmp_path / "codec", seed=1)  # trained anew meanwhile
    pretrained.import_codecs(tmp_path / "joint", system_config(config), facts(), unread())
    assert (tmp_path / "joint/frozen/mask.json").read_bytes() == before
    same(load_codecs(tmp_path / "joint", system_config(config))[1]["mask"], ema)


# ------------------------------------------------------------------------------- scale


@pytest.mark.thorough
def test_the_scale_is_the_codecs_own_unless_another_is_given(tmp_path):
    codec_run(tmp_path / "codec", scale=0.7)
    scales = {}
    for name, changes in {"own": {}, "given": {"scale": 0.3}}.items():
        config = joint_config(tmp_path / "codec", **changes)
        pretrained.import_codecs(tmp_path / name, system_config(config), facts(), unread())
        scales[name] = load_codecs(tmp_path / name, system_config(config))[0]["mask"]["scale"]
    assert scales == {"own": 0.7, "given": 0.3}


@pytest.mark.thorough
@pytest.mark.parametrize("latent", ["mode", "sample"])
def test_a_fitted_scale_makes_latents_of_unit_deviation(tmp_path, latent):
    codec_run(tmp_path / "codec", latent=latent, scale=0.7)
    config = joint_config(tmp_path / "codec", scale="fit")
    pretrained.import_codecs(tmp_path / "joint", system_config(config), facts(), batches())
    specs, params = load_codecs(tmp_path / "joint", system_config(config))
    made = build.codec(specs["mask"], facts(), "mask")
    first = np.concatenate([b["labels"] for b in itertools.islice(batches(), 8)])
    # float32: another batch size is another program
    assert float(np.std(made.encode(params["mask"], first))) == pytest.approx(1.0, abs=1e-5)


# ------------------------------------------------------------------------- independence


@pytest.mark.thorough
def test_a_joint_workdir_works_without_the_codecs(tmp_path):
    ema, config = codec_run(tmp_path / "codec"), joint_config(tmp_path / "codec", scale=0.3)
    joint = tmp_path / "joint"
    pretrained.import_codecs(joint, system_config(config), facts(), unread())
    specs, _ = load_codecs(joint, system_config(config))
    system = build.system(system_config(config), facts(), specs)
    leave(joint, config, facts(), parameters(system))
    shutil.rmtree(tmp_path / "codec")
    joint.rename(tmp_path / "elsewhere")
    run = workdir.load_run(tmp_path / "elsewhere")
    same(run.frozen["mask"], ema)
    assert run.system.streams["mask"].codec == system.streams["mask"].codec
    assert run.system.streams["mask"].codec.scale == 0.3
    assert (run.step, run.info) == (1, facts())
    rows = next(batches())
    keys = jax.random.split(jax.random.key(0), 4)
    loss, _ = jax.jit(run.system.loss)(run.params, run.frozen, rows, keys)
    assert np.isfinite(loss)


# ------------------------------------------------------------------------------ refusals


@pytest.fixture
def gathered(tmp_path, codec):
    config = joint_config(codec)
    pretrained.import_codecs(tmp_path, system_config(config), facts(), unread())
    return tmp_path, config


def test_a_changed_file_is_refused(gathered):
    workdir, config = gathered
    file = workdir / "frozen/mask.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"mask.safetensors: missing or not the file that mask.js"):
        load_codecs(workdir, system_config(config))


def test_a_lost_file_is_named(gathered):
    workdir, config = gathered
    (workdir / "frozen/mask.safetensors").unlink()
    with pytest.raises(UserError, match=r"mask.safetensors: missing"):
        load_codecs(workdir, system_config(config))
    (workdir / "frozen/mask.json").unlink()
    with pytest.raises(UserError, match=r"mask.json: missing; the workdir lost its codec. Copy it"):
        load_codecs(workdir, system_config(config))


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            NAMES[:2],
            "was trained on 3 classes, the data has 2: class 2 is 'car' there and absent here. "
            "Train the codec on this data.",
        ),
        (
            ("sky", "water", "car"),
            "other classes: class 1 is 'road' there and 'water' here. Train the codec",
        ),
        (
            ("road", "sky", "car"),
            "other classes: class 0 is 'sky' there and 'road' here. Train the codec",
        ),
    ],
)
def test_a_codec_of_other_classes_is_refused(tmp_path, codec, names, said):
    with pytest.raises(UserError) as error:
        pretrained.import_codecs(
            tmp_path, system_config(joint_config(codec)), facts(names), unread()
        )
    assert said in str(error.value)
    assert str(error.value).startswith(f"config.system.streams.mask.codec: {codec} ")
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_no_codecs_is_refused(tmp_path):
    config = joint_config("elsewhere")
    config["system"]["streams"]["mask"]["codec"] = {"name": "bits"}
    system = build.system(system_config(config), facts())
    leave(tmp_path / "joint", config, facts(), parameters(system))
    said = "joint holds a `joint` run of labels; a codec of labels comes from an `auto"
    with pytest.raises(UserError, match=said):
        pretrained.import_codecs(
            tmp_path, system_config(joint_config(tmp_path / "joint")), facts(), unread()
        )


def test_a_workdir_that_is_none_says_how_to_make_one(tmp_path):
    with pytest.raises(
        UserError, match=r"absent: no trained run here .*Train one: launch/train.py"
    ):
        pretrained.import_codecs(
            tmp_path, system_config(joint_config(tmp_path / "absent")), facts(), unread()
        )


def test_a_codec_that_saved_nothing_yet_is_refused(tmp_path, codec):
    shutil.copytree(codec, tmp_path / "young", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(UserError, match="young: the run has no checkpoint yet"):
        pretrained.import_codecs(
            tmp_path, system_config(joint_config(tmp_path / "young")), facts(), unread()
        )

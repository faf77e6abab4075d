"""Splits encoded once: the rows are what training would have encoded, and train as well."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jointseg_jax import build, sharding
from jointseg_jax.config import ReadConfig, RunConfig, SystemConfig, from_plain, plain
from jointseg_jax.data.cached.reader import Cache
from jointseg_jax.data.pipeline import batches, evaluation_batches
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.data.transforms import Flip
from jointseg_jax.perf import abstract, bench_input
from jointseg_jax.perf.harness import BenchConfig
from jointseg_jax.systems.system import LATENTS
from jointseg_jax.training import loop, pretrained
from jointseg_jax.training import state as states
from jointseg_jax.training.checkpoints import Checkpoints
from jointseg_jax.training.encode import encode
from jointseg_jax.training.encode_plan import EncodeOptions
from jointseg_jax.training.workdir import load_codecs
from jointseg_jax.types import UserError

READ = ReadConfig()

parsed = RunConfig.parse


def system_config(values):
    return SystemConfig.parse(values["system"])


SIZE, RECORDS = (8, 8), 10
CODEC = {
    "name": "label_ae",
    "widths": (4, 4),
    "middle_width": 4,
    "up_widths": (4,),
    "groups": 2,
    "latent_channels": 2,
}
NOISE = {"predicts": "noise", "schedule": {"name": "cosine"}}
SCENES = {"name": "scenes", "size": 8, "thing_size": (0.5, 0.6), "count": RECORDS}


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """What a run of a codec leaves behind."""
    return codec_run(tmp_path_factory.mktemp("runs") / "codec")


def codec_run(workdir, seed=0):
    workdir.mkdir()
    system = {"name": "autoencode", "size": SIZE, "codec": CODEC}
    known = DatasetInfo(Scenes().classes, (), ())
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(build.system(SystemConfig.parse(system), known).init, jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes)
    data = {"train": SCENES, "val": SCENES}
    config = plain({"steps": 1, "batch": 1, "optimizer": {}, "data": data, "system": system})
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "facts.json").write_text(known.dump())
    state = states.create(params, jax.tree.map(lambda _: True, params), optax.identity())
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {})
    return workdir


@pytest.fixture(scope="module")
def config(codec):
    """A run of images and label latents, with a flip."""
    tokens = {"patch": 4}
    trained = {"name": "trained", "workdir": str(codec), "scale": "fit"}
    streams = {
        "image": {"field": "image", "codec": {"name": "pixels"}, "process": NOISE},
        "mask": {"field": "labels", "codec": trained, "process": NOISE},
    }
    return {
        "seed": 0,
        "steps": 2,
        "batch": 8,
        "ema": 0.9,
        "mesh": (-1, 1, 1),
        "sharding": "replicate",
        "log": {"every": 2},
        "preview": {"every": 0, "count": 8},
        "checkpoint": {"every": 2, "keep": 1},
        "data": {
            "train": SCENES | {"split": "train"},
            "val": SCENES | {"split": "val"},
            "transforms": {"flip": {"name": "flip", "probability": 0.5}},
        },
        "system": {
            "name": "joint",
            "size": SIZE,
            "streams": {k: s | {"tokens": tokens} for k, s in streams.items()},
            "denoiser": {
                "name": "uvit",
                "width": 8,
                "depth": 1,
                "heads": 1,
                "time_tokens": ("image",),
            },
            "text": {"name": "words", "width": 4, "length": 5},
            "times": {"name": "shared"},
            "solver": {"name": "euler", "steps": 1},
        },
        "optimizer": {"name": "adamw", "schedule": {"name": "constant", "lr": 1e-3}},
    }


def options(out, **changes):
    shard = 3 * 2 * 300  # three records, each twice
    return EncodeOptions(**{"out": out, "dtype": "float32", "batch": 1, "shard": shard} | changes)


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """A finished cache, to be read only, and what was said of it."""
    out, said = tmp_path_factory.mktemp("caches") / "made", []
    report = encode(parsed(config), options(out), progress=Bar, show=said.append)
    return out, report, said[0]


class Bar:
    """Counts what it is told."""

    def __init__(self, total, desc):
        self.left, self.desc = total, desc

    def update(self, count):
        self.left -= count

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        assert kind or self.left == 0


def cached(config, out):
    return config | {"data": config["data"] | {"cache": str(out)}}


def read(config, out):
    source = build.source(parsed(cached(config, out)), "train")
    tokenizer = build.tokenizer(system_config(config), source.words())
    with batches(
        source,
        READ,
        batch=8,
        seed=0,
        transforms=build.transforms(parsed(config).data),
        tokenizer=tokenizer.encode,
    ) as found:
        return next(found)


def raw(config, batch):
    """The fields of the same records, read from the source and mirrored as in the batch."""
    source, rng = build.source(parsed(config), "train"), np.random.default_rng(0)
    rows = {"image": [], "labels": []}
    for index, image in zip(batch["index"], batch["image"]):
        records = [
            Flip(probability=p).for_classes(source.classes)(source[int(index)], rng, True)
            for p in (0.0, 1.0)
        ]
        (found,) = [r for r in records if np.array_equal(r["image"], image)]
        rows["image"].append(found["image"])
        rows["labels"].append(found["labels"])
    return {k: np.stack(v) for k, v in rows.items()} | {"text": batch["text"]}


@pytest.mark.thorough
def test_what_is_kept_and_said(made):
    out, report, said = made
    assert report["fields"] == {
        "latents/mask": "float32[4, 4, 2]",
        "image": "uint8[8, 8, 3]",
        "text": "int32[5]",
    }
    assert (report["records"], report["rows"], report["shards_kept"]) == (10, 20, 0)
    assert report["bytes"] == sum(
        p.stat().st_size for p in (*out.glob("*.bin"), *out.glob("*.npy"))
    )
    assert "10 records, 1 crop, each also mirrored" in said
    assert "image: kept as `image`; its codec is applied in each step" in said


@pytest.mark.thorough
def test_a_batch_is_the_codecs_own_encoding_of_the_same_records(config, made):
    out = made[0]
    batch = read(config, out)
    assert set(batch) == {LATENTS + "mask", "image", "text", "index"}
    specs, params = load_codecs(out, system_config(config))
    system = build.system(
        system_config(config), DatasetInfo.of(build.source(parsed(config), "train")), specs
    )
    keys = jax.random.split(jax.random.key(1), 8)
    batch, plain = jax.device_put((batch, raw(config, batch)))
    got, want = (system.encode({}, params, b, keys) for b in (batch, plain))
    np.testing.assert_array_equal(got["image"], want["image"])
    # float32: one batch is compiled as a whole, the other is not
    np.testing.assert_allclose(got["mask"], want["mask"], rtol=1e-5, atol=1e-6)
    weights = jax.eval_shape(system.init, jax.random.key(0))
    loss, _ = jax.eval_shape(system.loss, weights, params, batch, keys)
    assert loss.shape == ()


@pytest.mark.thorough
def test_a_stopped_encoding_goes_on_to_the_same_bytes(config, made, tmp_path):
    out = tmp_path / "again"

    class Stopped(Bar):
        def update(self, count):
            super().update(count)
            if self.desc.startswith("encoding") and len(list(out.glob("*.bin"))) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(parsed(config), options(out), progress=Stopped)
    with pytest.raises(UserError, match="the cache is not finished"):
        build.source(parsed(cached(config, out)), "train")
    assert encode(parsed(config), options(out), progress=Bar)["shards_kept"] == 2
    names = sorted(p.name for p in out.iterdir() if p.is_file())
    assert names == sorted(p.name for p in made[0].iterdir() if p.is_file())
    assert all((out / n).read_bytes() == (made[0] / n).read_bytes() for n in names)


@pytest.mark.thorough
def test_other_settings_are_refused_by_name(config, made):
    out = made[0]
    with pytest.raises(
        UserError, match=r"other settings, 4 fields:\n  crops: 1 -> 2\n(.*\n)*  variants: 2 ->"
    ):
        encode(parsed(config), options(out, crops=2), progress=Bar)
    data = config["data"] | {"transforms": {}}
    with pytest.raises(UserError) as error:
        build.source(parsed(cached(config | {"data": data}, out)), "train")
    said = (
        "this cache was made with other settings, 3 fields:\n  transforms: (absent) -> {}\n"
        '  transforms/flip/name: "flip" -> (absent)\n'
        "  transforms/flip/probability: 0.5 -> (absent)\nPut these back, or run"
    )
    assert said in str(error.value)


@pytest.mark.thorough
def test_a_codec_that_was_trained_on_is_refused(config, made, codec, tmp_path):
    known = DatasetInfo.of(build.source(parsed(config), "train"), captions=0)
    pretrained.check_unchanged(made[0], system_config(config), known)
    other = json.loads(json.dumps(config))
    other["system"]["streams"]["mask"]["codec"]["workdir"] = str(codec_run(tmp_path / "on", seed=1))
    with pytest.raises(UserError, match="on was trained on since"):
        encode(parsed(from_plain(other)), options(made[0]), progress=Bar)


@pytest.mark.thorough
def test_the_step_that_reads_latents_is_known_by_the_index_alone(config, made, tmp_path):
    (tmp_path / "frozen").mkdir()
    for name in ("train.json", "frozen/mask.json"):
        shutil.copy(made[0] / name, tmp_path / name)
    here = from_plain(json.loads(json.dumps(cached(config, tmp_path))))
    here["system"]["streams"]["mask"]["codec"] |= {"workdir": str(tmp_path / "nowhere")}
    known = abstract.dataset_info(parsed(here))
    assert known == DatasetInfo.of(
        build.source(parsed(cached(config, made[0])), "train"), captions=0
    )
    found = abstract.codecs(parsed(here), known)
    system = build.system(system_config(here), known, found.specs)
    real = sharding.global_batch(read(config, made[0]), sharding.make_mesh((8, 1, 1)))
    expected = abstract.training_shapes(parsed(here), system, 8)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }
    unmade = here | {"data": config["data"]}
    assert LATENTS + "mask" not in abstract.training_shapes(parsed(unmade), system, 8)
    planned = abstract.training_shapes(parsed(unmade), system, 8, found.frozen)
    assert {k: v.shape for k, v in planned.items()} == {k: v.shape for k, v in expected.items()}
    with pytest.raises(UserError, match=r"1 field:\n  size: \[8, 8\] -> \[16, 16\]"):
        abstract.dataset_info(parsed(here | {"system": here["system"] | {"size": (16, 16)}}))


@pytest.mark.thorough
def test_the_input_benchmark_reads_the_cache(config, made):
    job = bench_input.Input(
        BenchConfig(what="data", name="made", config=cached(config, made[0]), step_ms=1.0)
    )
    try:
        medians = {name: action.run(2) for name, action in job.actions.items()}
        assert set(medians) == {"batch", "wait"}
        assert job.after(medians)["cached_samples_per_second"] > 0
    finally:
        job.close()


@pytest.mark.thorough
def test_processes_that_read_change_nothing(config, made, tmp_path):
    encode(parsed(config), options(tmp_path, workers=1, threads=1), progress=Bar)
    names = [p.name for p in made[0].iterdir() if p.is_file()]
    assert all((tmp_path / n).read_bytes() == (made[0] / n).read_bytes() for n in names)


@pytest.mark.thorough
def test_validation_comes_from_the_cache_as_it_would_from_the_data(config, made, tmp_path):
    out = shutil.copytree(made[0], tmp_path / "cache")
    assert build.source(parsed(cached(config, out)), "val").name == "scenes"
    report = encode(parsed(config), options(out, split="val", limit=6), progress=Bar)
    kept = {"image": "uint8[8, 8, 3]", "labels": "int8[8, 8]", "text": "int32[5]"}
    assert (report["fields"], report["rows"]) == (kept, 6)
    here = cached(config, out)
    assert isinstance(build.source(parsed(here), "val"), Cache)
    read = []
    for given in (here, config):
        source = build.source(parsed(given), "val")
        tokenizer = build.tokenizer(system_config(config), source.words()).encode
        transforms = build.evaluation_transforms(parsed(config | {"evaluate": {"transforms": {}}}))
        with evaluation_batches(
            source, READ, batch=4, limit=6, transforms=transforms, tokenizer=tokenizer
        ) as found:
            read.append(list(found))
    for got, want in zip(*read, strict=True):
        assert set(got) == set(want)
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], strict=True)
    own = here | {"evaluate": {"transforms": {"resize": {"name": "resize", "size": 16}}}}
    assert build.source(parsed(own), "val").name == "scenes"
    with pytest.raises(UserError, match=r"config.evaluate.transforms give evaluation a size of it"):
        encode(parsed(own), options(tmp_path / "other", split="val"), progress=Bar)
    with pytest.raises(UserError, match="--split=val: all that its records have is kept"):
        options(out, split="val", keep=("labels",))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_the_nearest_and_takes_half_the_space(config, made, tmp_path, dtype):
    report = encode(parsed(config), options(tmp_path, dtype=dtype, limit=4, crops=0), progress=Bar)
    assert report["fields"]["latents/mask"] == f"{dtype}[4, 4, 2]" and report["records"] == 4
    fine, coarse = (build.source(parsed(cached(config, o)), "train") for o in (made[0], tmp_path))
    rows = [source.gather(np.arange(4))[LATENTS + "mask"] for source in (fine, coarse)]
    np.testing.assert_array_equal(rows[0].astype(jnp.dtype(dtype)), rows[1], strict=True)


@pytest.mark.thorough
def test_a_codec_that_draws_is_not_kept_as_latents(config, tmp_path):
    drawing = json.loads(json.dumps(config))
    drawing["system"]["streams"]["mask"]["codec"] |= {"latent": "sample"}
    drawing = from_plain(drawing)
    report = encode(parsed(drawing), options(tmp_path / "a", limit=2), progress=Bar)
    kept = {"image": "uint8[8, 8, 3]", "labels": "int8[8, 8]", "text": "int32[5]"}
    assert report["fields"] == kept
    with pytest.raises(UserError, match="--latents=mask: this codec draws its latents anew"):
        encode(parsed(drawing), options(tmp_path / "b", latents=("mask",)), progress=Bar)
    with pytest.raises(
        UserError, match="--latents=maks: no codec encodes that; one of: image, mask"
    ):
        encode(parsed(config), options(tmp_path / "c", latents=("maks",)), progress=Bar)


def test_a_run_that_trains_its_codec_is_refused(config, tmp_path):
    system = {"name": "autoencode", "size": SIZE, "codec": CODEC}
    with pytest.raises(UserError, match="a system `autoencode` trains its own codec"):
        encode(parsed(config | {"system": system}), options(tmp_path), progress=Bar)


@pytest.mark.thorough
def test_the_codec_of_the_cache_is_taken_and_no_other(config, made, tmp_path):
    out = shutil.copytree(made[0], tmp_path / "cache")
    here = cached(config, out)
    pretrained.from_cache(tmp_path / "run", system_config(here), str(out))
    pretrained.from_cache(tmp_path / "run", system_config(here), str(out))
    for name in ("mask.json", "mask.safetensors"):
        same = [(folder / "frozen" / name).read_bytes() for folder in (out, tmp_path / "run")]
        assert same[0] == same[1]
    record = json.loads((out / "frozen/mask.json").read_text())
    record["codec"]["scale"] *= 2
    (out / "frozen/mask.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"this workdir has another codec than .*cache was encoded"):
        pretrained.from_cache(tmp_path / "run", system_config(here), str(out))
    (out / "frozen/mask.json").unlink()
    with pytest.raises(UserError, match=r"mask.json: missing; the cache lost its codec. Copy it"):
        pretrained.from_cache(tmp_path / "run", system_config(here), str(out))


@pytest.mark.slow
def test_a_run_trains_and_goes_on_from_the_cache_alone(config, made, tmp_path, caplog):
    caplog.set_level(logging.INFO, "jointseg_jax")
    moved = from_plain(json.loads(json.dumps(config)))
    moved["system"]["streams"]["mask"]["codec"]["workdir"] = str(tmp_path / "nowhere")
    moved = cached(moved, made[0])
    for name, steps in (("straight", 4), ("stopped", 2), ("stopped", 4)):
        given = moved | {"steps": steps}
        assert loop.train(parsed(given), tmp_path / name, allow=("^steps$",)) == 0
    done = [r.getMessage() for r in caplog.records if r.getMessage().startswith("done: step 4")]
    assert len(done) == 2 and len({line.split("digest ")[1].split(",")[0] for line in done}) == 1

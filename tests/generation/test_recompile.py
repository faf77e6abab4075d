"""The sampler is compiled once, whatever the number of pairs."""

import functools

import jax
import numpy as np
import pytest

from jointseg_jax import sharding
from jointseg_jax.build import DISTRIBUTIONS, SOLVERS, TIMES
from jointseg_jax.codecs.bits import Bits
from jointseg_jax.codecs.pixels import Pixels
from jointseg_jax.config import RunConfig
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.generation.sampler import make_sampler, one_ahead, pending_batches
from jointseg_jax.models.text import Features
from jointseg_jax.models.uvit import UViT
from jointseg_jax.systems.joint import Joint
from jointseg_jax.systems.system import Stream
from jointseg_jax.training.workdir import Run
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import Cosine

SIDE, ROWS, WORDS = 4, 4, 2


@pytest.fixture
def system():
    """An image and its map in one block."""
    codecs = {"image": Pixels(), "mask": Bits(classes=3)}
    specs = {
        k: {"kind": "patches", "grid": (SIDE, SIDE), "channels": c.latent_shape((4, 4))[2]}
        for k, c in codecs.items()
    }
    process = Process(schedule=Cosine(), predicts="velocity")
    return Joint(
        streams={
            "image": Stream(field="image", codec=codecs["image"], process=process, guidance=2.0),
            "mask": Stream(field="labels", codec=codecs["mask"], process=process, guidance=2.0),
        },
        denoiser=UViT(
            streams={k: v | {"patch": 2} for k, v in specs.items()},
            time_tokens=("image",),
            context={"kind": "tokens", "count": WORDS, "width": 4},
            width=8,
            depth=1,
            heads=1,
        ),
        times=TIMES["shared"](distribution=DISTRIBUTIONS["uniform"]()),
        solver=SOLVERS["dpm_solver_pp"](steps=2, order=1),
        size=(SIDE, SIDE),
        text=Features(width=4, length=WORDS),
    )


CONFIG = RunConfig.parse(
    {
        "steps": 1,
        "batch": 1,
        "optimizer": {},
        "data": {"train": {}, "val": {}},
        "system": {"name": "joint", "size": (SIDE, SIDE)},
    }
)


@pytest.mark.thorough
def test_a_short_last_batch_compiles_nothing(system, tmp_path, monkeypatch, compilations):
    one = functools.partial(sharding.make_mesh, (-1, 1, 1), jax.devices()[:1])
    monkeypatch.setattr(sharding, "own_mesh", one)
    params = jax.jit(system.init)(jax.random.key(0))
    known = DatasetInfo(Classes(names=("a", "b", "c")), (), ())
    run = Run(tmp_path, CONFIG, known, system, params, frozen={}, step=0, digest="")
    sampler = make_sampler(run, system, per_device=ROWS)
    text = np.ones((3, WORDS, 4), np.float32)
    compilations.clear()

    def made(seed, start, stop):
        pending = pending_batches(start, stop, sampler.batch_size)
        started = ((b, sampler(seed, b.indices, text[b.indices % 3], {})) for b in pending)
        for batch, pairs in one_ahead(started):
            yield len(batch.indices[batch.needed]), len(np.asarray(pairs["labels"])[batch.needed])

    straight = made(0, 0, 2 * ROWS + 3)
    first = next(straight)
    assert compilations.count("jit(sample_batch)") == 1
    compilations.clear()
    assert [first, *straight] == [(ROWS, ROWS), (ROWS, ROWS), (3, 3)]
    assert [n for n, _ in made(7, ROWS + 1, 2 * ROWS + 1)] == [ROWS - 1, 1]
    assert compilations == []
    sampler(0, np.arange(3), text, {})  # what is spared by filling up the last batch
    assert compilations == ["jit(sample_batch)"]

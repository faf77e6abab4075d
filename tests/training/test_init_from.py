"""Starting from other weights: what goes where, what is refused, and what a run makes of it."""

import functools
import json
import logging
import re
import runpy
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from safetensors.numpy import save_file

from jointseg_jax import build, presets, rules, sharding
from jointseg_jax.config import RunConfig, SystemConfig, plain
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.models.uvit import UViT
from jointseg_jax.rng import sample_keys
from jointseg_jax.specs import make
from jointseg_jax.training import init_from, workdir
from jointseg_jax.training import state as states
from jointseg_jax.training.checkpoints import Checkpoints
from jointseg_jax.training.loop import train
from jointseg_jax.training.optimizer import OPTIMIZERS
from jointseg_jax.training.step import make_update
from jointseg_jax.types import UserError
from jointseg_jax.weights.architectures import uvit_fields
from jointseg_jax.weights.convert import to_ours, unstack_blocks
from jointseg_jax.weights.tables import table


def system_config(values):
    return SystemConfig.parse(values["system"])


KNOWN = DatasetInfo(Classes(names=("sky", "road", "car")), ("a", "bus", "in", "rain"), ())
PDM, TWO_STREAM = (
    runpy.run_path(str(Path(__file__).parents[2] / f"configs/{name}.py"))
    for name in ("pdm", "pdm_two_stream")
)
MOVE = TWO_STREAM["FROM_IMAGES"]["move"]
SIZE = (16, 16)


def config(stage, **denoiser):
    """A run of one stage, as small as can be."""
    found = presets.shrunk(PDM["get_config"]("data=folders").to_dict())  # a U-ViT
    found |= {"data": presets.scenes(SIZE[0]), "steps": 2, "preview": {"every": 0, "count": 8}}
    found |= {"checkpoint": {"every": 2, "keep": 1}, "log": {"every": 1}, "finish": {"num": 0}}
    found["optimizer"] = {
        "name": "adamw",
        "schedule": {"name": "cosine", "lr": 1e-3, "warmup": 10},
    }
    system = found["system"]
    system |= {"size": SIZE, "text": {"name": "words", "width": 8, "length": 6}}
    system["streams"]["mask"]["codec"] = {"name": "bits"}
    for stream in system["streams"].values():
        stream["tokens"]["patch"] = 8
    system["denoiser"] |= {"width": 16, "depth": 3, "heads": 2}
    if stage == "image":
        del system["streams"]["mask"]
    else:
        system["denoiser"]["name"] = "two_stream"
        found["trainable"] = TWO_STREAM["FROZEN_IMAGE_STREAM"]
    system["denoiser"] |= denoiser
    return found


@functools.cache
def shapes(stage, **denoiser):
    system = build.system(system_config(config(stage, **denoiser)), KNOWN)
    return jax.eval_shape(system.init, jax.random.key(0))


def parameters(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), tree)


def leave(workdir, *, seed=0, known=KNOWN, **denoiser):
    """Makes ``workdir`` what a run on images leaves behind; its averaged parameters."""
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(plain(config("image", **denoiser))))
    (workdir / "facts.json").write_text(known.dump())
    params, ema = (parameters(shapes("image", **denoiser), s) for s in (seed, seed + 1000))
    state = states.create(params, jax.tree.map(lambda _: True, params), optax.identity())
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(7, state.replace(ema=ema), {})
    return ema


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A run on images (its workdir, to be read only) and its averaged parameters."""
    folder = tmp_path_factory.mktemp("runs") / "image"
    return folder, leave(folder)


def spec(folder, **changes):
    return {"workdir": str(folder), "move": MOVE} | changes


def loaded(given, fresh, known=KNOWN):
    start = RunConfig.parse(config("pair") | {"start": given}).start
    return init_from.load(start, fresh, known)


def same(got, want):
    got, want = rules.by_path(got), rules.by_path(want)
    assert list(got) == list(want)
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)


# ------------------------------------------------------------------------ what goes where


def test_nothing_to_start_from_is_a_fresh_start():
    for spec in ({}, {"workdir": "", "file": ""}, {"move": MOVE}):
        assert loaded(spec, shapes("pair")) == {}
    fresh = parameters(shapes("pair"), 1)
    assert init_from.insert(fresh, {}) is fresh


@pytest.mark.thorough
@pytest.mark.parametrize("scan", [False, True])
def test_averaged_parameters_become_the_image_stream_and_the_rest_stays_fresh(images, scan):
    folder, ema = images
    given = loaded(spec(folder), shapes("pair", scan=scan))
    fresh = parameters(shapes("pair", scan=scan), 1)
    placed = init_from.insert(fresh, given)
    assert jax.tree.structure(placed) == jax.tree.structure(fresh)
    got, fresh = unstack_blocks(placed), unstack_blocks(fresh)
    same(got["denoiser"]["image_stream"], ema["denoiser"])
    same(got["text"], ema["text"])
    for part in ("map_stream", "exchange"):
        same(got["denoiser"][part], fresh["denoiser"][part])


@pytest.mark.thorough
def test_a_scanned_run_starts_an_unrolled_one(tmp_path):
    ema = leave(tmp_path / "image", scan=True)
    given = loaded(spec(tmp_path / "image"), shapes("pair"))
    placed = init_from.insert(parameters(shapes("pair"), 1), given)
    same(placed["denoiser"]["image_stream"], unstack_blocks(ema["denoiser"]))


@pytest.mark.thorough
def test_without_rules_everything_goes_where_it_came_from(images):
    folder, ema = images
    given = loaded({"workdir": str(folder)}, shapes("image"))
    same(init_from.insert(parameters(shapes("image"), 1), given), ema)


def test_dropped_leaves_stay_fresh(images):
    folder, ema = images
    move = ((r"/image_out/", None), (r"^params/text/", None), *MOVE)
    fresh = parameters(shapes("pair"), 1)
    placed = init_from.insert(fresh, loaded(spec(folder, move=move), shapes("pair")))
    head = placed["denoiser"]["image_stream"].pop("image_out")
    same(head, fresh["denoiser"]["image_stream"]["image_out"])
    same(placed["text"], fresh["text"])
    ema = {k: v for k, v in ema["denoiser"].items() if k != "image_out"}
    same(placed["denoiser"]["image_stream"], ema)


def test_the_map_stream_may_begin_as_the_image_stream(images):
    folder, ema = images
    given = loaded(spec(folder, init_map_stream="copy"), shapes("pair"))
    fresh = parameters(shapes("pair"), 1)
    placed = init_from.insert(fresh, given)["denoiser"]
    blocks = ("in_blocks", "mid_block", "out_blocks")
    for part in placed["map_stream"]:
        want = ema["denoiser"] if part in blocks else fresh["denoiser"]["map_stream"]
        same(placed["map_stream"][part], want[part])
    same(placed["image_stream"], ema["denoiser"])
    same(placed["exchange"], fresh["denoiser"]["exchange"])


def test_copies_follow_their_own_rules(images):
    folder, _ = images
    copy = ((r"image_stream/mid_block/mlp/fc1/(\w+)$", r"map_stream/mid_block/mlp/fc1/\1"),)
    given = loaded(spec(folder, copy=copy), shapes("pair"))
    copied = {p for p in given if "/map_stream/" in p}
    head = "params/denoiser/map_stream/mid_block/mlp/fc1/"
    assert copied == {head + "kernel", head + "bias"}
    for path in copied:
        np.testing.assert_array_equal(given[path], given[path.replace("map_", "image_")])


def test_what_was_started_from_is_logged(images, caplog):
    folder, ema = images
    with caplog.at_level(logging.INFO, "jointseg_jax"):
        given = loaded(spec(folder), shapes("pair"))
    total = len(jax.tree.leaves(shapes("pair")))
    assert f"started from {folder}, step 7 (" in caplog.text
    assert f": {len(given)} of {total} parameters" in caplog.text
    assert len(given) == len(jax.tree.leaves(ema))


REFERENCE = {"img_size": 16, "in_chans": 3, "patch_size": 8, "embed_dim": 16, "depth": 3}
REFERENCE |= {"num_heads": 2, "clip_dim": 8, "num_clip_token": 6}


def test_a_reference_file_becomes_the_image_stream(tmp_path):
    names = table("uvit_t2i", UViT(**uvit_fields("uvit_t2i", REFERENCE)))
    rng = np.random.default_rng(0)
    weights = {
        k: rng.normal(size=s).astype(np.float32) for k, s in names.reference_shapes().items()
    }
    save_file(weights, tmp_path / "uvit.safetensors")
    given = {"file": str(tmp_path / "uvit.safetensors"), "architecture": REFERENCE, "move": MOVE}
    fresh = parameters(shapes("pair"), 1)
    placed = init_from.insert(fresh, loaded(given, shapes("pair")))
    same(placed["denoiser"]["image_stream"], to_ours(weights, names))
    same(placed["text"], fresh["text"])  # a file has no words


# ------------------------------------------------------------------------------- refusals


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"move": MOVE[:1]},
            r"start.move rules: 2 leaves match no rule, first: params/text/embedd",
        ),
        (
            {"move": ((r"^params/denoiser/", "params/denoiser/picture/"), MOVE[1])},
            r"config.start.move: 49 leaves find no place:.*denoiser/context_in/position -> params/"
            r"denoiser/picture/context_in/position: this network has no such parameter \(did you "
            r"mean params/denoiser/image_stream/context_in/position\?\).*drop such leaves with",
        ),
        (
            {"move": ((r"image_in/project/bias$", "image_stream/norm/bias"), *MOVE)},
            r"1 leaves find no place:.*norm/bias: another leaf goes there too",
        ),
        (
            {"move": ((r"image_in/project/kernel$", "image_stream/norm/bias"), *MOVE)},
            r"\(192, 16\) does not fit \(16,\).*make the networks alike",
        ),
        (
            {"move": ((r"^", r"\1"),)},
            r"config.start.move: a replacement names a group that its reg",
        ),
        ({"move": ((r"(", ""),)}, r"start.move rules: '\(' is not a regular expression"),
        ({"copy": ((r"decoder", "encoder"),)}, r"start.copy rules: no leaf matches 'decoder'"),
        (
            {"copy": ((r"image_in", "mask_in"),)},
            r"config.start.copy: 3 leaves find no place",
        ),
        (
            {"copy": ((r"norm/scale$", "norm/bias"),)},
            r"config.start.copy: params/denoiser/image_stream/.*bias would be copied over what",
        ),
        (
            {"init_map_stream": "zero"},
            r"config.start: start: init_map_stream='zero': one of random",
        ),
        (
            {"architecture": {}, "file": "x"},
            r"give one of the two, or neither for a",
        ),
        ({"workdir": "", "file": "x"}, r"file='x' and architecture=None: a file needs the referen"),
        (
            {"weights": "x"},
            r"config.start: start has no field 'weights'; its fields: workdir, file",
        ),
    ],
)
def test_mistakes_are_named(images, changes, said):
    with pytest.raises(UserError) as error:
        loaded(spec(images[0], **changes), shapes("pair"))
    assert re.search(said, str(error.value), re.DOTALL), str(error.value)


@pytest.mark.thorough
def test_other_sizes_do_not_fit(images):
    with pytest.raises(UserError, match=r"\(16, 16\) does not fit \(32, 32\)|does not fit \("):
        loaded(spec(images[0]), shapes("pair", width=32))


def test_words_in_another_order_are_refused(images):
    other = DatasetInfo(KNOWN.classes, ("bus", "a", "in", "rain"), ())
    with pytest.raises(
        UserError, match=r"was trained on 4 words, config\.data has 4, and they are"
    ):
        loaded(spec(images[0]), shapes("pair"), other)


def test_a_folder_without_a_run_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"no trained run here .*Train one: launch/train.py"):
        loaded(spec(tmp_path), shapes("pair"))


# ----------------------------------------------------------------------- the frozen image stream


LEARNING = {
    *("time_image/position", "context_in/position", "image_in/position"),
    *("norm/scale", "norm/bias"),
    *(f"image_out/{part}/{leaf}" for part in ("project", "conv") for leaf in ("kernel", "bias")),
}
"""What the released code leaves trainable of the image stream: positions, last norm, head."""


def trainable(tree):
    given = config("pair")["trainable"]
    return rules.match(tree, given, where="trainable", prefix="params/")


def test_the_rules_freeze_what_the_released_code_freezes():
    learning = {p for p, t in rules.by_path(trainable(shapes("pair"))).items() if t}
    stream = "denoiser/image_stream/"
    assert {p.removeprefix(stream) for p in learning if p.startswith(stream)} == LEARNING
    others = {p for p in rules.paths(shapes("pair")) if not p.startswith((stream, "text/"))}
    assert learning == others | {stream + p for p in LEARNING}


@jax.custom_jvp
def untouchable(x):
    return x


@untouchable.defjvp
def _(primals, tangents):
    raise AssertionError("a derivative was taken with respect to a frozen parameter")


class Guarded:
    """A system that complains about derivatives with respect to frozen parameters."""

    def __init__(self, system):
        self.init, self.preview, self.system = system.init, system.preview, system

    def loss(self, params, *rest):
        chosen = trainable(params)
        guarded = jax.tree.map(lambda x, t: x if t else untouchable(x), params, chosen)
        return self.system.loss(guarded, *rest)


def updated(chosen):
    """The shapes of a state after one update that trains the chosen leaves."""
    given = config("pair")
    system = Guarded(build.system(system_config(given), KNOWN))
    optimizer = make(OPTIMIZERS, given["optimizer"], where="optimizer").build(2)
    state = jax.eval_shape(lambda p: states.create(p, chosen, optimizer), shapes("pair"))
    batch = {
        "image": jax.ShapeDtypeStruct((2, *SIZE, 3), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((2, *SIZE), jnp.int16),
        "text": jax.ShapeDtypeStruct((2, 6), jnp.int32),
    }
    update = make_update(system, optimizer, chosen, seed=0, ema=0.9)
    return jax.eval_shape(update, state, {}, batch)[0]


@pytest.mark.thorough
def test_frozen_parameters_have_no_gradient_no_moments_and_no_average():
    chosen = trainable(shapes("pair"))
    state = updated(chosen)
    kept = {p for p, t in rules.by_path(chosen).items() if t}
    assert set(rules.paths(state.ema)) == kept
    moments = [p for p in rules.paths(state.opt) if "/mu/" in p or "/nu/" in p]
    assert len(moments) == 2 * len(kept)
    assert not [p for p in moments if "/image_stream/mid_block/" in p or "/text/" in p]
    with pytest.raises(AssertionError, match="a derivative was taken"):
        updated(jax.tree.map(lambda _: True, chosen))


# ------------------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps on images, then two steps on pairs that start from them, split over devices."""
    runs = tmp_path_factory.mktemp("trained")
    images = config("image", depth=1) | {"preview": {"every": 2, "count": 8}}
    assert train(RunConfig.parse(images), runs / "image") == 0
    split = ((r"fc1/kernel$", (None, "fsdp")), (r"", "replicate"))
    given = config("pair", depth=1) | {"mesh": (2, 4, 1), "sharding": split}
    given |= {"start": spec(runs / "image", init_map_stream="copy")}
    assert train(RunConfig.parse(given), runs / "pair") == 0
    return runs, given


@pytest.mark.thorough
def test_a_run_goes_on_from_the_weights_it_was_given(trained):
    runs, _ = trained
    images, pairs = workdir.load_run(runs / "image"), workdir.load_run(runs / "pair")
    assert (images.step, pairs.step) == (2, 2)
    before = {f"image_stream/{p}": x for p, x in rules.by_path(images.params["denoiser"]).items()}
    after = rules.by_path(pairs.params["denoiser"])
    frozen = trainable(pairs.params)["denoiser"]
    for path, learns in rules.by_path(frozen).items():
        if not learns:
            np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    same(pairs.params["text"], images.params["text"])
    # two steps of the warm-up move what learns by less than 1e-3; an average that began at fresh
    # values would be off by their size, 0.02 and more
    for path in LEARNING:
        path = f"image_stream/{path}"
        np.testing.assert_allclose(after[path], before[path], atol=1e-3, err_msg=path)
    copied = "mid_block/attn/qkv/kernel"
    moved = np.abs(after[f"map_stream/{copied}"] - after[f"image_stream/{copied}"]).max()
    assert 0 < moved < 1e-3
    assert 0 < np.abs(after["exchange/mid_block/kernel"]).max() < 1e-3


@pytest.mark.thorough
def test_a_run_on_images_alone_shows_images(trained):
    runs, _ = trained
    with Image.open(runs / "image/samples/00000002.png") as sheet:
        assert len(np.unique(np.asarray(sheet))) > 16
    run = workdir.load_run(runs / "image")
    made = jax.eval_shape(
        lambda p: run.system.generate(p, {}, None, sample_keys(0, jnp.arange(2))), run.params
    )
    assert {k: v.shape for k, v in made.items()} == {"image": (2, *SIZE, 3)}


@pytest.mark.thorough
def test_a_checkpoint_goes_before_the_start(trained, tmp_path):
    """A resumed run does not read the other weights again, nor need them."""
    runs, given = trained
    shutil.copytree(runs / "pair", tmp_path / "pair")
    shutil.move(runs / "image", tmp_path / "elsewhere")
    try:
        assert train(RunConfig.parse(given), tmp_path / "pair") == 0
        with pytest.raises(UserError, match="image: no trained run here"):
            train(RunConfig.parse(given), tmp_path / "new")
    finally:
        shutil.move(tmp_path / "elsewhere", runs / "image")


def test_parameters_arrive_where_the_sharding_rules_say(images):
    folder, ema = images
    given = loaded(spec(folder), shapes("pair"))
    mesh = sharding.make_mesh((2, 4, 1))
    rule = ((r"fc1/kernel$", (None, "fsdp")), (r"", "replicate"))
    places = sharding.state_shardings(shapes("pair"), rule, mesh)

    def init(given):
        return init_from.insert(
            jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes("pair")), given
        )

    params = jax.jit(init, out_shardings=places)(given)
    leaf = params["denoiser"]["image_stream"]["mid_block"]["mlp"]["fc1"]["kernel"]
    assert leaf.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    same(params["denoiser"]["image_stream"], ema["denoiser"])

"""One update: what it computes, on which devices, and what it must leave alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jointseg_jax import rules, sharding
from jointseg_jax.config import ReadConfig
from jointseg_jax.data.pipeline import batches
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.models.embed import Patches
from jointseg_jax.models.unet import UNet
from jointseg_jax.rng import fold, row_keys
from jointseg_jax.training import state as states
from jointseg_jax.training.checkpoints import Checkpoints
from jointseg_jax.training.digest import state_digest
from jointseg_jax.training.optimizer import AdamW, Muon
from jointseg_jax.training.step import make_update

READ = ReadConfig()

ROWS, WIDTH = 8, 4
REORDERED = 1e-6  # float32: means of the same 8 rows, summed in another order
EMA = 0.15  # reached at the second step: (1 + step) / (10 + step) is 0.1, 0.18, ...


@jax.custom_jvp
def untouchable(x):
    return x


@untouchable.defjvp
def _(primals, tangents):
    raise AssertionError("a derivative was taken with respect to a frozen parameter")


@dataclasses.dataclass(frozen=True)
class Regression:
    """A small network, noise of its own for every row, and a term whose gradient may be NaN."""

    guard: bool = False  # complain about derivatives with respect to the body

    def init(self, key):
        first, second = jax.random.split(key)
        body = {"kernel": jax.random.normal(first, (WIDTH, 8)), "bias": jnp.zeros(8)}
        head = {"kernel": jax.random.normal(second, (8, WIDTH)), "bias": jnp.ones(WIDTH)}
        return {"body": body, "head": head}

    def loss(self, params, frozen, batch, keys):
        body, head = params["body"], params["head"]
        if self.guard:
            body = jax.tree.map(untouchable, body)
        noise = jax.vmap(lambda k: jax.random.normal(k, (WIDTH,)))(fold(keys, "noise"))
        hidden = jnp.tanh((batch["x"] + noise) @ body["kernel"] + body["bias"][None])
        error = jnp.mean(jnp.square(hidden @ head["kernel"] + head["bias"][None]))
        root = jnp.sqrt(jnp.abs(batch["z"].mean() * head["bias"][0]))  # at z = 0: 0, slope NaN
        loss = error + 1e-3 * root
        return loss, {"loss": loss, "error": error}

    def preview(self, params, frozen, batch, keys):
        raise AssertionError("an update shows nothing")


@dataclasses.dataclass(frozen=True)
class Exposed(Regression):
    """The gradient with respect to entry ``r`` is the noise of row ``r``, times 1 / rows."""

    def init(self, key):
        return {"table": jnp.zeros(ROWS)}

    def loss(self, params, frozen, batch, keys):
        noise = jax.vmap(jax.random.normal)(fold(keys, "noise"))
        loss = jnp.mean(params["table"][batch["row"]] * noise)
        return loss, {"loss": loss}


def batch(seed=0, **changes):
    x = np.random.default_rng(seed).normal(size=(ROWS, WIDTH)).astype(np.float32)
    return {"x": x, "z": np.ones(ROWS, np.float32)} | changes


BAD = {
    "loss": batch(x=np.full((ROWS, WIDTH), np.nan, np.float32)),
    "one row": batch(x=np.where(np.arange(ROWS)[:, None] == 5, np.inf, batch()["x"])),
    "gradient": batch(z=np.zeros(ROWS, np.float32)),
}


# eps bounds how much Adam's division enlarges a rounding error of a small gradient
ADAMW = AdamW(schedule={"name": "constant", "lr": 0.1}, eps=1e-2, weight_decay=0.1).build(100)


def run(system=None, *, optimizer=None, trainable=True, **options):
    """The compiled update and the state before it; ``trainable`` False freezes the body."""
    system, optimizer = system or Regression(), optimizer or ADAMW
    make = creating(system, optimizer, trainable)  # called anew: tests give their state away
    return compiled(system, optimizer, trainable, **options), make(jax.random.key(0))


@functools.cache
def compiled(system, optimizer, trainable, **options):
    trainable = which(jax.eval_shape(system.init, jax.random.key(0)), trainable)
    options = {"seed": 0, "ema": EMA} | options
    return jax.jit(make_update(system, optimizer, trainable, **options))


@functools.cache
def creating(system, optimizer, trainable):
    def create(key):
        params = system.init(key)
        return states.create(params, which(params, trainable), optimizer)

    return jax.jit(create)


def which(params, trainable):
    body = ((r"^params/body/", trainable), (r"", True))
    return rules.match(params, body, where="trainable", prefix="params/", dead="allow")


def train(update, state, data):
    for rows in data:
        state, metrics = update(state, {}, rows)
    return state, metrics


def close(got, want, atol=REORDERED, rtol=REORDERED):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), got, want)


def same(got, want):
    assert state_digest(got) == state_digest(want)


# ------------------------------------------------------------------------ accumulation


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing_but_rounding(parts):
    data = [batch(i) for i in range(3)]
    whole, metrics = train(*run(accumulate=1), data)
    split, same_metrics = train(*run(accumulate=parts), data)
    assert not np.array_equal(whole.params["body"]["kernel"], run()[1].params["body"]["kernel"])
    # three updates of length 0.1, each with gradients good to 1e-6, divided by at least eps = 1e-2
    close((split.params, split.ema), (whole.params, whole.ema), atol=3e-5)
    close(same_metrics, metrics, rtol=1e-4)


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_a_rows_noise_is_that_of_its_row_whatever_the_accumulation(parts):
    update, state = run(Exposed(), optimizer=optax.sgd(1.0), accumulate=parts, seed=3)
    state, _ = update(state.replace(step=jnp.int32(5)), {}, {"row": np.arange(ROWS)})
    keys = jax.vmap(lambda k: jax.random.fold_in(k, 0))(row_keys(3, 5, jnp.arange(ROWS)))
    noise = jax.vmap(jax.random.normal)(fold(keys, "noise"))
    # exact: 8 rows are halved and halved again, and every sum has one term that is not zero
    np.testing.assert_array_equal(state.params["table"], -noise / ROWS)


# ------------------------------------------------------------------------------ meshes

MESHES = {
    "replicate": (8, 1, 1),
    "zero1": (8, 1, 1),
    "fsdp": (2, 4, 1),
    "fsdp+model": (2, 2, 2),
}


def on_mesh(preset, optimizer, data, system=None):
    """As the loop does it: shardings from rules, explicit in and out, state donated."""
    mesh = sharding.make_mesh(MESHES[preset])
    update, state = run(system, optimizer=optimizer)
    places = sharding.state_shardings(state, preset, mesh)
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    with jax.set_mesh(mesh):
        update = jax.jit(
            update,
            in_shardings=(places, everywhere, rows),
            out_shardings=(places, everywhere),
            donate_argnums=0,
        )
        state = jax.device_put(state, places)
        state, metrics = train(update, state, [jax.device_put(b, rows) for b in data])
    return state, metrics


SMOOTH = {"schedule": {"name": "constant", "lr": 0.01}, "eps": 1e-2, "clip": 1.0}
ON_MESH = {"adamw": AdamW(**SMOOTH).build(100), "muon": Muon(**SMOOTH).build(100)}


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize(
    ("preset", "name"),
    [("replicate", "adamw"), ("zero1", "adamw"), ("zero1", "muon"), ("fsdp", "adamw")],
)
def test_a_mesh_changes_nothing_but_rounding(preset, name, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 1)  # else tensors this small are left whole
    optimizer, data = ON_MESH[name], [batch(i) for i in range(2)]
    alone, metrics = train(*run(optimizer=optimizer), data)
    state, same_metrics = on_mesh(preset, optimizer, data)
    split = [p for p, x in rules.by_path(state).items() if not x.sharding.is_fully_replicated]
    assert bool(split) == (preset != "replicate")
    assert any(p.startswith("params/") for p in split) == (preset == "fsdp")
    # two updates of length 0.01 with gradients good to 1e-6; AdamW divides these by at least
    # eps = 1e-2, Muon enlarges them 3.4^5 = 465 times at most (five steps of slope 3.4 at 0)
    close((state.params, state.ema), (alone.params, alone.ema), atol=1e-5)
    close(same_metrics, metrics, rtol=1e-5)


UNET = UNet(
    streams={n: Patches(grid=(8, 8), channels=c, patch=4) for n, c in {"x": 3, "y": 2}.items()},
    **{"time_tokens": ("x",), "width": 16, "depth": 1, "heads": 2, "widths": (8,), "units": 8},
)


class Painter(Regression):
    """A U-Net that tells ``y`` from ``x``; none of its parameters is zero."""

    def init(self, key):
        shapes = jax.eval_shape(UNET.init, key, **UNET.input_shapes())["params"]
        leaves, tree = jax.tree.flatten(shapes)
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = jnp.split(0.3 * jax.random.normal(key, (ends[-1],)), ends[:-1])
        return tree.unflatten([x.reshape(s.shape) for x, s in zip(parts, leaves)])

    def loss(self, params, frozen, batch, keys):
        seen = {"x": batch["x"], "y": 0 * batch["y"]}
        made, _ = UNET.apply({"params": params}, seen, {"x": jnp.full(ROWS, 300.0)})
        loss = jnp.mean(jnp.square(made["y"] - batch["y"]))
        return loss, {"loss": loss}


@pytest.mark.thorough
def test_a_mesh_changes_a_convolutional_network_by_rounding_only(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 1)
    draw = np.random.default_rng(0).normal
    shapes = {n: (ROWS, 8, 8, spec.channels) for n, spec in UNET.specs.items()}
    data = [{n: draw(size=s).astype(np.float32) for n, s in shapes.items()} for _ in range(2)]
    system, optimizer = Painter(), ON_MESH["adamw"]
    _, start = run(system, optimizer=optimizer)
    alone, metrics = train(*run(system, optimizer=optimizer), data)
    state, same_metrics = on_mesh("fsdp+model", optimizer, data, system)
    places = {p: x.sharding.spec for p, x in rules.by_path(state.params).items()}
    for name in ("stem/conv_0", "stem/block_0/conv_1", "head/block_0/conv_2", "head/up_0"):
        assert "fsdp" in str(places[f"{name}/kernel"]), places
    assert "model" in str(places["mid_block/attn/qkv/kernel"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone.params, start.params)
    assert min(jax.tree.leaves(moved)) > 1e-4
    # as above
    close((state.params, state.ema), (alone.params, alone.ema), atol=1e-5)
    close(same_metrics, metrics, rtol=1e-5)


# ------------------------------------------------------------------------------ frozen


def test_frozen_parameters_stay_and_cost_nothing():
    update, start = run(Regression(guard=True), trainable=False)
    state, _ = train(update, start, [batch(i) for i in range(3)])
    same(state.params["body"], start.params["body"])
    assert not np.array_equal(state.params["head"]["kernel"], start.params["head"]["kernel"])
    assert rules.paths(state.ema) == ["head/bias", "head/kernel"]
    assert not [p for p in rules.paths(state.opt) if "body" in p]
    assert [p for p in rules.paths(state.opt) if "head" in p]


def test_the_guard_of_the_test_above_notices_a_derivative():
    update, state = run(Regression(guard=True), trainable=True)
    with pytest.raises(AssertionError, match="with respect to a frozen parameter"):
        update(state, {}, batch())


def test_the_gradient_norm_is_that_of_what_is_trained():
    system = Regression()
    update, state = run(system, trainable=False)
    _, metrics = update(state, {}, batch())
    keys = jax.vmap(lambda k: jax.random.fold_in(k, 0))(row_keys(0, 0, jnp.arange(ROWS)))

    @jax.jit
    def gradient(head):
        return jax.grad(lambda h: system.loss(state.params | {"head": h}, {}, batch(), keys)[0])(
            head
        )

    close(metrics["grad_norm"], optax.tree.norm(gradient(state.params["head"])))


# ----------------------------------------------------------------------------- average


def test_the_average_starts_at_the_loaded_parameters_and_follows_its_formula():
    update, state = run()
    loaded = jax.tree.map(lambda p: p + 7.0, state.params)
    state = states.create(loaded, jax.tree.map(lambda _: True, loaded), ADAMW)
    same(state.ema, loaded)
    average = [np.float64(p) for p in jax.tree.leaves(loaded)]
    for step in range(4):
        state, _ = update(state, {}, batch(step))
        decay = min(EMA, (1 + step) / (10 + step))
        moved = jax.tree.leaves(state.params)
        average = [decay * e + (1 - decay) * p for e, p in zip(average, moved, strict=True)]
        close(jax.tree.leaves(state.ema), average)


def test_no_average_is_the_parameters_themselves():
    state, _ = train(*run(ema=0.0), [batch()])
    same(state.ema, state.params)


# -------------------------------------------------------------------------- not finite


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize("cause", BAD)
@pytest.mark.parametrize("parts", [1, 4])
def test_an_update_that_is_not_finite_is_discarded(cause, parts):
    update, state = run(accumulate=parts)
    before, _ = train(update, state, [batch(0)])
    after, metrics = update(before, {}, BAD[cause])
    assert not metrics["finite"] and np.isfinite(metrics["loss"]) == (cause == "gradient")
    same((after.params, after.opt, after.ema), (before.params, before.opt, before.ema))
    assert (after.step, after.skipped) == (2, 1)


def test_refused_updates_are_counted_in_a_row():
    update, state = run()
    counts, finite = [], []
    for rows in (batch(0), BAD["loss"], BAD["gradient"], batch(1), BAD["one row"]):
        state, metrics = update(state, {}, rows)
        counts.append(int(state.skipped))
        finite.append(bool(metrics["finite"]))
    assert counts == [0, 1, 2, 0, 1]
    assert finite == [True, False, False, True, False]
    assert int(state.step) == 5


def test_a_skipped_step_leaves_no_trace_in_what_follows():
    update, state = run()
    skipped, _ = train(update, state, [BAD["loss"], batch(1)])
    straight, _ = train(update, state.replace(step=jnp.int32(1)), [batch(1)])
    same(skipped, straight)


def test_a_retry_draws_other_noise():
    update, state = run()
    losses = [
        float(update(state.replace(retries=jnp.int32(n)), {}, batch())[1]["loss"])
        for n in (0, 1, 2, 0)
    ]
    assert len(set(losses)) == 3 and losses[0] == losses[3]


# --------------------------------------------------------------------------- the state


def test_the_learning_rate_is_reported_when_given():
    schedule = AdamW(schedule={"name": "linear", "lr": 1.0, "warmup": 2}).learning_rate(10)
    update, state = run(learning_rate=schedule)
    _, metrics = update(state.replace(step=jnp.int32(1)), {}, batch())
    assert float(metrics["lr"]) == 0.5 and metrics["lr"].dtype == jnp.float32
    assert "lr" not in run()[0](state, {}, batch())[1]


def test_a_donated_state_gives_the_same_result():
    update, state = run(trainable=False)
    kept, _ = train(update, state, [batch(0), batch(1)])
    create = jax.jit(functools.partial(jax.tree.map, jnp.copy))
    given = first = create(state)
    donating = jax.jit(update, donate_argnums=0)
    given, _ = train(donating, given, [batch(0), batch(1)])
    same(given, kept)
    assert all(x.is_deleted() for x in jax.tree.leaves(first))


def test_a_fresh_state_can_be_donated_at_once():
    """The average is no alias of the parameters, whether made under jit or not."""
    update, eager = run()
    donating = jax.jit(update, donate_argnums=0)
    params = eager.params
    trainable = jax.tree.map(lambda _: True, params)
    fresh = jax.jit(lambda p: states.create(p, trainable, ADAMW))(params)
    want, _ = donating(fresh, {}, batch())
    same(donating(eager, {}, batch())[0], want)


def test_two_runs_have_the_same_bits():
    data = [batch(i) for i in range(3)]
    (first, loss), (second, again) = (train(*run(accumulate=2), data) for _ in range(2))
    same((first, loss), (second, again))


def test_a_resumed_run_has_the_same_bits(tmp_path):
    """4 steps = 2 steps, a checkpoint, and 2 more, fed by the pipeline from step 2 on."""

    def rows(start, count):
        source = Scenes(size=8, thing_size=(0.5, 0.6), max_things=1, texture=0.0)
        with batches(source, READ, batch=ROWS, seed=1, transforms=(), start_step=start) as data:
            for _, b in zip(range(count), data):
                colour, index = b["image"].mean((1, 2)) / 255, b["index"][:, None] / 1e6
                yield batch(x=np.concatenate([colour, index], axis=1).astype(np.float32))

    update, start = run()
    straight, _ = train(update, start, rows(0, 4))
    half, _ = train(update, start, rows(0, 2))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, half, {})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), start)
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore_newest(shapes)
    same(restored, half)
    resumed, _ = train(update, restored, rows(int(restored.step), 2))
    same(resumed, straight)
    other, _ = train(update, restored, rows(0, 2))  # the data order matters
    assert state_digest(other) != state_digest(straight)

"""Laws of guidance: scale 1 is off, one batched call equals separate ones, rows interleave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.transport.guidance import Branch, Guidance, interleave, part
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.schedules import Linear
from jointseg_jax.transport.solvers import Euler

BATCH = 3


def normal(seed, *shape):
    """Drawn by numpy: nothing is compiled while tests are collected."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, *shape)), jnp.float32)


X = {"image": normal(0, 2, 2, 4), "mask": normal(1, 2, 2, 1)}
TIMES = {"image": jnp.float32(0.7), "mask": jnp.float32(0.7)}
PROMPT, EMPTY = normal(2, 5, 4), jnp.zeros((BATCH, 5, 4))
STEP = jnp.int32(0)


def denoise(latents, times, text):
    """Every stream's answer depends on all streams, its time, and the text, row by row."""
    mixed = sum(jnp.sin(v).reshape(len(v), -1).mean(axis=1) for v in latents.values())
    if text is not None:
        mixed = mixed + jnp.cos(text).reshape(len(text), -1).mean(axis=1)
    signal = {k: mixed + times[k] for k in latents}
    return {k: v * signal[k].reshape(-1, *(1,) * (v.ndim - 1)) for k, v in latents.items()}


def separate(times):
    return {k: jnp.broadcast_to(t, (BATCH,)) for k, t in times.items()}


def separately(latents, times, text):
    return denoise(latents, separate(times), text)


def guided(denoise, conditional, unconditional=(), intervals=None):
    """The guided network, as a solver calls it."""
    guidance = Guidance(conditional, unconditional, intervals or {})
    return lambda x, t, step: guidance.combine(denoise(*guidance.expand(x, t, step)), t)


def test_scale_one_is_the_conditional_prediction_bit_for_bit():
    want = guided(denoise, Branch(text=PROMPT))(X, TIMES, STEP)
    scales = {"image": 1.0, "mask": 1.0}
    off = guided(denoise, Branch(text=PROMPT), [(Branch(text=EMPTY), scales)])(X, TIMES, STEP)
    traced = jax.jit(
        lambda s: guided(
            denoise, Branch(text=PROMPT), [(Branch(text=EMPTY), {"image": s, "mask": s})]
        )(X, TIMES, STEP)
    )(1.0)
    for name in X:
        assert np.array_equal(want[name], off[name])
        # a scale only known in the program is applied, to no effect but float32 fusing
        np.testing.assert_allclose(traced[name], want[name], rtol=1e-6, atol=1e-7)


def test_a_branch_that_serves_nothing_is_not_evaluated():
    rows = []

    def counting(latents, times, text):
        rows.append(len(latents["image"]))
        return denoise(latents, times, text)

    empty = Branch(text=EMPTY)
    for scales in ({}, {"image": 1.0}, {"image": 1.0, "mask": 2.0}):
        guided(counting, Branch(text=PROMPT), [(empty, scales)])(X, TIMES, STEP)
    assert rows == [BATCH, BATCH, 2 * BATCH]


def test_one_batched_call_equals_separate_calls():
    scales = {"image": 3.0, "mask": 1.5}
    predict = guided(denoise, Branch(text=PROMPT), [(Branch(text=EMPTY), scales)])
    got = predict(X, TIMES, STEP)
    cond, uncond = separately(X, TIMES, PROMPT), separately(X, TIMES, EMPTY)
    for name, scale in scales.items():
        want = uncond[name] + scale * (cond[name] - uncond[name])
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6)  # float32, other order


@pytest.mark.parametrize(("t", "inside"), [(0.1, False), (0.3, True), (0.5, True), (0.51, False)])
def test_in_an_interval_the_scale_holds_and_outside_it_is_one(t, inside):
    times = {"image": jnp.float32(t), "mask": jnp.float32(t)}
    ways = Branch(text=PROMPT), [(Branch(text=EMPTY), {"image": 3.0, "mask": 2.0})]
    got = guided(denoise, *ways, {"image": (0.3, 0.5)})(X, times, STEP)
    always = guided(denoise, *ways)(X, times, STEP)
    want = always if inside else guided(denoise, Branch(text=PROMPT))(X, times, STEP)
    np.testing.assert_array_equal(got["image"], want["image"])
    np.testing.assert_array_equal(got["mask"], always["mask"])  # it has no interval
    assert np.abs(always["image"] - denoise(X, separate(times), PROMPT)["image"]).max() > 0.01


def test_rows_may_stand_at_times_inside_and_outside():
    t = jnp.float32([0.1, 0.3, 0.9])
    ways = Branch(text=PROMPT), [(Branch(text=EMPTY), {"image": 3.0})]
    times = {"image": t, "mask": t}
    got = guided(denoise, *ways, {"image": (0.2, 0.9)})(X, times, STEP)["image"]
    on, off = guided(denoise, *ways)(X, times, STEP), guided(denoise, ways[0])(X, times, STEP)
    np.testing.assert_array_equal(got, jnp.concatenate([off["image"][:1], on["image"][1:]]))


def test_a_solver_is_guided_on_the_part_of_its_way_that_lies_in_the_interval():
    """Velocities 1 with text and 0 without: the way is its length, and scale times that inside."""
    process = Process(schedule=Linear(), predicts="velocity")
    still = lambda x, t, text: {"image": jnp.broadcast_to(text, x["image"].shape)}  # noqa: E731
    one, zero = jnp.ones((BATCH, 1)), jnp.zeros((BATCH, 1))
    predict = guided(
        still, Branch(text=one), [(Branch(text=zero), {"image": 4.0})], {"image": (0.35, 0.75)}
    )
    end = Euler(steps=10)(predict, {"image": process}, {"image": zero})["image"]
    # the steps from 0.7, 0.6, 0.5 and 0.4 are guided
    np.testing.assert_allclose(end, -(0.6 + 4 * 0.4), rtol=1e-5)  # float32


def test_streams_may_have_unconditional_branches_of_their_own():
    """Joint generation of image and text: each loses the other one, made noise at time 1."""
    latents = {"image": X["image"], "text": normal(5, 5, 4)}
    times = {"image": jnp.float32(0.4), "text": jnp.float32(0.4)}
    noise = {"image": normal(6, 2, 2, 4), "text": normal(7, 5, 4)}
    without = {k: Branch(latents={k: noise[k]}, times={k: 1.0}) for k in noise}
    predict = guided(
        denoise, Branch(), [(without["text"], {"image": 8.0}), (without["image"], {"text": 4.0})]
    )
    got = predict(latents, times, STEP)
    cond = separately(latents, times, None)
    for name, other, scale in (("image", "text", 8.0), ("text", "image", 4.0)):
        alone = separately({**latents, other: noise[other]}, {**times, other: jnp.float32(1)}, None)
        want = alone[name] + scale * (cond[name] - alone[name])
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5)  # float32, scale 8


def test_rows_of_an_example_stay_together():
    parts = [100 * i + jnp.arange(BATCH) for i in range(3)]
    rows = interleave(parts)
    assert rows.tolist() == [0, 100, 200, 1, 101, 201, 2, 102, 202]
    for i, want in enumerate(parts):
        assert np.array_equal(part(rows, i, 3), want)


def test_the_network_sees_the_interleaved_rows():
    seen = {}

    def looking(latents, times, text):
        seen.update(latents=latents, times=times, text=text)
        return denoise(latents, times, text["words"])

    conditional = Branch(text={"words": PROMPT, "class": jnp.arange(BATCH)})
    unconditional = Branch(
        text={"words": EMPTY, "class": jnp.full((BATCH,), 9)}, times={"mask": 0.0}
    )
    guided(looking, conditional, [(unconditional, {"image": 2.0})])(X, TIMES, STEP)
    assert np.array_equal(seen["latents"]["image"][0::2], X["image"])
    assert np.array_equal(seen["latents"]["image"][1::2], X["image"])
    assert np.array_equal(seen["text"]["words"][0::2], PROMPT)
    assert seen["text"]["class"].tolist() == [0, 9, 1, 9, 2, 9]
    np.testing.assert_array_equal(seen["times"]["mask"], np.float32([0.7, 0] * BATCH))
    np.testing.assert_array_equal(seen["times"]["image"], np.float32([0.7] * 2 * BATCH))


def test_overrides_may_be_functions_of_the_step():
    unconditional = Branch(
        latents={"mask": lambda step: jnp.full_like(X["mask"], step)},
        times={"mask": lambda step: step / 10},
    )
    predict = guided(denoise, Branch(), [(unconditional, {"image": 2.0})])

    for step in (0, 3):
        got = jax.jit(predict)(X, TIMES, jnp.int32(step))
        cond = separately(X, TIMES, None)
        replaced = {**X, "mask": jnp.full_like(X["mask"], step)}
        uncond = separately(replaced, {**TIMES, "mask": jnp.float32(step / 10)}, None)
        want = 2 * cond["image"] - uncond["image"]
        np.testing.assert_allclose(got["image"], want, rtol=1e-5, atol=1e-6)  # float32
        np.testing.assert_allclose(got["mask"], cond["mask"], rtol=1e-6)  # not served


def test_a_solver_runs_a_guided_network_beside_a_given_stream():
    process = Process(schedule=Linear(), predicts="velocity")
    unconditional = Branch(latents={"mask": jnp.zeros_like(X["mask"])}, times={"mask": 1.0})
    predict = guided(denoise, Branch(), [(unconditional, {"image": 2.0})])
    given = {"mask": X["mask"]}
    got = Euler(steps=1)(
        predict, {"image": process, "mask": process}, {"image": X["image"]}, condition=given
    )
    one, zero = jnp.float32(1), jnp.float32(0)
    cond = separately(X, {"image": one, "mask": zero}, None)["image"]
    empty = {**X, "mask": jnp.zeros_like(X["mask"])}
    uncond = separately(empty, {"image": one, "mask": one}, None)["image"]
    want = X["image"] - (2 * cond - uncond)
    np.testing.assert_allclose(got["image"], want, rtol=1e-5, atol=1e-6)  # float32
    assert got["mask"] is given["mask"]


def test_refusals():
    with pytest.raises(ValueError, match="image are served by two unconditional branches"):
        guided(denoise, Branch(), [(Branch(), {"image": 2.0}), (Branch(), {"image": 3.0})])
    with pytest.raises(ValueError, match="a branch replaces text and the streams are image, mask"):
        guided(denoise, Branch(times={"text": 1.0}))(X, TIMES, STEP)

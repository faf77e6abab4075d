"""The train state: halves of a parameter tree and what a fresh state holds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jointseg_jax import rules
from jointseg_jax.training import state as states

PARAMS = {
    "body": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)},
    "head": {"kernel": jnp.full((3,), 2.0)},
}
TRAINABLE = {"body": {"kernel": False, "bias": True}, "head": {"kernel": True}}
EVERYTHING = jax.tree.map(lambda _: True, PARAMS)
NOTHING = jax.tree.map(lambda _: False, PARAMS)


def same(got, want):
    assert rules.paths(got) == rules.paths(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_split_gives_each_leaf_to_one_half():
    chosen, rest = states.split(PARAMS, TRAINABLE)
    assert rules.paths(chosen) == ["body/bias", "head/kernel"]
    assert rules.paths(rest) == ["body/kernel"]
    assert chosen["body"]["kernel"] is None and rest["head"]["kernel"] is None


@pytest.mark.parametrize("trainable", [TRAINABLE, EVERYTHING, NOTHING])
def test_merge_is_the_inverse_of_split(trainable):
    same(states.merge(*states.split(PARAMS, trainable)), PARAMS)


def test_split_and_merge_work_on_shapes():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert states.merge(*states.split(shapes, TRAINABLE)) == shapes


def test_averaged_takes_the_average_where_one_is_kept():
    chosen, _ = states.split(PARAMS, TRAINABLE)
    ema = jax.tree.map(lambda p: p + 10, chosen)
    found = states.averaged(PARAMS, ema)
    same(found["body"]["kernel"], PARAMS["body"]["kernel"])
    same(found["body"]["bias"], ema["body"]["bias"])
    same(found["head"]["kernel"], ema["head"]["kernel"])


def test_a_fresh_state_starts_at_the_given_parameters():
    state = states.create(PARAMS, TRAINABLE, optax.adam(1.0))
    same(state.params, PARAMS)
    same(state.ema, states.split(PARAMS, TRAINABLE)[0])
    assert [int(x) for x in (state.step, state.skipped, state.retries)] == [0, 0, 0]
    moments = [x for p, x in rules.by_path(state.opt).items() if "body" in p or "head" in p]
    assert len(moments) == 4 and not any(x.any() for x in moments)


def test_a_fresh_state_shares_no_buffer():
    state = states.create(PARAMS, EVERYTHING, optax.sgd(1.0, momentum=0.9))
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


def test_a_state_without_trainable_parameters_has_no_average():
    state = states.create(PARAMS, NOTHING, optax.adam(1.0))
    assert not jax.tree.leaves(state.ema)
    same(states.averaged(state.params, state.ema), PARAMS)

"""Laws of the digest: any layout gives the same value, any changed bit another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jointseg_jax.training import digest

DTYPES = [
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "int32",
    "uint32",
    "int16",
    "uint8",
    "int8",
    "int4",
    "uint4",
    "bool",
    "complex64",
]


def array(dtype, shape, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return jnp.asarray(rng.integers(0, 2, shape), bool)
    if dtype == "complex64":
        return jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape), dtype)
    if "int" in dtype:
        return jnp.asarray(rng.integers(0, 8, shape), dtype)
    return jnp.asarray(rng.normal(size=shape), dtype)


def on_device(x):
    return np.asarray(digest._on_device(x.sharding)(x))


@pytest.mark.thorough_but(4)
@pytest.mark.parametrize("dtype", DTYPES)
def test_host_and_device_agree(dtype):
    for shape in ((), (5,), (3, 4, 5), (0, 3)):
        x = array(dtype, shape)
        words = digest._host_words(np.asarray(x))
        host = digest._hash(words, np.arange(words.size, dtype=np.uint32), np)
        np.testing.assert_array_equal(on_device(x), host)


def test_eight_byte_elements_are_two_words():
    x = np.random.default_rng(0).normal(size=(7,))
    with jax.enable_x64(True):
        device = on_device(jnp.asarray(x))
    words = digest._host_words(x)
    np.testing.assert_array_equal(
        device, digest._hash(words, np.arange(words.size, dtype=np.uint32), np)
    )


@pytest.mark.parametrize("spec", [("a", "b"), ("b", "a"), (("a", "b"), None), (None, "b"), ()])
def test_any_layout_gives_the_same_value(spec):
    x = array("float32", (264, 512))
    assert x.size > digest._ON_HOST  # so that the devices compute it
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    laid = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert digest.leaf_digests({"x": laid}) == digest.leaf_digests({"x": x})


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 31), st.sampled_from(["float32", "int32"]))
def test_any_single_flipped_bit_changes_both_words(position, bit, dtype):
    x = np.asarray(array(dtype, (6, 7)))
    flipped = x.copy().reshape(-1).view(np.uint32)
    flipped[position % x.size] ^= np.uint32(1 << bit)
    before = digest.leaf_digests([x])["0"]
    after = digest.leaf_digests([flipped.view(x.dtype).reshape(x.shape)])["0"]
    # mix is a bijection, so a single changed word changes each sum for certain
    assert before[:8] != after[:8] and before[8:] != after[8:]


def test_order_position_and_zeros_count():
    x = np.zeros((4, 4), np.float32)
    moved = [x.copy() for _ in range(16)]
    for i, m in enumerate(moved):
        m.reshape(-1)[i] = 1.0
    values = {digest.leaf_digests([m])["0"] for m in [x, *moved]}
    assert len(values) == 17
    lengths = {digest.leaf_digests([np.zeros(n, np.float32)])["0"] for n in range(20)}
    assert len(lengths) == 20


def test_keys_are_read_without_being_consumed():
    key = jax.random.key(3)
    first = digest.state_digest({"key": key, "step": jnp.int32(4)})
    assert first == digest.state_digest({"key": jax.random.key(3), "step": jnp.int32(4)})
    assert first != digest.state_digest({"key": jax.random.key(4), "step": jnp.int32(4)})
    jax.random.normal(key)  # jax_debug_key_reuse would raise if the digest had consumed it


def test_state_digest_sees_names_dtypes_and_shapes():
    x = jnp.zeros((2, 3))
    trees = [{"a": x}, {"b": x}, {"a": x.reshape(3, 2)}, {"a": x.astype(jnp.int32)}, {"a": [x]}]
    assert len({digest.state_digest(t) for t in trees}) == len(trees)
    order = [{"a": x, "b": x + 1}, dict([("b", x + 1), ("a", x)])]
    assert digest.state_digest(order[0]) == digest.state_digest(order[1])

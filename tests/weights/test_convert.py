"""Strict accounting of tensors, and files that are safe to read."""

import pickle
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from jointseg_jax.types import UserError
from jointseg_jax.weights.convert import (
    Entry,
    Layout,
    Table,
    read_safetensors,
    to_ours,
    to_theirs,
)

TRANSPOSE = Layout(ours=lambda a: [a.T], theirs=lambda a: [a.T])
SPLIT = Layout(
    ours=lambda a: [a[:2], a[2:]],
    theirs=lambda a, b: [np.concatenate([a, b]) if isinstance(a, np.ndarray) else joined(a, b)],
)


def joined(a, b):
    import jax.numpy as jnp

    return jnp.concatenate([a, b])


ENTRIES = (
    Entry(theirs=("fc.weight",), ours=("fc/kernel",), layout=TRANSPOSE),
    Entry(theirs=("pos",), ours=("a/position", "b/position"), layout=SPLIT),
)
TABLE = Table(
    name="toy",
    entries=ENTRIES,
    shapes={"fc/kernel": (3, 4), "a/position": (2, 5), "b/position": (1, 5)},
    idle=("unused.weight",),
)


def weights():
    rng = np.random.default_rng(0)
    shapes = {"fc.weight": (4, 3), "pos": (3, 5)}
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def test_both_directions():
    given = weights()
    params = to_ours(given, TABLE)
    np.testing.assert_array_equal(params["fc"]["kernel"], given["fc.weight"].T)
    np.testing.assert_array_equal(params["b"]["position"], given["pos"][2:])
    back = to_theirs(params, TABLE)
    assert set(back) == set(given)
    for name, array in given.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].flags["C_CONTIGUOUS"]  # safetensors would write other bytes otherwise


def test_half_precision_weights_become_float32():
    params = to_ours({k: a.astype(np.float16) for k, a in weights().items()}, TABLE)
    assert params["fc"]["kernel"].dtype == np.float32


def test_idle_tensors_and_wrapper_prefixes_are_dropped():
    given = {f"module.{k}": a for k, a in weights().items()}
    assert set(to_ours(given, TABLE)) == {"fc", "a", "b"}
    given = weights() | {"unused.weight": np.zeros(7, np.float32)}
    assert set(to_ours(given, TABLE)) == {"fc", "a", "b"}


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda w: w.pop("pos"), "toy weights: 1 missing (pos (3, 5))"),
        (lambda w: w.update(extra=np.zeros((2, 2))), "1 left over (extra (2, 2))"),
        (
            lambda w: w.update(pos=np.zeros((4, 5))),
            "1 of another shape (pos: given (4, 5), the model has (3, 5))",
        ),
        (
            lambda w: w.update({f"x{i}": np.zeros(1) for i in range(6)}),
            "6 left over (x0 (1,); x1 (1,); x2 (1,); x3 (1,); x4 (1,); ...)",
        ),
        (lambda w: w.clear(), "2 missing (fc.weight (4, 3); pos (3, 5))"),
    ],
)
def test_reference_tensors_are_all_accounted_for(change, message):
    given = weights()
    change(given)
    with pytest.raises(UserError) as error:
        to_ours(given, TABLE)
    assert message in str(error.value)
    assert "Change the model's config" in str(error.value)


def test_our_parameters_are_all_accounted_for():
    params = to_ours(weights(), TABLE)
    params["b"] = {"positions": params["b"]["position"]}
    with pytest.raises(UserError, match=r"1 missing \(b/position \(1, 5\)\), 1 left over"):
        to_theirs(params, TABLE)


@pytest.mark.parametrize(
    "entries,shapes",
    [
        (ENTRIES[:1], TABLE.shapes),
        (ENTRIES, {"fc/kernel": (3, 4)}),
        ((*ENTRIES, ENTRIES[0]), TABLE.shapes),
    ],
)
def test_a_table_covers_every_parameter_once(entries, shapes):
    with pytest.raises(ValueError, match="does not cover"):
        Table(name="toy", entries=entries, shapes=shapes)


def test_files_are_read_as_float32(tmp_path):
    save_file(
        {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "n": np.arange(3)},
        tmp_path / "w.safetensors",
    )
    got = read_safetensors(tmp_path / "w.safetensors")
    assert (got["a"].dtype, got["n"].dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(got["a"], np.arange(6).reshape(2, 3))


def test_bfloat16_files_are_read_as_float32(tmp_path):
    import jax.numpy as jnp
    from safetensors.flax import save_file as save_flax

    save_flax({"a": jnp.asarray([1.0, 2.5, -3.0], jnp.bfloat16)}, tmp_path / "w.safetensors")
    got = read_safetensors(tmp_path / "w.safetensors")["a"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [1.0, 2.5, -3.0])


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    "write", [write_zip, lambda path: path.write_bytes(pickle.dumps({"a": [1.0]}))]
)
def test_pickles_are_refused_whatever_their_name(tmp_path, suffix, write):
    path = tmp_path / f"weights{suffix}"
    write(path)
    with pytest.raises(UserError, match=r"is a pickle .* can run code .*safetensors"):
        read_safetensors(path)


@pytest.mark.parametrize("low_byte", [0x80, 0x50])  # pickle's and zip's first byte
def test_headers_of_every_length_are_read(tmp_path, low_byte):
    path = tmp_path / "w.safetensors"
    for n in range(1, 600):
        save_file({"a" * n: np.arange(3, dtype=np.float32)}, path)
        if path.read_bytes()[0] == low_byte:
            np.testing.assert_array_equal(read_safetensors(path)["a" * n], [0, 1, 2])
            return
    raise AssertionError("no header has such a length")


def test_good_content_under_a_pickle_name_is_refused_too(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "w.bin")
    with pytest.raises(UserError, match="is a pickle"):
        read_safetensors(tmp_path / "w.bin")


def test_broken_and_absent_files_are_named(tmp_path):
    save_file({"a": np.zeros(20, np.float32)}, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"cut\.safetensors is not a whole safetensors file"):
        read_safetensors(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"there is no file .*none\.safetensors"):
        read_safetensors(tmp_path / "none.safetensors")

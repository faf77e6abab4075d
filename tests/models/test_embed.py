"""Tokens from streams and back, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.models.embed import (
    IndexToken,
    Patches,
    PatchesIn,
    PatchesOut,
    Tokens,
    patchify,
    resize_position,
    sinusoid,
    spec_of,
    unpatchify,
)


def test_sinusoid_is_cosines_then_sines():
    t, half = np.array([0.0, 1.0, 436.0, 999.5]), 16
    angles = t[:, None] * np.exp(-np.log(10000) * np.arange(half) / half)
    want = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    # a float32 angle near 1000 is known to 6e-5
    np.testing.assert_allclose(sinusoid(jnp.asarray(t, jnp.float32), 32), want, atol=1e-4)


def test_sinusoid_tells_bfloat16_neighbours_apart():
    t = jnp.asarray([999.0, 1000.0]).astype(jnp.float32)
    assert np.abs(np.diff(sinusoid(t, 32), axis=0)).max() > 0.1


@pytest.mark.parametrize("shape,patch", [((2, 4, 6, 3), 2), ((1, 6, 3, 2), 3), ((1, 2, 2, 5), 1)])
def test_patches_are_row_major_with_the_channel_fastest(shape, patch):
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    tokens = patchify(x, patch)
    rows, columns = shape[1] // patch, shape[2] // patch
    assert tokens.shape == (shape[0], rows * columns, patch * patch * shape[3])
    for r, s in np.ndindex(rows, columns):
        cell = x[0, r * patch : (r + 1) * patch, s * patch : (s + 1) * patch]
        np.testing.assert_array_equal(tokens[0, r * columns + s], cell.reshape(-1))
    np.testing.assert_array_equal(unpatchify(tokens, (rows, columns), patch), x)


def linear_1d(values, n):
    """Bilinear in one axis: half-pixel centres, ends held (align_corners False)."""
    old = len(values)
    at = np.clip((np.arange(n) + 0.5) * old / n - 0.5, 0, old - 1)
    return np.interp(at, np.arange(old), values)


@pytest.mark.parametrize("cells", [(6, 6), (3, 8), (2, 3), (4, 5), (7, 2)])
def test_positions_are_resized_bilinearly(cells):
    position = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    tall = np.apply_along_axis(linear_1d, 0, position, cells[0])
    want = np.apply_along_axis(linear_1d, 1, tall, cells[1])
    # weights of the interpolation in float32
    np.testing.assert_allclose(resize_position(jnp.asarray(position), cells), want, atol=1e-5)


def test_positions_of_the_native_size_are_untouched():
    position = jnp.ones((4, 5, 3))
    assert resize_position(position, (4, 5)) is position


def test_patch_projections_start_as_torch_convolutions():
    spec = Patches(grid=(4, 4), channels=3, patch=2, conv=True)
    x = jnp.zeros((1, 4, 4, 3))
    init = jax.jit(PatchesIn(spec, 512, jnp.float32).init)
    params = init(jax.random.key(0), x)["params"]
    bound = 1 / np.sqrt(12)
    for leaf in (params["project"]["kernel"], params["project"]["bias"]):
        # the largest of >= 512 uniform draws lies within 2% of the bound (chance e^-10)
        assert 0.98 * bound < np.abs(leaf).max() <= bound
    init = jax.jit(PatchesOut(spec).init)
    head = init(jax.random.key(1), jnp.zeros((1, 4, 512)), x)["params"]
    assert np.abs(head["conv"]["kernel"]).max() <= 1 / np.sqrt(27)
    # 6144 draws: the deviation is known to 1%
    np.testing.assert_allclose(head["project"]["kernel"].std(), 0.02, rtol=0.05)


def test_the_head_in_every_cell_is_its_formula():
    spec = Patches(grid=(4, 6), channels=2, patch=2, units=5)
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, noisy = jax.random.normal(keys[0], (1, 6, 8)), jax.random.normal(keys[1], (1, 4, 6, 2))
    params = PatchesOut(spec).init(keys[2], tokens, noisy)["params"]
    v, u = params["conv_cell"]["kernel"], params["cell"]["kernel"]
    up = unpatchify(tokens @ params["up"]["kernel"], (2, 3), 2)[0]  # [4, 6, units]
    around = np.pad(noisy[0], ((1, 1), (1, 1), (0, 0)))
    want = np.zeros((4, 6, 2), np.float32)
    for i, j in np.ndindex(4, 6):
        seen = np.einsum("rsc,rscu->u", around[i : i + 3, j : j + 3], v)
        h = np.maximum(np.maximum(up[i, j] + seen, 0) @ u, 0)
        want[i, j] = h @ params["project"]["kernel"] + params["project"]["bias"]
    got = PatchesOut(spec).apply({"params": params}, tokens, noisy)
    np.testing.assert_allclose(got[0], want, atol=1e-6)


def test_tanh_bounds_the_output():
    spec = Patches(grid=(4, 4), channels=3, patch=2, tanh=True)
    x = 1e4 * jax.random.normal(jax.random.key(0), (1, 4, 16))
    like = jnp.zeros((1, 4, 4, 3))
    y, _ = PatchesOut(spec).init_with_output(jax.random.key(1), x, like)
    assert np.abs(y).max() == 1.0


def test_an_index_outside_the_table_is_loud():
    module = IndexToken(3, 8, jnp.float32)
    y, variables = module.init_with_output(jax.random.key(0), jnp.array([0, 2]))
    assert np.isfinite(y).all()
    assert np.isnan(module.apply(variables, jnp.array([3]))).any()


@pytest.mark.parametrize(
    "value,message",
    [
        ({"count": 3}, "kind is None; it must be one of: patches, tokens"),
        ({"kind": "pixels"}, "kind is 'pixels'"),
        ({"kind": "tokens", "count": 3}, "width"),
        ({"kind": "tokens", "count": 0, "width": 3}, "count=0"),
        ({"kind": "patches", "grid": (5, 4), "channels": 1, "patch": 2}, "5x4 latent cells"),
        ({"kind": "patches", "grid": (4,), "channels": 1, "patch": 2}, "grid is (height, width)"),
        (3, "neither a spec nor a mapping"),
    ],
)
def test_bad_specs_are_named(value, message):
    with pytest.raises(ValueError) as error:
        spec_of(value, where="streams.image")
    assert "streams.image" in str(error.value)
    assert message in str(error.value)


def test_specs_from_mappings_equal_specs():
    spec = spec_of({"kind": "patches", "grid": [4, 6], "channels": 2, "patch": 2}, where="x")
    assert spec == Patches(grid=(4, 6), channels=2, patch=2)
    assert (spec.tokens, spec.shape) == (6, (4, 6, 2))
    assert spec_of(Tokens(count=2, width=3), where="x").shape == (2, 3)
